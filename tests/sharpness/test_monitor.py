"""The monitor in a Trainer: what it logs, when, and that the training does not notice."""

import json
import math

import pytest
import torch
from composer.core import DataSpec, Evaluator
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger
from composer.utils import MissingConditionalImportError
from composer.utils.parallelism import FSDP2Config
from torch.utils.data import DataLoader, DistributedSampler

from composer_sassha import SharpnessMonitor
from composer_sassha.callbacks import sharpness_monitor as module
from composer_sassha.callbacks.batches import take
from composer_sassha.common.validate import SettingError
from composer_sassha.recipes.config import load_recipe
from composer_sassha.recipes.run import train_recipe
from composer_sassha.sharpness import Measures, measure, objective_of, spectrum, undisturbed
from tests.distributed.launch import assert_passed, launch, launches
from tests.helpers import Injected, assert_same, copied, everything, images, method_trainer, network, trainer
from tests.methods import NAMED, sgd
from tests.sharpness.worker import CHECKS, main

# The last batch of an evaluation is smaller than the others.
pytestmark = pytest.mark.filterwarnings("ignore:Cannot split tensor of length")

QUICK = Measures(eigenvalues=2, trace_samples=2, m=(4,), directions=2)
NAMES = {"loss", "full_grad_norm", "surrogate_gap", "gap_eigenvalue", "sam", "asam", "average"}
NAMES |= {"average_error", "m4", "lambda_1", "lambda_2", "lambda_max", "trace", "trace_error", "seconds"}


def loader(count=20, batch_size=7):
    return DataLoader(images(count), batch_size=batch_size)


def monitor(**settings):
    return SharpnessMonitor(**{"interval": "3ba", "measures": QUICK} | settings)


def logged(log, name):
    """What was logged under a name, by the step it was logged at."""
    return {int(time.batch): value for time, value in log.data.get(name, [])}


@pytest.mark.parametrize(
    "name",
    [
        "sassha",
        "msassha",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sam_sgd", "gsam_adamw")),
    ],
)
def test_the_monitor_changes_no_run_resumed_or_not(name, tmp_path):
    ends = []

    def end_of(**settings):
        done = method_trainer(NAMED[name], eval_dataloader=loader(), **settings)
        done.fit()
        ends.append(everything(done))
        done.close()

    watching = lambda: [monitor(spectrum_epochs=[1], spectrum_steps=3)]  # noqa: E731 - one for each run
    end_of()
    end_of(callbacks=watching(), save_folder=str(tmp_path), save_interval="6ba")
    end_of(callbacks=watching(), load_path=f"{tmp_path}/ep1-ba6-rank0.pt")
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_a_measurement_before_the_checkpoint_is_not_repeated(tmp_path):
    """The fourth step ends an epoch and the training: each would be a reason to measure."""
    settings = {"eval_dataloader": loader(), "max_duration": "1ep"}
    saving = {"save_folder": str(tmp_path), "save_interval": "4ba"}
    logs = [InMemoryLogger(), InMemoryLogger()]
    for log, more in zip(logs, (saving, {"load_path": f"{tmp_path}/ep0-ba4-rank0.pt"}), strict=True):
        done = trainer(sgd, **settings, callbacks=[monitor(interval="4ba")], loggers=log, **more)
        done.fit()
        done.close()
    assert [list(logged(log, "sharpness/sam")) for log in logs] == [[4], []]


def test_what_is_logged_is_what_measuring_gives():
    log, data = InMemoryLogger(), loader()
    model = network()
    done = trainer(sgd, model=model, eval_dataloader=data, callbacks=[monitor(batches=2)], loggers=log)
    done.fit()
    taken = [(batch, len(batch[1])) for batch in list(data)[:2]]
    assert [count for _, count in taken] == [7, 7]
    with undisturbed(model):
        exact = measure(objective_of(model, taken), QUICK)
    found = {name: logged(log, f"sharpness/{name}") for name in NAMES}
    assert all(sorted(values) == [3, 6, 8] for values in found.values())  # every third, and the end
    assert exact == {name: found[name][8] for name in exact} and exact.keys() == NAMES - {"seconds"}
    assert found["lambda_max"][8] == found["lambda_1"][8] >= found["lambda_2"][8]
    assert found["sam"][8] == found["surrogate_gap"][8]
    assert found["gap_eigenvalue"][8] == pytest.approx(2 * found["sam"][8] / 0.05**2)
    done.close()


