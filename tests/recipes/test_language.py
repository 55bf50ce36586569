"""Language: the models, and how texts become batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from composer_sassha.recipes.config import Recipe
from composer_sassha.recipes.data.text import Text, following, windows
from composer_sassha.recipes.models import GPT, TextClassifier
from tests.recipes.language import VOCABULARY, WORDS

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[nlp]'")


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
