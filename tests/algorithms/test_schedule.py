"""Schedules of hyperparameters through the Trainer."""

import copy
import math

import pytest
import torch
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.optim import CosineAnnealingScheduler, LinearScheduler, LinearWithWarmupScheduler
from torch.optim.lr_scheduler import OneCycleLR

from composer_sassha import (
    ESAM,
    GSAM,
    SAM,
    SASSHA,
    ClosureGradScaler,
    FollowLR,
    LazyHessian,
    Sassha,
    Schedule,
    SharpnessAwareOptimizer,
)
from composer_sassha.perturbations import SAMPerturbation
from tests.helpers import Spy, assert_same, everything, network, trainer
from tests.methods import adahessian, sassha, sgd

# Composer steps its learning rate schedulers before it counts the batch: the rate is one batch behind.
LR_STEPS = [0, 0, 1, 2, 3, 4, 5, 6]


def seen(read, optimizer, algorithms, **settings):
    """What `read` finds in the wrapped optimizer during each of eight steps."""
    values = []

    def look(event, state, passes):
        if event == Event.BEFORE_FORWARD and passes == 1:
            values.append(read(state.optimizers[0]))

    run = trainer(optimizer, algorithms, callbacks=[Spy(look)], **settings)
    run.fit()
    run.close()
    return values


def test_rho_follows_a_composer_scheduler():
    algorithms = [SAM(rho=0.4), Schedule("rho", LinearScheduler(alpha_f=0.5))]
    values = seen(lambda optimizer: optimizer.perturbation.rho, sgd, algorithms)
    assert values == pytest.approx([0.4 * (1 - t / 16) for t in range(8)])
    assert algorithms[0].perturbation.rho == 0.4, "the algorithm can serve another Trainer"


def test_the_power_of_the_hessian_rises_as_the_learning_rate_falls():
    values = seen(
        lambda optimizer: optimizer.param_groups[0]["hessian_power"],
        sassha,
        [Schedule("hessian_power", FollowLR(alpha_f=2.0)), Sassha(rho=0.1)],
        schedulers=CosineAnnealingScheduler(),
    )
    cosine = [(1 + math.cos(math.pi * t / 8)) / 2 for t in LR_STEPS]
    assert values == pytest.approx([0.5 + 0.5 * (1 - c) for c in cosine])


def test_every_parameter_group_has_its_own():
    def grouped(params):
        first, *rest = params
        groups = [{"params": [first], "weight_decay": 0.4}, {"params": rest}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.2)

    values = seen(
        lambda optimizer: [group["weight_decay"] for group in optimizer.param_groups],
        grouped,
        [Schedule("weight_decay", LinearScheduler(alpha_f=0.0)), SAM()],
    )
    assert values == [pytest.approx([0.4 * (1 - t / 8), 0.2 * (1 - t / 8)]) for t in range(8)]


def with_group(optimizer, extra, decay, first=False):
    added = {**optimizer.param_groups[0], "params": [extra], "weight_decay": decay}
    kept = [*optimizer.param_groups]
    optimizer.param_groups = [added, *kept] if first else [*kept, added]


def without_first_group(optimizer, extra):
    optimizer.param_groups = optimizer.param_groups[1:]


def new_lists(optimizer, extra):  # as LayerFreezing makes them
    for group in optimizer.param_groups:
        group["params"] = [*group["params"]]


# What happens to the groups in the middle of a run, and from where they start afterwards.
EDITS = {
    "added": (
        lambda optimizer, extra: optimizer.add_param_group({"params": [extra], "lr": 0.01}),
        [0.4, 0.2, 0.2],
    ),
    "inserted": (lambda optimizer, extra: with_group(optimizer, extra, 0.8, first=True), [0.8, 0.4, 0.2]),
    "appended": (lambda optimizer, extra: with_group(optimizer, extra, 0.8), [0.4, 0.2, 0.8]),
    "removed": (without_first_group, [0.2]),
    "reloaded": (
        lambda optimizer, extra: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        [0.4, 0.2],
    ),
    "frozen": (new_lists, [0.4, 0.2]),
}


