"""Training on texts: metrics, and runs that are stopped and continued."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from composer_sassha.recipes.config import Recipe, load_recipe
from composer_sassha.recipes.results import summary
from composer_sassha.recipes.run import train_recipe
from tests.recipes.runs import same_runs, stopped, weights
from tests.recipes.test_language_recipes import METHODS

pytest.importorskip("transformers", reason="needs transformers: pip install '.[nlp]'")


MEASURED = {
    "gpt_text": ["perplexity", "loss"],
    "glue_stsb": ["pearson", "spearman", "loss"],
    "glue_mrpc": ["accuracy", "f1", "loss"],
    "glue_qqp": ["accuracy", "f1", "loss"],
}
# These rows are trained to compare their metrics with those of other libraries.
COMPARED = [("glue_mrpc", "adamw"), ("glue_stsb", "sassha"), ("glue_mnli", "sassha"), ("gpt_text", "adamw")]


def trained(recipe: Recipe) -> dict[str, Any]:
    """Train two steps, and check what every run of a recipe ends with."""
    results = train_recipe(recipe)
    assert results["steps"] == 2 and math.isfinite(results["loss"])
    assert results["heldout"] == "validation" and results["reported"] is None
    names = ("accuracy", "f1", "pearson", "spearman", "perplexity", "loss")
    measured = [key for key in names if results.get(key) is not None]
    assert measured == MEASURED.get(recipe.name, ["accuracy", "loss"])
    first = summary(recipe, results).splitlines()[0]
    start = f"{recipe.name} {recipe.method} seed 0: validation {measured[0]} "
    assert first.startswith(start) and "nan" not in first
    assert first.endswith(f", validation loss {results['loss']:.4f}")
    return results


def quick(name: str, method: str) -> bool:
    """Whether it trains in every run of the tests: each method once on GLUE, and each task once."""
    return name in ("glue_rte", "gpt_text") or (method == "sassha" and name not in dict(COMPARED))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*row, marks=[] if quick(*row) else pytest.mark.slow)
        for row in METHODS
        if row not in COMPARED
    ],
)
def test_every_method_trains(name: str, method: str, small: Callable[..., Recipe]) -> None:
    recipe = small(name, method, "max_duration=2ba")
    results = trained(recipe)
    if name == "glue_qqp":
        written = json.loads((recipe.folder / "results.json").read_text())
        assert written["metrics"] == ["MulticlassAccuracy", "BinaryF1Score", "LanguageCrossEntropy"]
        record = json.loads((recipe.folder / "metrics.jsonl").read_text().splitlines()[-1])
        logged = {f"metrics/validation/{name}" for name in written["metrics"]}
        assert logged <= record.keys() and record["metrics/validation/BinaryF1Score"] == results["f1"]


@pytest.mark.parametrize("name", ["glue_stsb", "gpt_text"])
def test_a_continued_run_and_a_repeated_one_equal_the_first(
    name: str, small: Callable[..., Recipe], tmp_path: Path
) -> None:
    # SqueezeBERT's dropout stays on; the text's windows are shuffled anew in the second epoch.
    settings = ["max_duration=6ba", "save_interval=2ba", "eval_interval=3ba"]
    settings += ["data.batch_size=8"] if "glue" in name else ["data.batch_size=56", "model.dropout=0.1"]
    whole, parts = (small(name, "sam_adamw", *settings, folder=folder) for folder in ("whole", "parts"))
    train_recipe(whole)
    stopped(parts, ("batch_end", 3), ("batch_start", 5))
    train_recipe(parts)
    same_runs(whole, parts)
    again = load_recipe(whole.folder / "config.yaml", [f"save_folder={tmp_path / 'again'}"])
    train_recipe(again)
    same_runs(whole, again)


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save")
@pytest.mark.parametrize(("name", "method"), COMPARED)
def test_the_metrics_are_those_of_other_libraries(
    name: str, method: str, small: Callable[..., Recipe]
) -> None:
    recipe = small(name, method, "max_duration=2ba")
    results = trained(recipe)
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
