"""Train a small GPT-2 on the bytes of Python's own documentation, with SAM around AdamW.

The model is made from a configuration and the text comes with Python, so that nothing is downloaded.

python -m composer_sassha.examples.huggingface
"""

import math
from pydoc_data.topics import topics
from typing import Any

import torch
from composer import Trainer
from composer.models import HuggingFaceModel
from composer.optim import CosineAnnealingWithWarmupScheduler
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from composer_sassha import SAM

CONTEXT = 64


def windows(text: bytes) -> Any:
    """Cut the text into sequences; the model itself shifts the labels by one."""
    sequences = torch.tensor(list(text)).split(CONTEXT)[:-1]  # the last one is shorter
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


def main(batches: int = 200) -> float:
    """Train, and return the perplexity per byte of held-out text."""
    torch.manual_seed(0)
    text = "".join(topics.values()).encode()[:150_000]
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, use_cache=False)
    model = HuggingFaceModel(GPT2LMHeadModel(config), shift_labels=True)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(windows(text[:-10_000]), batch_size=8, shuffle=True, drop_last=True),
        max_duration=f"{batches}ba",
        optimizers=AdamW(model.parameters(), lr=5e-3, weight_decay=0.1),
        # ESAM would need gamma=1 here, since a Hugging Face model returns no loss per sample. With Sophia as
        # the optimizer, LazyHessian(estimator="gauss_newton") finds outputs["logits"] and batch["labels"].
        algorithms=[SAM(rho=0.02)],
        schedulers=CosineAnnealingWithWarmupScheduler("0.1dur"),
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    model.eval()
    with torch.no_grad():
        losses = [model(batch)["loss"].item() for batch in DataLoader(windows(text[-10_000:]), batch_size=64)]
    trainer.close()
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    print(f"perplexity per byte of held-out text: {main():.2f}")
