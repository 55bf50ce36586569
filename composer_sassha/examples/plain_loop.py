"""Train SASSHA in a plain PyTorch loop, without Composer: with microbatches and a schedule.

python -m composer_sassha.examples.plain_loop
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from composer_sassha.curvature import LazyCurvature
from composer_sassha.optim import SASSHA, SharpnessAwareOptimizer
from composer_sassha.perturbations import SAMPerturbation


def main(epochs: int = 10, batch_size: int = 64, microbatch: int = 32) -> float:
    """Train, and return the test accuracy."""
    torch.manual_seed(0)
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(targets)
    order = torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, 10))
    rule = SASSHA(model.parameters(), lr=0.15, weight_decay=1e-3)
    # `model` lets the wrapper protect BatchNorm's statistics in the second pass.
    optimizer = SharpnessAwareOptimizer(rule, SAMPerturbation(0.1), curvature=LazyCurvature(), model=model)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(batch_size):

            def closure(batch: Tensor = batch) -> float:
                """Run one pass over the batch; the optimizer calls this once at w and once at w + e."""
                optimizer.zero_grad()
                total = 0.0
                for part in batch.split(microbatch):
                    loss, weight = cross_entropy(model(images[part]), labels[part]), len(part) / len(batch)
                    # (weight * loss).backward(), and the Hessian on every tenth step.
                    optimizer.backward(loss, weight)
                    total += weight * loss.item()
                return total

            optimizer.step(closure)
        schedule.step()
    return (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.2%}")
