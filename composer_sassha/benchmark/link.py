"""The link between ranks: how long an all-reduce takes on it."""

import math
import time
from dataclasses import dataclass
from statistics import median

import torch
from composer.utils import dist, get_device


@dataclass(frozen=True)
class Link:
    """The slowest link between the ranks.

    Args:
        bandwidth: bytes per second, in each direction, above 0.
        latency: seconds that a message takes in addition to its bytes, at least 0.

    >>> Link(bandwidth=1e9, latency=1e-5).seconds(4_000_000, ranks=4)
    0.00606
    """

    bandwidth: float
    latency: float

    def seconds(self, size: float, ranks: int) -> float:
        """Return the time of an all-reduce of `size` bytes; a broadcast or a gather takes no longer."""
        around_a_ring = 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)
        through_a_tree = 2 * math.ceil(math.log2(ranks)) * (self.latency + size / self.bandwidth)
        return min(around_a_ring, through_a_tree)

    def __str__(self) -> str:
        return f"link {8e-9 * self.bandwidth:.3g} Gbit/s, latency {1e6 * self.latency:.3g} us"


def measured_link(size: int, repeats: int = 30) -> Link:
    """Measure the link between the ranks, whose process group must be there.

    Args:
        size: bytes of a large all-reduce. The speed depends on it, so take those of the gradient.
        repeats: of it, and of a small one; the medians count. Default: 30.
    """
    device, ranks = get_device(None), dist.get_world_size()

    def seconds(entries: int) -> float:
        tensor, found = device.tensor_to_device(torch.zeros(entries)), []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()
            found.append(time.perf_counter() - start)
        return max(dist.all_gather_object(median(found)))

    seconds(1)  # connects
    small, large = seconds(1), seconds(size // 4)
    bandwidth = 2 * (ranks - 1) / ranks * size / max(large - small, 1e-9)
    return Link(bandwidth, latency=small / (2 * math.ceil(math.log2(ranks))))