@pytest.mark.parametrize(("edit", "starts"), EDITS.values(), ids=EDITS)
def test_groups_that_change_in_mid_run_keep_their_own_start(edit, starts):
    seen, extra = [], torch.nn.Parameter(torch.ones(2))

    def grouped(params):
        first, *rest = params
        groups = [{"params": [first], "weight_decay": 0.4}, {"params": rest}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.2)

    def look(event, state, passes):
        (optimizer,) = state.optimizers
        if event == Event.EPOCH_START and state.timestamp.epoch == 1:
            edit(optimizer, extra)
        if event == Event.BEFORE_FORWARD and passes == 1:
            seen.append([group["weight_decay"] for group in optimizer.param_groups])
            assert all("steps_taken" in group for group in optimizer.param_groups)
            assert optimizer.steps_taken == state.timestamp.batch.value

    run = trainer(
        grouped, [SAM(), Schedule("weight_decay", LinearScheduler(alpha_f=0.0))], callbacks=[Spy(look)]
    )
    run.fit()
    run.close()
    expected = [[start * (1 - t / 8) for start in ([0.4, 0.2] if t < 4 else starts)] for t in range(8)]
    assert seen == [pytest.approx(values) for values in expected]


class Mixed(torch.optim.SGD):
    """Has one hyperparameter in the second group only, as hybrids of Muon and Adam do."""

    def __init__(self, params):
        first, *rest = params
        super().__init__([{"params": [first]}, {"params": rest}], lr=0.1)
        self.param_groups[1]["sharpening"] = 0.5


def test_a_group_that_lacks_the_hyperparameter_is_left_alone():
    groups = seen(
        lambda optimizer: [group.get("sharpening") for group in optimizer.param_groups],
        Mixed,
        [SAM(), Schedule("sharpening", LinearScheduler())],
    )
    assert groups == [[None, pytest.approx(0.5 * (1 - t / 8))] for t in range(8)]


def test_it_needs_no_other_algorithm():
    values = seen(
        lambda optimizer: optimizer.param_groups[0]["momentum"],
        sgd,
        [Schedule("momentum", LinearScheduler())],
    )
    assert values == pytest.approx([0.9 * (1 - t / 8) for t in range(8)])


def test_alone_around_a_wrapped_optimizer_it_goes_over_to_float16(half):
    run = trainer(
        lambda params: SharpnessAwareOptimizer(sgd(params), SAMPerturbation(rho=0.4)),
        [Schedule("rho", LinearScheduler())],
        max_duration="4ba",
    )
    run.fit(duration="1ba")
    assert not isinstance(run.state.scaler, ClosureGradScaler)
    run.fit(duration="3ba", precision="amp_fp16")
    assert isinstance(run.state.scaler, ClosureGradScaler)
    (optimizer,) = run.state.optimizers
    assert optimizer.steps_taken + optimizer.skipped_steps == 4 and optimizer.steps_taken > 1
    run.close()


@pytest.mark.filterwarnings("ignore:Spy is not in the state_dict")
@pytest.mark.parametrize("batch", [1, 5])
def test_a_resumed_run_starts_from_the_constructed_value(batch, tmp_path):
    # The checkpoint holds a power that has been multiplied already.
    algorithms = [Sassha(rho=0.1), Schedule("hessian_power", LinearScheduler(alpha_i=0.5, alpha_f=1.0))]
    first = trainer(lambda params: SASSHA(params, hessian_power=1.0), algorithms, max_duration=f"{batch}ba")
    first.save_checkpoint(str(tmp_path / "never.pt"))
    first.fit()
    first.save_checkpoint(str(tmp_path / "half.pt"))
    first.close()
    values = seen(
        lambda optimizer: optimizer.param_groups[0]["hessian_power"],
        lambda params: SASSHA(params, hessian_power=1.0),
        algorithms,
        load_path=str(tmp_path / "half.pt"),
    )
    assert values == pytest.approx([0.5 + 0.5 * t / 8 for t in range(batch, 8)])


def gsam():
    return GSAM(rho_max=0.2, rho_min=0.1)


@pytest.mark.parametrize(
    ("algorithms", "message"),
    [
        (
            lambda: [Sassha(0.1), Schedule("hessian_power", LinearScheduler(alpha_f=3.0))],
            r"hessian_power cannot follow .* to the end: SASSHA: hessian_power=1.375 .* in \[0, 1\]",
        ),
        (
            lambda: [Sassha(0.1), Schedule("hessian_power", FollowLR(alpha_f=3.0))],
            r"hessian_power cannot follow .* to the end: SASSHA: hessian_power=1.375 .* in \[0, 1\]",
        ),
        (
            lambda: [LazyHessian(), gsam(), Schedule("rho_max", LinearScheduler(alpha_f=0.1))],
            r"rho_max cannot follow .* to the end: GSAM: rho_min=0.1 .* <= rho_max=0.0425",
        ),
        (
            lambda: [Sassha(0.1), Schedule("rho", LinearWithWarmupScheduler("0ba", t_max="2ba"))],
            "rho cannot follow .* to the end: .*t_max",
        ),
    ],
)
def test_a_schedule_that_would_end_out_of_range_is_refused_before_the_first_step(algorithms, message):
    run = trainer(sassha, algorithms(), schedulers=LinearScheduler())
    with pytest.raises(ValueError, match=message) as error:
        run.fit()
    assert run.state.timestamp.batch == 0 and "\n" not in str(error.value)
    run.close()


