"""What each of two ranks does. Started by test_monitor.py."""

import time
import warnings
from pathlib import Path

import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.utils import dist
from torch.utils.data import DataLoader

from composer_sassha import SharpnessMonitor
from composer_sassha.common.batches import unwrapped
from composer_sassha.common.ranks import world
from composer_sassha.sharpness import Measures, measure, objective_of, spectrum, undisturbed
from composer_sassha.sharpness.measures import Deadline
from tests.distributed.launch import run_checks
from tests.helpers import assert_same, everything, images, method_trainer, network
from tests.methods import NAMED

QUICK = Measures(eigenvalues=1, trace_samples=2, m=(2,), directions=2)
MEASURES = Measures(eigenvalues=3, tol=1e-9, trace_samples=3, m=(2, 4), directions=3)


def shares(model, dtype=torch.float64):
    """All samples, and those of this rank: 8 of 20, and 12."""
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in images(20).tensors)
    mine = slice(0, 8) if dist.get_global_rank() == 0 else slice(8, 20)
    return [((x, y), 20)], [((x[mine], y[mine]), len(y[mine]))]


def all_ranks_together_are_one_process() -> None:
    """With shares of different sizes; m-sharpness has the same groups, as 2 and 4 divide both shares."""
    model = network().double()
    everyone, mine = shares(model)
    with undisturbed(model):
        whole = objective_of(model, everyone)
        exact, density = measure(whole, MEASURES), spectrum(whole, 6, 2)
        shared = objective_of(model, mine, process_group=torch.distributed.group.WORLD)
        found, shared_density = measure(shared, MEASURES), spectrum(shared, 6, 2)
    assert exact.keys() == found.keys() and "lambda_3" in found
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, rel=1e-8), name
    assert shared_density.eigenvalues == pytest.approx(density.eigenvalues, rel=1e-6, abs=1e-9)
    first, second = dist.all_gather_object(found)
    assert first == second


def the_time_of_one_rank_is_that_of_both() -> None:
    """The clock of rank 1 alone runs out, in the middle."""
    model = network().double()
    _, mine = shares(model)
    answers = []
    for allowed in (0, 3, 9, 17, 40):
        deadline, clock = Deadline(1e6, torch.device("cpu"), world()), 0
        if dist.get_global_rank() == 1:

            def ticking(deadline=deadline, allowed=allowed):
                nonlocal clock
                clock += 1
                deadline._end = 0 if clock > allowed else time.monotonic() + 1e6
                deadline()

            tick = ticking
        else:
            tick = deadline
        with undisturbed(model):
            answers.append(sorted(measure(objective_of(model, mine, tick, world()), MEASURES)))
    first, second = dist.all_gather_object(answers)
    assert first == second and first[0] == [] and len({len(names) for names in first}) >= 4


def a_run_with_the_monitor_is_equal_to_one_without() -> None:
    ends, log = [], InMemoryLogger()
    data = images(20)
    for callbacks in ([], [SharpnessMonitor("3ba", measures=QUICK)]):
        done = method_trainer(
            NAMED["sassha"],
            dataset=images(80),
            eval_dataloader=DataLoader(data, batch_size=10, sampler=dist.get_sampler(data)),
            callbacks=callbacks,
            loggers=log,
            max_duration="1ep",
        )
        done.fit()
        ends.append(everything(done))
        done.close()
    assert_same(*ends)
    values = [value for _, value in log.data["sharpness/lambda_max"]]
    assert len(values) == 2
    for other in dist.all_gather_object(values):
        assert other == values
    # Each rank has statistics of its own; what is measured are rank 0's, as in an evaluation.
    model = unwrapped(done.state.model)
    mean = model.get_buffer("module.1.running_mean")
    first, second = dist.all_gather_object(mean.clone())
    assert not torch.equal(first, second)
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    with undisturbed(model):
        whole = objective_of(model, [(data.tensors, 20)])
        assert log.data["sharpness/loss"][-1][1] == pytest.approx(whole.loss(), rel=1e-5)


def samples_that_the_sampler_repeats_count_once() -> None:
    """19 samples on two ranks: the sampler gives ten to each; and one sample, the same to both."""
    for count in (19, 1):
        log, data = InMemoryLogger(), images(count)
        done = method_trainer(
            NAMED["sam_sgd"],
            eval_dataloader=DataLoader(data, batch_size=4, sampler=dist.get_sampler(data)),
            callbacks=[SharpnessMonitor(measures=QUICK)],
            loggers=log,
            max_duration="1ba",
        )
        done.fit()
        model = unwrapped(done.state.model)
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
        with undisturbed(model):
            whole = objective_of(model, [(data.tensors, count)])
            exact = measure(whole, QUICK)
        for name in ("loss", "full_grad_norm", "sam", "lambda_max", "trace"):
            assert log.data[f"sharpness/{name}"][-1][1] == pytest.approx(exact[name], rel=1e-3), name
        done.close()


CHECKS = {
    check.__name__: check
    for check in (
        all_ranks_together_are_one_process,
        the_time_of_one_rank_is_that_of_both,
        a_run_with_the_monitor_is_equal_to_one_without,
        samples_that_the_sampler_repeats_count_once,
    )
}


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    run_checks(CHECKS, out)
