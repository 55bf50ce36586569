"""Train SASSHA through Composer's Trainer on handwritten digits, and watch how sharp the minimum is.

python -m composer_sassha.examples.trainer
"""

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingWithWarmupScheduler
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from composer_sassha import SASSHA, Sassha, Schedule, SharpnessMonitor
from composer_sassha.sharpness import Measures


def network() -> nn.Module:
    """Build a convolution, BatchNorm, a smooth activation and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


def main(epochs: int = 8) -> dict[str, float]:
    """Train, and return the test accuracy and the Hessian's largest eigenvalue on test images."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    train, test = random_split(TensorDataset(images, torch.tensor(labels)), [1437, 360])
    model = ComposerClassifier(network(), num_classes=10)
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(train, batch_size=64, shuffle=True, drop_last=True),
        eval_dataloader=DataLoader(test, batch_size=360),
        max_duration=f"{epochs}ep",
        # These two lines are what SASSHA changes in a script that trained with SGD or AdamW.
        optimizers=SASSHA(model.parameters(), lr=0.15, weight_decay=1e-3),
        algorithms=[Sassha(rho=0.1), Schedule("rho", CosineAnnealingWithWarmupScheduler("1ep"))],
        schedulers=CosineAnnealingWithWarmupScheduler("1ep"),
        callbacks=[SharpnessMonitor(interval=f"{epochs // 2}ep", batches=1, measures=Measures(m=()))],
        loggers=log,
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    accuracy = trainer.state.eval_metrics["eval"]["MulticlassAccuracy"].compute().item()
    trainer.close()
    return {"accuracy": accuracy, "lambda_max": log.data["sharpness/lambda_max"][-1][1]}


if __name__ == "__main__":
    print(main())