def test_the_spectrum_is_logged_at_the_chosen_epochs():
    tables = []

    class Tables(InMemoryLogger):
        def log_table(self, columns, rows, name="Table", step=None):
            tables.append((step, name, columns, rows))

    class Lacking(InMemoryLogger):
        def log_table(self, columns, rows, name="Table", step=None):
            raise MissingConditionalImportError("pandas", "pandas")

    settings = {"spectrum_epochs": [2], "spectrum_steps": 5, "spectrum_probes": 3, "interval": "9ep"}
    settings["measures"] = Measures(eigenvalues=0, trace_samples=0, m=(), directions=0, seed=3)
    callback = monitor(**settings)
    done = trainer(sgd, eval_dataloader=loader(), callbacks=[callback], loggers=[Lacking(), Tables()])
    with pytest.warns(UserWarning, match="Lacking needs pandas"):
        done.fit()
    ((step, name, columns, rows),) = tables
    assert (step, name, columns) == (8, "sharpness/spectrum", ["eigenvalue", "weight"])
    assert len(rows) == 15 and sum(weight for _, weight in rows) == pytest.approx(1)
    (found,) = callback.spectra.values()
    assert rows == [list(row) for row in zip(found.eigenvalues, found.weights, strict=True)]
    with undisturbed(done.state.model):
        objective = objective_of(done.state.model, [(b, len(b[1])) for b in loader()])
        exact = spectrum(objective, 5, 3, seed=3)
    assert (found.eigenvalues == exact.eigenvalues).all() and 2 in callback.spectra
    done.close()


@pytest.mark.parametrize(
    ("interval", "duration", "steps"),
    [("1ep", "2ep", [4, 8]), ("2ep", "3ep", [8, 12]), ("5ba", "7ba", [5, 7]), ("1ep", "8ba", [4, 8])],
)
def test_it_measures_at_its_interval_and_once_at_the_end(interval, duration, steps):
    log = InMemoryLogger()
    measures = Measures(eigenvalues=0, trace_samples=0, m=(), directions=0)
    callback = SharpnessMonitor(interval, measures=measures)
    done = trainer(sgd, eval_dataloader=loader(), callbacks=[callback], loggers=log, max_duration=duration)
    done.fit()
    assert [int(time.batch) for time, _ in log.data["sharpness/sam"]] == steps
    done.close()


def test_a_run_logs_it_before_the_evaluation_of_the_same_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["method=sgd", "max_duration=1ep", "model.width=2", "progress_bar=false"]
    recipe = load_recipe("digits", settings)
    train_recipe(
        recipe, [SharpnessMonitor(measures=Measures(eigenvalues=1, trace_samples=0, m=(), directions=0))]
    )
    lines = (recipe.folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "sharpness/lambda_max" in record]
    assert [(r["batch"], r["epoch"]) for r in records] == [(11, 1)]
    evaluations = [record for record in map(json.loads, lines) if "metrics/test/CrossEntropy" in record]
    assert [(r["batch"], r["epoch"]) for r in evaluations] == [(11, 1)]
    for measured, evaluated in zip(records, evaluations, strict=True):
        assert measured["sharpness/loss"] == pytest.approx(evaluated["metrics/test/CrossEntropy"], rel=1e-5)


