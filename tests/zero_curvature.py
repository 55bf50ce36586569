"""Measures guards against a curvature of exactly zero: the tables in yamls/RESULTS.md.

    python -m tests.zero_curvature [--tasks mlp32,resnet8_noise] [--seeds 0,1] [--lr 0.03] [--cifar FOLDER]

Each task is trained by `Sassha` and `Sassha.lean`: with the published rule, with a floor under the curvature,
and with a bound on every entry of the step before it is multiplied by the learning rate. `_noise` draws 40 %
of the training labels anew. MNIST-1D needs `pip install mnist1d`.
"""

import argparse
import functools
import importlib
import statistics
import warnings
from typing import Any

import torch
from composer import Evaluator, Trainer
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingWithWarmupScheduler
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models import squeezenet1_1
from torchvision.transforms.v2.functional import resize

from composer_sassha import SASSHA, Sassha
from composer_sassha.optim.second_order import kept
from composer_sassha.recipes.data.digits import Digits
from composer_sassha.recipes.data.folders import ImageFolder
from composer_sassha.recipes.data.images import with_label_noise
from composer_sassha.recipes.data.loading import eval_loader, train_loader
from composer_sassha.recipes.models.resnet_cifar import CIFARResNet

# Batch, epochs, learning rate, weight decay, radius, warm-up and cosine.
TASKS = {
    **{f"mlp{batch}": (batch, 6, 0.01, 0.0, 0.2, False) for batch in (32, 64, 128)},
    "mnist1d": (64, 15, 0.05, 1e-3, 0.1, True),
    "mnist1d_noise": (64, 15, 0.05, 1e-3, 0.1, True),
    "resnet8": (128, 15, 0.15, 1e-3, 0.05, True),
    "resnet8_noise": (128, 15, 0.15, 1e-3, 0.05, True),
    "resnet20": (64, 6, 0.15, 3e-3, 0.1, True),
    "resnet20_noise": (64, 6, 0.15, 3e-3, 0.1, True),
    "squeezenet": (32, 10, 1e-3, 0.0, 0.0, False),
}
GUARDS: dict[str, dict[str, float]] = {
    "published": {},
    "floor 0.001": {"floor": 1e-3},
    "floor 0.01": {"floor": 1e-2},
    "clip 1": {"clip": 1.0},
    "clip 10": {"clip": 10.0},
}


class Clipped(SASSHA):
    clip = 1.0

    def _update(
        self, weights: list[Tensor], states: list[Any], denominators: list[Tensor], group: dict[str, Any]
    ) -> None:
        averages = kept(states, "exp_avg")
        for w, m, d, state in zip(weights, averages, denominators, states, strict=True):
            step = m / (1 - group["betas"][0] ** state["step"]) / d
            w.sub_(step.clamp_(-self.clip, self.clip), alpha=group["lr"])


@functools.cache
def loaders(task: str, seed: int, cifar: str) -> tuple[Any, Any]:
    kind, noise, batch = task.removesuffix("_noise"), 0.4 * task.endswith("_noise"), TASKS[task][0]
    if kind == "resnet20":
        part = {"train_size": 1000, "image_size": 16, "padding": 0, "flip": False}
        return ImageFolder(root=cifar, batch_size=batch, label_noise=noise, **part).build(seed)
    if kind == "mnist1d":
        source = importlib.import_module("mnist1d.data")
        data = source.make_dataset(source.get_dataset_args())
        x, y, x_test, y_test = (torch.as_tensor(data[key]) for key in ("x", "y", "x_test", "y_test"))
        train = TensorDataset(x.float(), with_label_noise(y.long(), 10, noise, seed=0))
        test = TensorDataset(x_test.float(), y_test.long())
    else:
        train, test = Digits(label_noise=noise).splits()
    if kind == "squeezenet":
        train, test = (
            TensorDataset(resize(x[:768], [40, 40]).expand(-1, 3, -1, -1), y[:768])
            for x, y in (train.tensors, test.tensors)
        )
    return train_loader(train, batch, seed), eval_loader(test)


def network(task: str) -> nn.Module:
    kind = task.removesuffix("_noise")
    if kind.startswith("resnet"):
        return CIFARResNet(int(kind[6:]), 10, in_channels=1 if kind == "resnet8" else 3)
    if kind == "squeezenet":
        return squeezenet1_1(num_classes=10)
    if kind == "mnist1d":
        sizes = ((1, 5), (25, 3), (25, 3))
        layers = [part for n, k in sizes for part in (nn.Conv1d(n, 25, k, 2, 1), nn.ReLU())]
        return nn.Sequential(nn.Unflatten(1, (1, 40)), *layers, nn.Flatten(), nn.Linear(125, 10))
    layers = [part for n in (64, 128) for part in (nn.Linear(n, 128), nn.ReLU(), nn.Dropout(0.5))]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 10))


def accuracy(
    task: str, lean: bool, seed: int, given: argparse.Namespace, floor: float = 0.0, clip: float = 0.0
) -> float:
    """Return the held-out accuracy in percent; NaN if the weights have ended as such."""
    torch.manual_seed(seed)
    _, epochs, lr, decay, rho, scheduled = TASKS[task]
    train, test = loaders(task, seed, given.cifar)
    net = network(task)
    rule = (Clipped if clip else SASSHA)(net.parameters(), given.lr or lr, weight_decay=decay)
    rule.clip = clip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Trainer(
            model=ComposerClassifier(net, num_classes=10),
            optimizers=rule,
            algorithms=[Sassha.lean(rho, floor=floor) if lean else Sassha(rho, floor=floor)],
            schedulers=[CosineAnnealingWithWarmupScheduler("20ba")] if scheduled else None,
            train_dataloader=train,
            max_duration=f"{epochs}ep",
            seed=seed,
            device="cpu",
            progress_bar=False,
        )
        run.fit()
        run.close()
    if not all(p.isfinite().all() for p in net.parameters()):
        return float("nan")
    net.eval()
    loader = test.dataloader.dataloader if isinstance(test, Evaluator) else test
    with torch.no_grad():
        hits = [net(x).argmax(1) == y for x, y in loader]
    return 100 * torch.cat(hits).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--lr", type=float, help="in place of the task's own")
    parser.add_argument("--cifar", default="~/data/cifar10-jpeg")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | method |", " | ".join(GUARDS), "|\n|---|---|" + "---|" * len(GUARDS))
    for task in given.tasks.split(","):
        for lean in (False, True):
            cells = []
            for guard in GUARDS.values():
                found = [accuracy(task, lean, int(s), given, **guard) for s in given.seeds.split(",")]
                cells.append(f"{statistics.mean(found):.1f} ({min(found):.1f})")
            print(
                f"| `{task}` | `{'Sassha.lean' if lean else 'Sassha'}` |", " | ".join(cells), "|", flush=True
            )


if __name__ == "__main__":
    main()
