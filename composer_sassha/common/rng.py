"""Random numbers that need no saved state: a key determines them."""

import hashlib
from collections.abc import Sequence

import torch


def generator(key: Sequence[int], device: torch.device) -> torch.Generator:
    """Return a generator seeded by a key, for instance (seed, step, rank).

    The same key gives the same numbers, so that no generator has to be saved. CPU and GPU draw different
    numbers from one key.

    Example:
        >>> draws = [torch.rand(1, generator=generator((0, 7), torch.device("cpu"))) for _ in range(2)]
        >>> draws[0] == draws[1]
        tensor([True])
    """
    # Not hash(): it need not be the same in another process or release of Python.
    digest = hashlib.blake2b(repr(tuple(int(k) for k in key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
