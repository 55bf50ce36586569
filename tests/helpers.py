"""Small models, data and Trainers, and what a run is compared by."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, State, Trainer
from composer.core import Event, Precision
from composer.models import ComposerClassifier
from composer.utils import dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.methods import Method

CLASSES = 3


def images(count: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 2, 5, 5, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


def digits(count: int = 160) -> TensorDataset:
    """Real images: the first of scikit-learn's handwritten digits, standardised."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:count], dtype=torch.float32).view(-1, 1, 8, 8)
    return TensorDataset((x - x.mean()) / x.std(), torch.tensor(labels[:count]))


def digits_network() -> ComposerClassifier:
    """A convolution, BatchNorm and a smooth activation, for the digits."""
    torch.manual_seed(17)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(216, 10))
    return ComposerClassifier(net, num_classes=10)


def network(dropout: float = 0.2) -> ComposerClassifier:
    """A convolution, BatchNorm, dropout and a smooth activation."""
    torch.manual_seed(17)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )
    return ComposerClassifier(net, num_classes=CLASSES)


def trainer(
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    algorithms: Sequence[Any] = (),
    *,
    model: Any = None,
    dataset: Any = None,
    batch_size: int = 10,
    **kwargs: Any,
) -> Trainer:
    """A Trainer on the CPU; by default over two epochs of four batches."""
    model = network() if model is None else model
    dataset = images() if dataset is None else dataset
    loader = DataLoader(dataset, batch_size=batch_size, sampler=dist.get_sampler(dataset, shuffle=True))
    settings = {
        "train_dataloader": loader,
        "max_duration": "2ep",
        "seed": 7,
        "device": "cpu",
        "progress_bar": False,
    }
    return Trainer(
        model=model,
        optimizers=optimizer(model.parameters()),
        algorithms=list(algorithms),
        **{**settings, **kwargs},
    )


def method_trainer(method: Method, **kwargs: Any) -> Trainer:
    return trainer(method.optimizer, method.algorithms(), **kwargs)


def rng_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002


def everything(run: Trainer) -> dict[str, Any]:
    """Weights, buffers, optimizer state, counters and RNG states, copied."""
    (optimizer,) = run.state.optimizers
    return copied(
        {"model": run.state.model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_states()}
    )


def copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(value) for value in tree)
    return tree


def assert_same(first: Any, second: Any, path: str = "") -> None:
    """Assert equality to the last bit, NaN and the sign of zero included."""
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, path
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (first, second)]
        assert torch.equal(*bits), f"{path}: {(first - second).abs().max()}"
    elif isinstance(first, np.ndarray):
        assert first.tobytes() == second.tobytes(), path
    elif isinstance(first, Mapping):
        assert first.keys() == second.keys(), f"{path}: {first.keys() ^ second.keys()}"
        for key in first:
            assert_same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for i, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert first == second, f"{path}: {first} != {second}"


# In their order, all the events of one pass over one microbatch.
PASS_EVENTS = (
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.BEFORE_LOSS,
    Event.AFTER_LOSS,
    Event.BEFORE_BACKWARD,
    Event.AFTER_BACKWARD,
    Event.AFTER_TRAIN_BATCH,
)


class Injected(RuntimeError):
    """The exception that the tests throw into a step."""


class Spy(Callback):
    """Calls a function at every event, with the number of passes begun so far in this batch."""

    def __init__(self, on_event: Callable[[Event, State, int], None]) -> None:
        self.on_event = on_event
        self.passes = 0

    def run_event(self, event: Event, state: State, logger: Any) -> None:
        if event == Event.BATCH_START:
            self.passes = 0
        if event == Event.BEFORE_TRAIN_BATCH:
            self.passes += 1
        self.on_event(event, state, self.passes)


@contextlib.contextmanager
def float16_on_cpu() -> Iterator[dict[str, Any]]:
    """Let the Trainer train in float16 on the CPU, by autocast, which it refuses to be asked for."""

    @contextlib.contextmanager
    def autocast(precision: Precision, *_: Any, **__: Any) -> Iterator[None]:
        with torch.autocast("cpu", torch.float16, enabled=precision == Precision.AMP_FP16):
            yield

    ours = [f"composer_sassha.algorithms.{module}" for module in ("esam", "lazy_hessian")]
    with pytest.MonkeyPatch.context() as patch:
        for module in (*ours, "composer.trainer.trainer"):
            patch.setattr(f"{module}.get_precision_context", autocast)
        patch.setattr("composer.trainer.trainer._validate_precision", lambda *_: None)
        yield {"precision": "amp_fp16"}