def test_time_that_is_over_ends_the_measurement(monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    found = {}
    for seconds in (1e-9, 14, 10**6):
        log = InMemoryLogger()
        settings = {"interval": "9ep", "max_seconds": seconds}
        done = trainer(
            sgd, eval_dataloader=loader(), callbacks=[monitor(**settings)], loggers=log, max_duration="1ep"
        )
        done.fit()
        found[seconds] = {key.removeprefix("sharpness/") for key in log.data if key.startswith("sharpness/")}
        assert logged(log, "sharpness/seconds")[4] > 0
        done.close()
    assert found[1e-9] == {"seconds"}
    # One second passes at each evaluation: the cheap ones come first.
    assert {"loss", "sam", "asam"} < found[14] < found[10**6] == NAMES and "lambda_max" not in found[14]


@pytest.mark.parametrize("when", [1, 8, 30])
def test_an_exception_while_it_measures_leaves_the_model_as_it_was(when, monkeypatch):
    done = trainer(sgd, eval_dataloader=loader(), callbacks=[monitor(interval="1ep")])
    calls, seen = 0, {}
    model = done.state.model
    plain = module.objective_of

    def failing(*arguments, **settings):
        objective = plain(*arguments, **settings)
        loss = objective.loss_of

        def loss_of(batch):
            nonlocal calls
            calls += 1
            if calls == when:
                raise Injected
            return loss(batch)

        objective.loss_of = loss_of
        return objective

    monkeypatch.setattr(module, "objective_of", failing)
    entered = module.undisturbed

    def remember(*arguments):
        seen["before"] = everything(done), [m.training for m in model.modules()]
        return entered(*arguments)

    monkeypatch.setattr(module, "undisturbed", remember)
    with pytest.raises(Injected):
        done.fit()
    assert_same(seen["before"], (everything(done), [m.training for m in model.modules()]))
    done.close()


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_batch_norm_normalizes_as_is_chosen(batch_statistics):
    log, model = InMemoryLogger(), network()
    callbacks = [monitor(batch_statistics=batch_statistics)]
    done = trainer(sgd, model=model, eval_dataloader=loader(20, 20), callbacks=callbacks, loggers=log)
    done.fit()
    exact = {}
    for chosen in (False, True):
        with undisturbed(model, chosen):
            exact[chosen] = objective_of(model, [(images(20).tensors, 20)]).loss()
    assert exact[False] != pytest.approx(exact[True], rel=1e-3)
    assert logged(log, "sharpness/loss")[8] == pytest.approx(exact[batch_statistics], rel=1e-6)
    done.close()


def test_the_first_evaluation_data_are_taken_once():
    """Also where training goes on with another call, and the loader has another order by then."""
    shuffled, other = DataLoader(images(20), batch_size=5, shuffle=True), loader(7)
    evaluators = [Evaluator(label=n, dataloader=d) for n, d in (("first", shuffled), ("other", other))]
    callback = monitor(batches=2)
    done = trainer(sgd, eval_dataloader=evaluators, callbacks=[callback], max_duration="1ep")
    done.fit()
    before = copied(callback._taken)
    assert [count for _, count in before] == [5, 5]
    done.fit(duration="1ep")
    assert_same(before, copied(callback._taken))
    done.close()


@pytest.mark.parametrize(("samples", "ranks"), [(7, 3), (7, 2), (8, 2), (2, 5)])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_samples_that_a_sampler_repeats_count_once(samples, ranks, batch_size):
    data, seen = images(samples), []
    for rank in range(ranks):
        sampler = DistributedSampler(data, ranks, rank, shuffle=True)
        assert len(sampler) * ranks >= samples
        taken = take(DataSpec(DataLoader(data, batch_size, sampler=sampler)), None, DeviceCPU())
        assert taken, "every rank takes part"
        for (x, y), count in taken:
            assert len(x) == len(y) == max(count, 1)
            seen += [image.flatten().tolist() for image in x[:count]]
    assert sorted(seen) == sorted(image.flatten().tolist() for image in data.tensors[0])


def test_batches_that_a_data_set_has_made_are_taken_whole():
    batches = [(torch.zeros(5, 1), torch.zeros(5)), (torch.ones(4, 1), torch.ones(4))]
    loader = DataLoader(batches, batch_size=None, sampler=DistributedSampler(batches, 1, 0, shuffle=False))
    assert [count for _, count in take(DataSpec(loader), None, DeviceCPU())] == [5, 4]


def test_a_diverged_run_logs_its_loss_alone():
    log, model = InMemoryLogger(), network()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    done = trainer(sgd, model=model, eval_dataloader=loader(), callbacks=[monitor()], loggers=log)
    done.fit()
    names = {name.removeprefix("sharpness/") for name in log.data if name.startswith("sharpness/")}
    assert names <= {"loss", "average", "average_error", "seconds"}
    assert math.isnan(logged(log, "sharpness/loss")[8])
    done.close()


def test_the_loader_of_the_user_wins_and_its_transforms_are_applied():
    log = InMemoryLogger()
    doubled = DataSpec(loader(4, 4), batch_transforms=lambda batch: (2 * batch[0], batch[1]))
    model = network()
    done = trainer(
        sgd, model=model, eval_dataloader=loader(), callbacks=[monitor(dataloader=doubled)], loggers=log
    )
    done.fit()
    x, y = images(4).tensors
    with undisturbed(model):
        exact = objective_of(model, [((2 * x, y), 4)]).loss()
    assert logged(log, "sharpness/loss")[8] == pytest.approx(exact, rel=1e-6)
    done.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": "soon"}, "interval='soon'"),
        ({"interval": "0ep"}, "interval='0ep'"),
        ({"interval": "-1ba"}, "interval='-1ba'"),
        ({"batches": 0}, "batches=0"),
        ({"measures": 3}, "measures=3"),
        ({"max_seconds": 0}, "max_seconds=0"),
        ({"spectrum_epochs": [0]}, "spectrum_epochs=0"),
        ({"spectrum_steps": 0}, "spectrum_steps=0"),
        ({"batch_statistics": 1}, "batch_statistics=1"),
    ],
)
def test_arguments_that_are_not_allowed(settings, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        SharpnessMonitor(**settings)
    assert "\n" not in str(caught.value) and "SharpnessMonitor" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"eigenvalues": -1},
        {"tol": 0},
        {"trace_samples": 1},
        {"directions": 1},
        {"rho": 0},
        {"m": 16},
        {"m": (0,)},
        {"ascent_steps": 0},
        {"asam_rho": -0.1},
        {"seed": -1},
    ],
)
def test_measures_that_are_not_allowed(settings):
    (name,) = settings
    with pytest.raises((TypeError, ValueError), match=f"{name}=") as caught:
        Measures(**settings)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_measured_is_refused_at_the_start():
    done = trainer(sgd, callbacks=[monitor()])
    with pytest.raises(ValueError, match="no evaluation data"):
        done.fit()
    done.close()
    done = trainer(sgd, model=network().bfloat16(), eval_dataloader=loader(), callbacks=[monitor()])
    with pytest.raises(SettingError, match=r"torch\.bfloat16 are too coarse"):
        done.fit()
    done.close()
    done = trainer(sgd, eval_dataloader=loader(), callbacks=[monitor()])
    done.state.fsdp_config = FSDP2Config()
    with pytest.raises(ValueError, match="FSDP"):
        monitor().fit_start(done.state, done.logger)
    done.close()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    return out, launch(main, out)


@launches
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check, on_two_ranks):
    assert_passed(check, *on_two_ranks)
