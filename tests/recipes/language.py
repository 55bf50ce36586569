"""Small texts and encoders, on the disk as the published ones are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.data.glue import TASKS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrst"]
LENGTH = 16
SAMPLES = 24


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SqueezeBERT of two blocks, and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[nlp]'")
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.SqueezeBertTokenizerFast(str(folder / "vocab.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2)
    config = transformers.SqueezeBertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        embedding_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
        **groups,
    )
    torch.manual_seed(3)
    model = transformers.SqueezeBertModel(config)
    with (
        torch.no_grad()
    ):  # the first token has only what it attends to, so that answers differ from the start
        model.embeddings.word_embeddings.weight[WORDS.index("[CLS]")] = 0
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    model.save_pretrained(folder)
    return folder


def sentences(task: str, count: int, seed: int) -> dict[str, list[Any]]:
    """Random sentences of 1 to 9 words, and labels."""
    rng = np.random.default_rng(seed)
    spec = TASKS[task]

    def sentence() -> str:
        return " ".join(rng.choice(WORDS[5:], rng.integers(1, 10)))

    rows: dict[str, list[Any]] = {column: [sentence() for _ in range(count)] for column in spec.columns}
    labels = 5 * rng.random(count) if spec.outputs == 1 else rng.integers(spec.outputs, size=count)
    return rows | {"label": labels.tolist()}


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a task, as `DatasetDict.save_to_disk` writes it."""
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install '.[nlp]'")
    root = tmp_path_factory.mktemp("glue")

    def folder(task: str) -> Path:
        if not (root / task).exists():
            parts = {"train": (SAMPLES, 0), TASKS[task].heldout: (10, 1)}
            splits = {
                name: datasets.Dataset.from_dict(sentences(task, *part)) for name, part in parts.items()
            }
            if names := TASKS[task].labels:
                kind = datasets.ClassLabel(names=list(names))
                splits = {name: split.cast_column("label", kind) for name, split in splits.items()}
            datasets.DatasetDict(splits).save_to_disk(str(root / task))
        return root / task

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 2000 characters, one of them of two bytes and one line end of two characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "ü", "\r\n"], 1000)
    path.write_bytes(" ".join(words)[:2000].encode())
    return path


VOCABULARY = len(set(" tobenrü\r\n"))
SMALL_GPT = [
    "model.layers=2",
    "model.heads=2",
    "model.width=8",
    "model.context=8",
    f"model.vocab_size={VOCABULARY}",
]


@pytest.fixture
def small(request: pytest.FixtureRequest, encoder: Path, text: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe with small data and a small model in the place of its own, with few steps."""

    def recipe(name: str, method: str, *overrides: str, folder: str = "runs") -> Recipe:
        if name == "gpt_text":
            own = [f"data.root={text}", "data.context=8", "data.batch_size=4", "cpu_threads=null", *SMALL_GPT]
        else:
            glue = request.getfixturevalue("glue")  # which not every test has the package for
            own = [f"data.root={glue(name.removeprefix('glue_'))}", f"data.max_length={LENGTH}"]
            own += [f"model.pretrained={encoder}", f"data.tokenizer={encoder}", "data.batch_size=4"]
        common = [f"method={method}", f"save_folder={tmp_path / folder}", "progress_bar=false"]
        return load_recipe(name, [*common, *own, *overrides])

    return recipe
