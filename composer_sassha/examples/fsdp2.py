"""Train SASSHA with parameters sharded over the ranks (FSDP2): GPUs, or CPU processes with torch 2.7.

composer -n 2 -m composer_sassha.examples.fsdp2
"""

from typing import Any

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from composer_sassha import SASSHA, Sassha
from composer_sassha.examples.trainer import network


def loader(images: torch.Tensor, labels: torch.Tensor, shuffle: bool) -> DataLoader[Any]:
    """Give every rank its part of the data, 32 images at a time."""
    dataset = TensorDataset(images, labels)
    sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=shuffle)
    return DataLoader(dataset, batch_size=32, sampler=sampler, drop_last=shuffle)


def main(epochs: int = 8) -> dict[str, float]:
    """Train, and return the test accuracy and the fraction of the weights that this rank holds."""
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8), torch.tensor(targets)
    torch.manual_seed(0)
    model, log = ComposerClassifier(network(), num_classes=10), InMemoryLogger()
    whole = sum(p.numel() for p in model.parameters())
    trainer = Trainer(
        model=model,
        train_dataloader=loader(images[:1437], labels[:1437], shuffle=True),
        eval_dataloader=loader(images[1437:], labels[1437:], shuffle=False),
        max_duration=f"{epochs}ep",
        optimizers=SASSHA(model.parameters(), lr=0.05, weight_decay=1e-3),
        # FSDP2 gives out gradients by an ordinary backward only, which "hutchinson" cannot use. Every
        # gradient is averaged over the ranks, the ascent's too: sync_ascent=True says that this is meant.
        algorithms=[Sassha(rho=0.1, estimator="gauss_newton", sync_ascent=True)],
        parallelism_config={"fsdp": FSDP2Config()},
        schedulers=CosineAnnealingWithWarmupScheduler("1ep"),
        loggers=log,
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    # The optimizer's are the sharded ones; after an evaluation the model may still hold gathered copies.
    held = sum(p.to_local().numel() for p in trainer.state.optimizers[0].param_groups[0]["params"])
    trainer.close()
    return {"accuracy": log.data["metrics/eval/MulticlassAccuracy"][-1][1].item(), "held": held / whole}


if __name__ == "__main__":
    print(main())
