"""Language: what is refused, and what is said then."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.data import Digits
from composer_sassha.recipes.errors import ConfigError
from composer_sassha.recipes.hub import fetched
from composer_sassha.recipes.models import GPT, ResNetCIFAR
from composer_sassha.recipes.run import train_recipe
from tests.recipes.language import VOCABULARY

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[nlp]'")


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
