"""Language: GLUE's tasks with an encoder, and a GPT on a text file."""

import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from composer_sassha.recipes.config import Recipe, load_recipe, read_recipe
from composer_sassha.recipes.data import Digits
from composer_sassha.recipes.data.glue import TASKS
from composer_sassha.recipes.data.text import Text, following, windows
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.files import bundled_recipes
from composer_sassha.recipes.hub import fetched
from composer_sassha.recipes.models import GPT, ResNetCIFAR, TextClassifier
from composer_sassha.recipes.results import summary
from composer_sassha.recipes.run import train_recipe
from composer_sassha.recipes.schedulers import Linear
from tests.recipes.runs import Stop, same_runs, weights

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[nlp]'")

# What the authors' commands say: learning rate, weight decay, rho, eps, refresh interval, the threshold that
# clips, and epochs. - stands for what a command leaves to its default.
SETTINGS = """
glue_rte:
  adahessian 1e-3   1e-6  -     1e-4  1   -     10
  adamw      1e-2   1e-8  -     1e-8  -   -     10
  msassha    1e-2   1e-6  1e-3  1e-8  1   -     10
  sam_adamw  1e-4   1e-7  1e-3  1e-6  -   -     10
  sassha     1e-2   1e-4  1e-2  1e-4  1   -     10
  sophia_h   1e-5   1e-4  -     1e-4  1   1e-5  10
glue_mrpc:
  adahessian 1e-2   1e-6  -     1e-4  1   -     5
  adamw      1e-4   1e-7  -     1e-4  -   -     10
  msassha    1e-2   1e-8  1e-5  1e-4  1   -     5
  sam_adamw  1e-5   1e-7  1e-4  1e-6  -   -     10
  sassha     1e-2   1e-8  1e-4  1e-4  1   -     5
  sophia_h   1e-5   1e-6  -     1e-6  1   1e-2  5
glue_stsb:
  adahessian 1e-2   1e-6  -     1e-4  1   -     10
  adamw      1e-5   1e-5  -     1e-8  -   -     10
  msassha    1e-3   1e-5  1e-5  1e-4  1   -     10
  sam_adamw  1e-4   1e-7  1e-3  1e-6  -   -     10
  sassha     1e-2   1e-5  1e-2  1e-8  1   -     10
  sophia_h   1e-5   1e-5  -     1e-6  1   1e-4  10
glue_sst2:
  adahessian 1e-3   1e-6  -     1e-8  1   -     5
  adamw      1e-5   1e-8  -     1e-8  -   -     5
  msassha    1e-2   1e-6  1e-4  1e-8  1   -     5
  sam_adamw  1e-5   1e-5  1e-2  1e-8  -   -     5
  sassha     1e-2   1e-8  1e-4  1e-6  1   -     5
  sophia_h   1e-5   0     -     1e-6  1   1e-4  5
glue_qnli:
  adahessian 1e-3   1e-7  -     1e-4  1   -     5
  adamw      1e-5   1e-7  -     1e-8  -   -     5
  msassha    1e-2   1e-6  1e-5  1e-2  1   -     5
  sam_adamw  1e-5   1e-7  1e-2  1e-8  -   -     5
  sassha     1e-2   1e-7  1e-2  1e-6  1   -     5
  sophia_h   1e-5   1e-7  -     1e-4  1   1e-2  5
glue_qqp:
  adahessian 1e-2   1e-7  -     1e-4  1   -     5
  adamw      1e-5   1e-6  -     1e-6  -   -     5
  msassha    1e-2   1e-6  1e-5  1e-4  1   -     5
  sam_adamw  1e-4   1e-6  1e-2  1e-6  -   -     5
  sassha     1e-2   1e-6  1e-2  1e-4  1   -     5
  sophia_h   1e-5   1e-6  -     1e-4  1   0.1   5
glue_mnli:
  adahessian 1e-3   1e-6  -     1e-6  1   -     5
  adamw      1e-5   1e-6  -     1e-6  -   -     5
  msassha    1e-2   1e-6  1e-2  1e-2  1   -     5
  sam_adamw  1e-5   1e-6  1e-2  1e-6  -   -     5
  sassha     1e-2   1e-6  1e-2  1e-6  1   -     5
  sophia_h   1e-5   0     -     1e-6  1   1e-4  5
"""


