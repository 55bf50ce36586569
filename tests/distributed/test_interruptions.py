"""Runs that are killed and go on, also with another number of processes; see tests/interruptions.py."""

import pickle
from pathlib import Path

import pytest
from composer.utils import dist

from tests.distributed.launch import finish, start
from tests.helpers import assert_same, copied
from tests.interruptions import METHODS, Death, build, interrupted, whole

KILLED = ["sassha", "msassha", "gsam_sgd", "looksam_sgd", "esam_sgd", "none_adahessian", "none_sophia"]


@pytest.mark.parametrize(("method", "ranks"), [*[(method, 1) for method in KILLED], ("sassha", 2)])
def test_a_run_that_is_killed_three_times_ends_as_if_nothing_had_happened(method, ranks, tmp_path):
    expected = whole(method, ranks, tmp_path / "whole")
    deaths = [
        Death(place="link", call=1),  # nothing leads to the checkpoint: the next start begins anew
        Death(place="write", call=2, part=0.5),  # the next start finds the first one
        Death(ranks - 1, place="event", call=expected.calls[0]["event"] // 2),
    ]
    places, resumed_at = interrupted(method, deaths, expected, tmp_path / "killed")
    assert places[:2] == ["link", "write"] and places[2] in ("pass", "between")
    assert resumed_at >= 10, "the last start continues from a checkpoint"


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"save_overwrite": False}, "FileExistsError"), ({"save_filename": "last.pt"}, "in load_checkpoint")],
)
def test_what_composer_needs_to_go_on_after_a_kill_in_a_write(settings, error, tmp_path):
    expected = whole("sgd", 1, tmp_path / "whole")
    death = Death(place="write", call=2, part=0.5)
    with pytest.raises(AssertionError, match=error):
        interrupted("sgd", [death], expected, tmp_path / "killed", **settings)
    if error == "FileExistsError":
        assert interrupted("sgd", [], expected, tmp_path / "killed") == ([], 5)


@pytest.mark.parametrize("method", ["sassha", "msassha", "looksam_adamw", "none_sophia"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_continues_on_another_number_of_ranks(method, before, after, tmp_path):
    for ranks, work in [(before, save), (after, go_on)]:
        assert finish(start(ranks, tmp_path / "log", work, method, tmp_path)), (tmp_path / "log").read_text()
    saved = pickle.loads((tmp_path / "saved").read_bytes())
    for rank in range(after):
        assert_same(saved, pickle.loads((tmp_path / f"loaded{rank}").read_bytes()), f"rank {rank}")


def content(run):
    """What a checkpoint brings to any number of ranks alike: not the data's order and the random numbers."""
    (optimizer,) = run.state.optimizers
    model = run.state.model
    return copied([[*model.parameters()], [*model.buffers()], optimizer.state_dict(), optimizer.steps_taken])


def save(method: str, folder: Path) -> None:
    run = build(METHODS[method], folder, max_duration="7ba")
    run.fit()
    run.save_checkpoint(str(folder / "seven.pt"))
    if dist.get_global_rank() == 0:
        (folder / "saved").write_bytes(pickle.dumps(content(run)))
    run.close()


def go_on(method: str, folder: Path) -> None:
    run = build(METHODS[method], folder, autoresume=False, load_path=str(folder / "seven.pt"))
    (folder / f"loaded{dist.get_global_rank()}").write_bytes(pickle.dumps(content(run)))
    run.fit()
    (optimizer,) = run.state.optimizers
    assert optimizer.steps_taken == 23
    mine = copied([[*run.state.model.parameters()], optimizer.state_dict()])
    assert all(p.isfinite().all() for p in mine[0])
    for other in dist.all_gather_object(mine):
        assert_same(mine, other)
    run.close()
