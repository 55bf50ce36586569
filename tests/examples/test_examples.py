"""The examples run as they stand, train, and stay short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import composer_sassha.examples
from composer_sassha.examples import fsdp2, trainer
from tests.distributed.launch import launch

FOLDER = Path(composer_sassha.examples.__file__).parent


@pytest.mark.parametrize("name", ["trainer", "plain_loop", "fsdp2", "huggingface"])
def test_an_example_is_short_and_says_how_it_is_run(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60 and f"-m composer_sassha.examples.{name}\n" in text


@pytest.mark.filterwarnings("ignore:Cannot split tensor of length")
def test_the_trainer_example_learns_the_digits():
    result = trainer.main(epochs=4)
    assert result["accuracy"] > 0.93 and result["lambda_max"] > 0


def test_the_plain_loop_learns_without_composer():
    check = "print('composer' in sys.modules, plain_loop.main(epochs=3), file=sys.stderr)"
    code = f"import sys; from composer_sassha.examples import plain_loop; {check}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    composer_too, accuracy = done.stderr.split()
    assert composer_too == "False" and float(accuracy) > 0.93


@pytest.mark.filterwarnings("ignore:Cannot split tensor of length")
def test_the_language_model_learns_more_than_nothing():
    huggingface = pytest.importorskip("composer_sassha.examples.huggingface")
    assert huggingface.main(batches=40) < 70  # a model that knows nothing has 256


def sharded(out: Path) -> None:
    result = fsdp2.main(epochs=4)
    (out / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


@pytest.mark.xdist_group("launch")
@pytest.mark.skipif(
    torch.__version__ < "2.7" and not torch.cuda.is_available(), reason="FSDP2 on a CPU needs torch 2.7"
)
def test_the_sharded_example_learns_with_half_the_weights_a_rank(tmp_path):
    log = launch(sharded, tmp_path)
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    assert len(results) == 2, log
    assert results[0]["accuracy"] == results[1]["accuracy"] > 0.85
    assert sum(result["held"] for result in results) == pytest.approx(1) and results[0]["held"] < 0.6