def published() -> dict[tuple[str, str], list[float | None]]:
    """The numbers of `SETTINGS` by recipe and method."""
    found, recipe = {}, ""
    for line in SETTINGS.strip().splitlines():
        first, *rest = line.split()
        if rest:
            found[recipe, first] = [None if value == "-" else float(value) for value in rest]
        else:
            recipe = first.removesuffix(":")
    return found


PUBLISHED = published()
GPT_METHODS = ["adamw", "sam_adamw", "adahessian", "sophia_h", "sophia_g", "sassha", "msassha"]
PARTS = {
    "adamw": ("AdamW", []),
    "sam_adamw": ("AdamW", ["sam"]),
    "adahessian": ("AdaHessian", ["lazy_hessian"]),
    "sophia_h": ("Sophia", ["lazy_hessian"]),
    "sophia_g": ("Sophia", ["lazy_hessian"]),
    "sassha": ("SASSHA", ["sassha"]),
    "msassha": ("SASSHA", ["msassha"]),
}
METHODS = [*PUBLISHED, *(("gpt_text", method) for method in GPT_METHODS)]


def test_every_method_of_every_recipe_is_listed_here() -> None:
    names = [name for name in bundled_recipes() if name.startswith(("glue", "gpt"))]
    assert {(name, method) for name in names for method in read_recipe(name)[1]} == {*METHODS}
    assert {*names} == {"gpt_text", *(f"glue_{task}" for task in TASKS)}


@pytest.mark.parametrize(("name", "method"), PUBLISHED)
def test_a_method_has_the_published_settings(name: str, method: str) -> None:
    lr, decay, rho, eps, interval, threshold, epochs = PUBLISHED[name, method]
    found = load_recipe(name, [f"method={method}"])
    optimizer, algorithms = found.optimizer, found.algorithms
    assert lr is not None and decay is not None
    assert (optimizer.lr, optimizer.eps) == (lr, eps)
    assert optimizer.weight_decay == pytest.approx(decay / lr, rel=1e-9)
    assert optimizer.betas == (0.9, 0.999)
    assert getattr(optimizer, "clip_threshold", None) == threshold
    assert [a.rho for a in algorithms.values() if hasattr(a, "rho")] == ([] if rho is None else [rho])
    if interval is not None:
        (algorithm,) = algorithms.values()
        assert getattr(algorithm, "hessian_interval", algorithm.interval) == interval
    assert (found.name, found.max_duration, found.data.batch_size) == (name, f"{epochs:.0f}ep", 16)
    assert found.schedulers == Linear() and found.reported is None
    task = name.removeprefix("glue_")
    assert found.data.task == task and found.model.outputs == TASKS[task].outputs
    assert found.model.pretrained == found.data.tokenizer == "squeezebert/squeezebert-uncased"


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_a_method_is_what_it_is_called(name: str, method: str) -> None:
    found = load_recipe(name, [f"method={method}"])
    assert (type(found.optimizer).__name__, list(found.algorithms)) == PARTS[method]
    if method in ("sassha", "msassha") and name != "gpt_text":
        assert found.optimizer.hessian_power == (0.5 if method == "sassha" else 1.0)