def test_a_value_out_of_range_in_between_ends_the_training_with_one_line():
    def bump(state, ssr=1.0):
        return 3.0 if state.timestamp.batch == 4 else 1.0

    run = trainer(sassha, [Sassha(rho=0.1), Schedule("hessian_power", bump)])
    with pytest.raises(ValueError, match=r"Schedule: at batch 4: SASSHA: hessian_power=1.5 is not allowed"):
        run.fit()
    run.close()


def test_schedules_that_depend_on_each_other_are_checked_together(tmp_path):
    def build(**kwargs):
        half = [Schedule(name, LinearScheduler(alpha_f=0.1)) for name in ("rho_max", "rho_min")]
        return trainer(sgd, [GSAM(rho_max=0.1, rho_min=0.1, alpha=0.2), *half], **kwargs)

    whole = build(save_folder=str(tmp_path), save_interval="1ba", save_filename="ba{batch}.pt")
    whole.fit()
    expected = everything(whole)
    whole.close()
    resumed = build(load_path=str(tmp_path / "ba6.pt"))
    resumed.fit()
    assert_same(expected, everything(resumed))
    resumed.close()


def test_one_schedule_serves_two_trainers():
    schedule = Schedule("rho", LinearScheduler())
    runs = [trainer(sgd, [SAM(rho=rho), schedule], max_duration="1ba") for rho in (0.1, 0.5)]
    for run, rho in zip(runs, (0.1, 0.5), strict=True):
        run.fit()
        assert run.state.optimizers[0].perturbation.rho == rho
        run.close()


@pytest.mark.parametrize(
    ("optimizer", "algorithms", "name"),
    [
        (sgd, lambda: [SAM()], "p"),
        (sgd, lambda: [ESAM()], "seed"),
        (adahessian, lambda: [LazyHessian()], "block_size"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(optimizer, algorithms, name):
    with pytest.raises(ValueError, match=f"name='{name}' is not allowed") as error:
        trainer(optimizer, [*algorithms(), Schedule(name, LinearScheduler())])
    assert f", {name}" not in str(error.value).split("(")[1]


def test_gsam_follows_the_learning_rate_by_itself_and_logs_the_eigenvalue():
    log = InMemoryLogger()
    run = trainer(
        sgd,
        [GSAM(rho_max=0.4, rho_min=0.1, alpha=0.1)],
        schedulers=LinearScheduler(),
        loggers=[log],
    )
    run.fit()
    run.close()
    logged = {name: [value for _, value in values] for name, values in log.data.items()}
    assert logged["sharpness/rho"] == pytest.approx([0.1 + 0.3 * (1 - t / 8) for t in LR_STEPS])
    expected = [
        2 * gap / rho**2
        for gap, rho in zip(logged["sharpness/loss_gap"], logged["sharpness/rho"], strict=True)
    ]
    assert logged["sharpness/dominant_eigenvalue"] == pytest.approx(expected)


def test_what_it_logs():
    log = InMemoryLogger()
    run = trainer(sgd, [SAM(rho=0.4), Schedule("rho", LinearScheduler())], loggers=[log], max_duration="4ba")
    run.fit()
    run.close()
    for name in ("schedule/rho", "sharpness/rho"):
        assert [value for _, value in log.data[name]] == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    "algorithms", [lambda: [SAM(0.05), Schedule("rho", FollowLR())], lambda: [GSAM(0.05, 0.01)]]
)
def test_under_one_cycle_the_radius_follows_the_rate_to_its_peak(algorithms):
    # Its initial_lr is a 25th of the largest rate.
    log, rates = InMemoryLogger(), []
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)

    def look(event, state, passes):
        if event == Event.BATCH_START:
            rates.append(state.optimizers[0].param_groups[0]["lr"])

    run = trainer(
        lambda params: base,
        algorithms(),
        model=model,
        schedulers=OneCycleLR(base, max_lr=0.5, total_steps=9),
        step_schedulers_every_batch=True,
        loggers=[log],
        callbacks=[Spy(look)],
    )
    run.fit()
    run.close()
    radii = [rho for _, rho in log.data["sharpness/rho"]]
    low = 0.0 if len(algorithms()) == 2 else 0.01
    assert radii == pytest.approx([low + (0.05 - low) * lr / 0.5 for lr in rates])
    assert max(rates) > 0.4 and max(radii) <= 0.05
