"""The recipes of language: every row has the published numbers."""

import pytest

from composer_sassha.recipes.config import read_recipe
from composer_sassha.recipes.data.glue import TASKS
from composer_sassha.recipes.files import bundled_recipes
from composer_sassha.recipes.schedulers import Linear
from tests.recipes.published import recipe

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
    found = recipe(name, method)
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
    found = recipe(name, method)
    assert (type(found.optimizer).__name__, list(found.algorithms)) == PARTS[method]
    if method in ("sassha", "msassha") and name != "gpt_text":
        assert found.optimizer.hessian_power == (0.5 if method == "sassha" else 1.0)