# Small ones, on the disk as the published ones are

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrst"]
LENGTH = 16
SAMPLES = 24


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SqueezeBERT of two blocks, and its tokenizer."""
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


def quick(name: str, method: str) -> bool:
    """Whether it trains in every run of the tests: each method once on GLUE, and each task once."""
    return name in ("glue_rte", "gpt_text") or method == "sassha"


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*row, marks=[] if quick(*row) else pytest.mark.slow) for row in METHODS],
)
def test_every_method_trains(name: str, method: str, small: Callable[..., Recipe]) -> None:
    recipe = small(name, method, "max_duration=2ba")
    results = train_recipe(recipe)
    assert results["steps"] == 2 and math.isfinite(results["loss"])
    assert results["heldout"] == "validation" and results["reported"] is None
    names = {"gpt_text": ["perplexity", "loss"], "glue_stsb": ["pearson", "spearman", "loss"]}
    names |= {"glue_mrpc": ["accuracy", "f1", "loss"], "glue_qqp": ["accuracy", "f1", "loss"]}
    measured = [
        key
        for key in ("accuracy", "f1", "pearson", "spearman", "perplexity", "loss")
        if results.get(key) is not None
    ]
    assert measured == names.get(name, ["accuracy", "loss"])
    first = summary(recipe, results).splitlines()[0]
    assert first.startswith(f"{name} {method} seed 0: validation {measured[0]} ") and "nan" not in first
    assert first.endswith(f", validation loss {results['loss']:.4f}")


@pytest.mark.parametrize("name", ["glue_stsb", "gpt_text"])
def test_a_continued_run_equals_an_uninterrupted_one_and_so_does_its_repetition(
    name: str, small: Callable[..., Recipe], tmp_path: Path
) -> None:
    # SqueezeBERT's dropout stays on; the text's windows are shuffled anew in the second epoch.
    length = (
        ["max_duration=2ep"]
        if "glue" in name
        else ["max_duration=16ba", "data.batch_size=16", "model.dropout=0.1"]
    )
    settings = [*length, "save_interval=2ba", "eval_interval=3ba"]
    whole, parts = (small(name, "sassha", *settings, folder=folder) for folder in ("whole", "parts"))
    train_recipe(whole)
    for event, batch in [("batch_end", 3), ("batch_start", 8)]:
        with pytest.raises(KeyboardInterrupt):
            train_recipe(parts, [Stop(event, batch)])
    train_recipe(parts)
    same_runs(whole, parts)
    again = load_recipe(whole.folder / "config.yaml", [f"save_folder={tmp_path / 'again'}"])
    train_recipe(again)
    same_runs(whole, again)


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save")
@pytest.mark.parametrize("name", ["glue_mrpc", "glue_stsb", "glue_mnli", "gpt_text"])
def test_the_metrics_are_those_of_other_libraries(name: str, small: Callable[..., Recipe]) -> None:
    recipe = small(name, "adamw", "max_duration=2ba")
    results = train_recipe(recipe)
    model = recipe.model.build().eval()
    model.load_state_dict(weights(recipe))
    _, heldout = recipe.data.build(seed=5)
    logits, labels = [], []
    with torch.no_grad():
        for batch in heldout.dataloader.dataloader:
            logits.append(model(batch)["logits"].flatten(0, -2).double())
            labels.append(batch["labels"].flatten())
    predicted, true = torch.cat(logits), torch.cat(labels)
    if name == "glue_stsb":
        values, wanted = predicted.squeeze(1).numpy(), true.double().numpy()
        expected = {"pearson": pearsonr(values, wanted)[0], "spearman": spearmanr(values, wanted)[0]}
        expected["loss"] = float(((values - wanted) ** 2).mean())
    else:
        loss = float(F.nll_loss(predicted.log_softmax(-1), true))
        expected = {"loss": loss, "perplexity": math.exp(loss)} if name == "gpt_text" else {"loss": loss}
    if name in ("glue_mrpc", "glue_mnli"):
        classes = predicted.argmax(1).numpy()
        expected["accuracy"] = accuracy_score(true, classes)
        if name == "glue_mrpc":
            expected["f1"] = f1_score(true, classes)
            assert 0 < expected["f1"] != expected["accuracy"]
    for key, value in expected.items():
        assert results[key] == pytest.approx(value, rel=1e-5), key


# Models


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (TextClassifier(pretrained=None).build, 51.1),  # Iandola et al. 2020, table 2
        (GPT().build, 124.4),  # GPT-2 small, as released
        (GPT(24, 16, 1024).build, 354.8),  # and medium
    ],
    ids=["squeezebert", "gpt2", "gpt2-medium"],
)
def test_models_are_as_large_as_published(build: Callable[[], torch.nn.Module], millions: float) -> None:
    with torch.device("meta"):  # without memory for the weights
        model = build()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_gpt_does_not_see_what_follows() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, heads=2, width=8, context=6, vocab_size=5).build().eval()
    ids = torch.randint(5, (1, 6))
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % 5
    before, after = (model({"input_ids": x, "labels": x})["logits"][0] for x in (ids, other))
    assert torch.equal(before[:4], after[:4]) and not torch.allclose(before[4:], after[4:])


def test_the_encoder_begins_with_the_pretrained_weights(encoder: Path) -> None:
    built = TextClassifier(str(encoder), outputs=3).build().network.transformer.state_dict()
    saved = transformers.SqueezeBertModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(built[name], value) for name, value in saved.items())


# Data


def test_padding_does_not_change_what_is_predicted(encoder: Path, small: Callable[..., Recipe]) -> None:
    recipe = small("glue_rte", "adamw")
    _, heldout = recipe.data.build(seed=0)
    model = recipe.model.build().eval()
    loader = heldout.dataloader.dataloader
    rows = [loader.dataset[i] for i in range(8)]
    together = model(loader.collate_fn(rows))["logits"]
    alone = torch.cat([model(loader.collate_fn([row]))["logits"] for row in rows])
    assert len({len(row["sentence1"]) for row in rows}) > 1
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_both_sentences_are_read_and_long_ones_are_cut(small: Callable[..., Recipe], encoder: Path) -> None:
    recipe = small("glue_qnli", "adamw", "data.max_length=8")
    loader, _ = recipe.data.build(seed=0)
    rows = [
        {"question": "a b", "sentence": "c", "label": 1},
        {"question": "a", "sentence": "b " * 9, "label": 0},
    ]
    batch = loader.collate_fn(rows)
    word = {name: i for i, name in enumerate(WORDS)}
    expected = [
        ["[CLS]", "a", "b", "[SEP]", "c", "[SEP]", "[PAD]", "[PAD]"],
        ["[CLS]", "a", "[SEP]", *"bbbb", "[SEP]"],
    ]
    assert batch["input_ids"].tolist() == [[word[name] for name in row] for row in expected]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64


def test_every_character_is_predicted_once_in_an_epoch(text: Path) -> None:
    content = text.read_bytes().decode()
    tokens, vocabulary = Text(str(text)).read()
    assert "".join(chr(vocabulary[token]) for token in tokens) == content
    assert vocabulary == sorted(set(vocabulary)) and len(vocabulary) == VOCABULARY
    data = Text(str(text), context=7, batch_size=3)
    loader, heldout = data.build(seed=0)
    for part, dataset in (
        (tokens[:1800], loader.dataset),
        (tokens[1800:], heldout.dataloader.dataloader.dataset),
    ):
        batch = following(list(dataset))
        predicted = batch["labels"].flatten()
        assert torch.equal(predicted, part[1 : len(predicted) + 1]) and len(part) - len(predicted) <= 7
        assert torch.equal(batch["input_ids"].flatten(), part[: len(predicted)])


def test_bytes_are_tokens_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 2)
    data = Text(str(tmp_path / "file"), tokens="bytes", context=16, batch_size=2)
    tokens, vocabulary = data.read()
    assert tokens.tolist() == [*range(256)] * 2 and vocabulary == [*range(256)]
    assert data.model_settings() == {"vocab_size": 256, "context": 16}


def test_a_text_shorter_than_a_window_has_none() -> None:
    assert windows(torch.arange(3), context=3).shape == (0, 4)
    assert windows(torch.arange(4), context=3).shape == (1, 4)


# Mistakes


@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        ("gpt_text", ["model.vocab_size=9"], ["model.vocab_size=9", f"set model.vocab_size={VOCABULARY}"]),
        ("gpt_text", ["data.tokens=bytes"], [f"model.vocab_size={VOCABULARY}", "set model.vocab_size=256"]),
        ("gpt_text", ["data.context=4"], ["model.context=8", "set model.context=4"]),
        (
            "gpt_text",
            ["data.root=no/such.txt"],
            ["data: root=no/such.txt", "No such file", "curl -o no/such.txt"],
        ),
        ("gpt_text", ["data.root=."], ["data: root=.: Is a directory"]),
        ("gpt_text", ["data.root={binary}"], ["is not UTF-8", "tokens=bytes"]),
        ("gpt_text", ["data.root={short}"], ["has 50 tokens", "context=8", "at least 90"]),
        ("gpt_text", ["data.batch_size=300"], ["batch_size=300", "training split (224)"]),
        ("gpt_text", ["data.tokens=words"], ["data.tokens=words", "characters, bytes"]),
        ("gpt_text", ["model.heads=3"], ["model: heads=3 does not divide width=8"]),
        ("glue_rte", ["model.outputs=3"], ["model.outputs=3", "set model.outputs=2"]),
        ("glue_rte", ["data.task=rtf"], ["data.task=rtf", "did you mean rte?"]),
        (
            "glue_rte",
            ["data.task=qnli"],
            ["data: root=", "no split train with label, question, sentence", "task=qnli"],
        ),
        ("glue_rte", ["data.max_length=17"], ["data: max_length=17", "at most 16"]),
        (
            "glue_rte",
            ["data.root=no/such"],
            ["task=rte, root=no/such", "save_to_disk('FOLDER')", "root=FOLDER"],
        ),
        ("glue_rte", ["data.root={nothing}"], ["task=rte, root=", "cannot be loaded", "root=FOLDER"]),
        (
            "glue_rte",
            ["data.tokenizer={nothing}"],
            ["data: tokenizer=", "cannot be loaded", "save_pretrained"],
        ),
        (
            "glue_rte",
            ["model.pretrained={nothing}"],
            ["model: pretrained=", "cannot be loaded", "save_pretrained"],
        ),
        (
            "glue_rte",
            ["model.pretrained={half}"],
            ["model: pretrained=", "cannot be loaded", "save_pretrained"],
        ),
        (
            "glue_rte",
            ["model.pretrained=/no/such"],
            ["model: pretrained=/no/such", "huggingface-cli", "pretrained=FOLDER"],
        ),
        ("glue_rte", ["model.pretrained=~nobody/x"], ["model: pretrained=~nobody/x", "cannot be loaded"]),
        ("gpt_text", ["data.root=~nobody/x"], ["data: root=~nobody/x"]),
        ("gpt_text", ["data.root={empty}", "data.tokens=bytes"], ["empty: has 0 tokens"]),
        ("gpt_text", ["algorithms.label_smoothing.smoothing=0.1"], ["algorithms.label_smoothing", "=null"]),
        ("glue_rte", ["data.root={mrpc}"], ["not those of task=rte (entailment, not_entailment)"]),
        ("glue_rte", ["data.root={stsb}"], ["not those of task=rte"]),
        ("glue_stsb", ["data.root={mrpc}"], ["not those of task=stsb (numbers)"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else None,
)
def test_a_mistake_is_one_line_and_writes_nothing(
    name: str,
    overrides: list[str],
    parts: list[str],
    small: Callable[..., Recipe],
    encoder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 500)
    (tmp_path / "short").write_text("to be or not to be that is the question of a life."[:50])
    (tmp_path / "empty").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "half").mkdir()
    for file in encoder.iterdir():
        content = file.read_bytes()
        (tmp_path / "half" / file.name).write_bytes(content[:99] if "safetensors" in file.name else content)
    paths = {key: str(tmp_path / key) for key in ("binary", "short", "empty", "nothing", "half")}
    for task in ("mrpc", "stsb") if name.startswith("glue") else ():
        paths[task] = str(request.getfixturevalue("glue")(task))
    before = {*tmp_path.rglob("*")}
    with pytest.raises(ConfigError) as refused:
        train_recipe(small(name, "adamw", *(override.format(**paths) for override in overrides)))
    message = str(refused.value)
    assert all(part in message for part in parts) and "\n" not in message, message
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("gpt_text", {"model": ResNetCIFAR()}, "model.name=resnet_cifar: is not for data.name=text"),
        ("glue_rte", {"model": GPT()}, "model.name=gpt: is not for data.name=glue"),
        ("gpt_text", {"data": Digits()}, "model: it does not fit the data: it takes texts, such as"),
    ],
)
def test_a_model_for_other_data_is_refused(
    name: str, parts: dict[str, Any], message: str, small: Callable[..., Recipe]
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_recipe(replace(small(name, "adamw"), **parts))


@pytest.mark.parametrize(
    ("package", "name", "place"),
    [
        ("transformers", "gpt_text", "model"),
        ("transformers", "glue_rte", "data"),
        ("datasets", "glue_rte", "data"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, name: str, place: str, small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(name, "adamw")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{place}: needs {package}; pip install 'composer_sassha\[nlp\]'"):
        train_recipe(recipe)


def test_what_the_hub_says_of_its_attempts_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub.utils")

    def load() -> None:
        logger.warning("attempt 1 of 6")
        raise ConnectionError("no network\nand more")

    with pytest.raises(ValueError, match=r"root=x: cannot be loaded \(no network and more\); go"):
        fetched(load, "root=x", "go")
    assert caplog.records == []
    logger.warning("again")
    assert [record.message for record in caplog.records] == ["again"]


def test_results_say_what_ranks(small: Callable[..., Recipe]) -> None:
    recipe = small("glue_qqp", "adamw", "max_duration=2ba")
    train_recipe(recipe)
    results = json.loads((recipe.folder / "results.json").read_text())
    assert results["metrics"] == ["MulticlassAccuracy", "BinaryF1Score", "LanguageCrossEntropy"]
    record = json.loads((recipe.folder / "metrics.jsonl").read_text().splitlines()[-1])
    logged = {f"metrics/validation/{name}" for name in results["metrics"]}
    assert logged <= record.keys() and record["metrics/validation/BinaryF1Score"] == results["f1"]
