"""A text file for language modelling, its characters or bytes as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from composer import Evaluator
from torch import Tensor
from torch.utils.data import DataLoader

from composer_sassha.recipes.data.loading import data_root, eval_loader, rank_share, train_loader
from composer_sassha.recipes.schema import at_least, checked, one_of

_GET = (
    "any text will do, such as curl -o {0} "
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


@dataclass
class Text:
    """A text file in windows: each predicts, for every one of its tokens, the one that follows.

    The last tenth of the file is the held-out part, `validation`. Windows lie one after the other, and in an
    epoch every token is predicted once, but for those that fill no window at the end of a part, and windows
    that fill no batch at the end of an epoch.

    Args:
        root: the file.
        tokens: `characters` of UTF-8, of which the vocabulary is those that occur in the file, sorted; or
            `bytes`, which are always 256.
        context: tokens of a window, >= 1; the model's.
        batch_size: windows per step over all ranks together, >= 1.
    """

    root: str = "~/data/text.txt"
    tokens: str = checked("characters", one_of("characters", "bytes"))
    context: int = checked(128, at_least(1))
    batch_size: int = checked(32, at_least(1))

    def model_settings(self) -> dict[str, Any]:
        """Return the settings that the model must have."""
        size = 256 if self.tokens == "bytes" else len(self.read()[1])
        return {"vocab_size": size, "context": self.context}

    def build(self, seed: int) -> tuple[DataLoader, Evaluator]:
        """Return a loader for training and the evaluator of the last tenth.

        Raises:
            ValueError: the file is missing, is no text, or is too short.
        """
        tokens, _ = self.read()
        cut = len(tokens) - len(tokens) // 10
        train, heldout = (windows(part, self.context) for part in (tokens[:cut], tokens[cut:]))
        if not len(heldout):
            raise ValueError(
                f"root={self.root}: has {len(tokens)} tokens; with context={self.context} it needs at least "
                f"{10 * (self.context + 1)}"
            )
        size = rank_share(self.batch_size, train)
        return (
            train_loader(train, self.batch_size, seed, following),  # type: ignore[arg-type]  # a tensor will do
            Evaluator(label="validation", dataloader=eval_loader(heldout, size, following)),  # type: ignore[arg-type]
        )

    def read(self) -> tuple[Tensor, list[int]]:
        """Return the tokens of the whole file, int64, and the vocabulary: their code points or bytes."""
        return self._content

    @cached_property
    def _content(self) -> tuple[Tensor, list[int]]:
        path = data_root(self.root)
        try:
            content = path.read_bytes()
            if self.tokens == "bytes":
                values = np.frombuffer(content, dtype=np.uint8).astype(np.int64)
                return torch.from_numpy(values), list(range(256))
            points = np.frombuffer(content.decode().encode("utf-32-le"), dtype="<u4")
        except OSError as error:
            raise ValueError(f"root={self.root}: {error.strerror}; {_GET.format(self.root)}") from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"root={self.root}: is not UTF-8 ({error}); tokens=bytes reads any file"
            ) from error
        vocabulary, tokens = np.unique(points, return_inverse=True)
        return torch.from_numpy(tokens), vocabulary.tolist()


def windows(tokens: Tensor, context: int) -> Tensor:
    """Cut tokens [n] into windows [count, context + 1]; each begins with the last token of the one before.

    >>> windows(torch.arange(6), context=2).tolist()
    [[0, 1, 2], [2, 3, 4]]
    """
    return (
        tokens.unfold(0, context + 1, context) if len(tokens) > context else tokens.new_empty(0, context + 1)
    )


def following(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Make a batch of windows: `labels` are the tokens that follow the `input_ids`."""
    batch = torch.stack(list(samples))
    return {"input_ids": batch[:, :-1].contiguous(), "labels": batch[:, 1:].contiguous()}
