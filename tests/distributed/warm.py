"""Prepare the process that ranks are forked from: import what they use, and start no threads."""

import gc
from collections.abc import Mapping, Sequence

import torch

import tests.helpers
import tests.methods  # noqa: F401

# Composer asks this of each batch. The first answer walks through every subclass of Mapping and Sequence,
# which takes longer than the training of most checks; forks inherit it.
for kind in (torch.Tensor, torch.nn.Parameter):
    issubclass(kind, Mapping)
    issubclass(kind, Sequence)

# Garbage collection in a fork would otherwise write to, and so copy, every page that holds an object.
gc.collect()
gc.freeze()
