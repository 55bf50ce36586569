"""Finds the class logits and the labels behind a loss."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor


def predictions(model: Any, outputs: Any, *batches: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return logits [N, classes, ...] and labels [N, ...] or probabilities; (None, None) if not found.

    The labels are those of the first batch that has some: a forward may have taken them out of another.
    """
    if not batches:
        return None, None
    batch, *others = batches
    if isinstance(outputs, Mapping) and isinstance(batch, Mapping):  # Hugging Face: classes last
        logits, labels = outputs.get("logits"), batch.get("labels")
        if isinstance(logits, Tensor) and _are_classes(labels) and labels.shape == logits.shape[:-1]:
            if getattr(model, "shift_labels", False):  # a causal language model: each predicts the next
                logits, labels = logits[:, :-1], labels[:, 1:]
            return logits.movedim(-1, 1), labels
    elif isinstance(outputs, Tensor) and outputs.ndim > 1 and isinstance(batch, (tuple, list)):
        labels = batch[1] if len(batch) == 2 else None
        if _are_classes(labels) and labels.shape == outputs[:, 0].shape:
            return outputs, labels
        if _are_probabilities(labels) and labels.shape == outputs.shape:
            return outputs, labels
    return predictions(model, outputs, *others)


def _are_classes(labels: Any) -> TypeGuard[Tensor]:
    return isinstance(labels, Tensor) and not labels.is_floating_point()


def _are_probabilities(labels: Any) -> TypeGuard[Tensor]:
    if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.ndim < 2:
        return False
    sums = labels.sum(dim=1)  # those of a regression's targets are not 1
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
