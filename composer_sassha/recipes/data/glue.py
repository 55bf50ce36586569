"""GLUE's tasks of one or two sentences (Wang et al. 2019, arXiv 1804.07461)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer import Evaluator
from torch import Tensor
from torch.utils.data import DataLoader

from composer_sassha.recipes.data.loading import eval_loader, rank_share, train_loader
from composer_sassha.recipes.hub import fetched, pretrained
from composer_sassha.recipes.schema import at_least, checked, one_of


class Task(NamedTuple):
    """A task of GLUE.

    Args:
        columns: the columns with the sentences.
        labels: the names of the classes, in their order; none for a regression.
        metrics: the metrics that the benchmark scores.
        heldout: the part whose labels are published.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...] = ("entailment", "not_entailment")
    metrics: tuple[str, ...] = ("MulticlassAccuracy",)
    heldout: str = "validation"

    @property
    def outputs(self) -> int:
        """Return the outputs of a model: one for each class, or one for a regression."""
        return len(self.labels) or 1


_ACCURACY_F1 = ("MulticlassAccuracy", "BinaryF1Score")
TASKS = {
    "rte": Task(("sentence1", "sentence2")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), _ACCURACY_F1),
    "stsb": Task(("sentence1", "sentence2"), (), ("PearsonCorrCoef", "SpearmanCorrCoef")),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), _ACCURACY_F1),
    "mnli": Task(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), heldout="validation_matched"
    ),
}


@dataclass
class GLUE:
    """One of GLUE's tasks, from the Hugging Face hub or a folder; a batch is padded to its longest sample.

    The labels of the test split are hidden, so the validation split is the held-out part (of MNLI the matched
    one), as in the papers that compare optimizers on it.

    Args:
        task: rte, mrpc, stsb, sst2, qnli, qqp or mnli.
        root: a folder that `DatasetDict.save_to_disk` has written; None: nyu-mll/glue on the hub.
        tokenizer: a name on the hub, or a folder with what is there; the model's.
        batch_size: samples per step over all ranks together, >= 1.
        max_length: tokens of a sample, >= 8; longer ones are cut.
    """

    task: str = checked("rte", one_of(*TASKS))
    root: str | None = None
    tokenizer: str = "squeezebert/squeezebert-uncased"
    batch_size: int = checked(16, at_least(1))
    max_length: int = checked(128, at_least(8))

    def model_settings(self) -> dict[str, Any]:
        """Return the settings that the model must have."""
        return {"outputs": TASKS[self.task].outputs}

    def build(self, seed: int) -> tuple[DataLoader, Evaluator]:
        """Return a loader for training and the evaluator of the validation split.

        Raises:
            ValueError: the data or the tokenizer cannot be had, or is not for this task.
        """
        from transformers import AutoTokenizer

        task, splits = TASKS[self.task], self._splits()
        tokenizer = pretrained(AutoTokenizer.from_pretrained, "tokenizer", self.tokenizer)
        if self.max_length > tokenizer.model_max_length:
            raise ValueError(
                f"max_length={self.max_length}: {self.tokenizer} takes at most {tokenizer.model_max_length}"
            )
        collate = Tokenize(tokenizer, task, self.max_length)
        size = rank_share(self.batch_size, splits["train"])
        loss = "MeanSquaredError" if task.outputs == 1 else "LanguageCrossEntropy"
        return (
            train_loader(splits["train"], self.batch_size, seed, collate),
            Evaluator(
                label="validation",
                dataloader=eval_loader(splits[task.heldout], size, collate),
                metric_names=[*task.metrics, loss],
            ),
        )

    def _splits(self) -> Any:
        import datasets

        def load() -> Any:
            if self.root is None:
                return datasets.load_dataset("nyu-mll/glue", self.task)
            return datasets.load_from_disk(str(Path(self.root).expanduser()))

        remedy = f"datasets.load_dataset('nyu-mll/glue', '{self.task}').save_to_disk('FOLDER')"
        splits = fetched(
            load,
            f"task={self.task}, root={self.root}",
            f'where there is a network, `python -c "import datasets; {remedy}"` fetches it for root=FOLDER',
        )
        task = TASKS[self.task]
        for name in ("train", task.heldout):
            columns = {"label", *task.columns}
            if not isinstance(splits, dict) or not columns <= {
                *getattr(splits.get(name), "column_names", ())
            }:
                raise ValueError(
                    f"root={self.root}: has no split {name} with {', '.join(sorted(columns))}, "
                    f"which task={self.task} consists of"
                )
            if not _fits(splits[name].features["label"], task):
                raise ValueError(
                    f"root={self.root}: its labels are not those of task={self.task} "
                    f"({', '.join(task.labels) or 'numbers'}); give the folder of that task"
                )
        return splits


def _fits(label: Any, task: Task) -> bool:
    """Return whether a column of labels can be this task's; tasks share names of columns."""
    if names := getattr(label, "names", None):
        return tuple(names) == task.labels
    return str(label.dtype).startswith("int" if task.labels else "float")


@dataclass
class Tokenize:
    """Makes a batch of rows: the tokenizer's tensors, and `labels`.

    Args:
        tokenizer: of transformers.
        task: names the columns.
        max_length: tokens of a sample; longer ones are cut, the longer sentence first.
    """

    tokenizer: Any
    task: Task
    max_length: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these rows."""
        sentences = ([row[column] for row in rows] for column in self.task.columns)
        tokens = self.tokenizer(
            *sentences, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        kind = torch.float32 if self.task.outputs == 1 else torch.int64
        return {**tokens, "labels": torch.tensor([row["label"] for row in rows], dtype=kind)}
