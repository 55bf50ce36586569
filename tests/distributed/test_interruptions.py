"""Kill runs and continue them, also on another number of ranks; see tests/interruptions.py."""

import pickle
from pathlib import Path

import pytest
from composer.utils import dist

from tests.distributed.launch import finish, launches, start
from tests.helpers import assert_same, copied
from tests.interruptions import METHODS, Death, build, interrupted, whole

SLOWLY = ["msassha", "gsam_sgd", "looksam_sgd", "esam_sgd", "none_adahessian", "none_sophia"]
KILLED = [("sassha", 1), ("sassha", 2), *[pytest.param(m, 1, marks=pytest.mark.slow) for m in SLOWLY]]
MOVED = ["sassha", "msassha", "looksam_adamw", "none_sophia"]
pytestmark = launches


@pytest.mark.parametrize(("method", "ranks"), KILLED)
def test_a_run_killed_three_times_ends_as_an_uninterrupted_one(method, ranks, tmp_path):
    expected = whole(method, ranks, tmp_path / "whole")
    deaths = [
        Death(place="link", call=1),  # nothing leads to the checkpoint: the next start begins anew
        Death(place="write", call=2, part=0.5),  # the next start finds the first one
        Death(ranks - 1, place="event", call=expected.calls[0]["event"] // 2),
    ]
    places, resumed_at = interrupted(method, deaths, expected, tmp_path / "killed")
    assert places[:2] == ["link", "write"] and places[2] in ("pass", "between")
    assert resumed_at >= 10, "the last start continues from a checkpoint"


@pytest.fixture(scope="module")
def sgd_run(tmp_path_factory):
    return whole("sgd", 1, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"save_overwrite": False}, "FileExistsError"), ({"save_filename": "last.pt"}, "in load_checkpoint")],
)
def test_what_composer_needs_after_a_kill_in_a_write(settings, error, sgd_run, tmp_path):
    death = Death(place="write", call=2, part=0.5)
    with pytest.raises(AssertionError, match=error):
        interrupted("sgd", [death], sgd_run, tmp_path, **settings)
    if error == "FileExistsError":
        assert interrupted("sgd", [], sgd_run, tmp_path) == ([], 5)


@pytest.fixture(scope="module", params=[(1, 2), (2, 1)], ids=["one to two", "two to one"])
def moved(request, tmp_path_factory):
    """Save a checkpoint of every method on one number of ranks, and continue it on another."""
    folder = tmp_path_factory.mktemp("moved")
    for ranks, work in zip(request.param, (save, go_on), strict=True):
        assert finish(start(ranks, folder / "log", work, folder)), (folder / "log").read_text()
    return folder, request.param[1]


@pytest.mark.parametrize("method", MOVED)
def test_a_checkpoint_continues_on_another_number_of_ranks(method, moved):
    folder, ranks = moved
    saved = pickle.loads((folder / f"{method}.saved").read_bytes())
    for rank in range(ranks):
        assert_same(saved, pickle.loads((folder / f"{method}.loaded{rank}").read_bytes()), f"rank {rank}")


def content(run):
    """Return what every rank gets from a checkpoint: not the data's order and the random numbers."""
    (optimizer,) = run.state.optimizers
    model = run.state.model
    return copied([[*model.parameters()], [*model.buffers()], optimizer.state_dict(), optimizer.steps_taken])


def save(folder: Path) -> None:
    for method in MOVED:
        run = build(METHODS[method], folder / method, max_duration="7ba", save_interval="7ba")
        run.fit()
        run.save_checkpoint(str(folder / f"{method}.pt"))
        if dist.get_global_rank() == 0:
            (folder / f"{method}.saved").write_bytes(pickle.dumps(content(run)))
        run.close()


def go_on(folder: Path) -> None:
    for method in MOVED:
        run = build(
            METHODS[method],
            folder / f"{method}.after",
            autoresume=False,
            load_path=str(folder / f"{method}.pt"),
            max_duration="12ba",
        )
        (folder / f"{method}.loaded{dist.get_global_rank()}").write_bytes(pickle.dumps(content(run)))
        run.fit()
        (optimizer,) = run.state.optimizers
        assert optimizer.steps_taken == 12
        mine = copied([[*run.state.model.parameters()], optimizer.state_dict()])
        assert all(p.isfinite().all() for p in mine[0])
        for other in dist.all_gather_object(mine):
            assert_same(mine, other)
        run.close()
