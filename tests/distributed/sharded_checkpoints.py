"""Checks of the checkpoints of sharded runs."""

from pathlib import Path

import torch
from composer.utils import dist

from composer_sassha import ignore_own_entries
from tests.distributed.sharded_runs import CURVED, PERTURBED, build, everything
from tests.helpers import assert_same
from tests.methods import sgd

KINDS = ("sharded", "full")
RESUMED = ("looksam", "adamw_msam", *CURVED)

# Saved on one number of ranks, loaded on another.
ACROSS = ("looksam", "sassha")

# A checkpoint of the one, continued with the other.
CHANGES = [("plain", "sam"), ("sam", "plain"), ("plain", "looksam"), ("looksam", "plain")]


def resumes(name: str, kind: str, folder: Path) -> None:
    """Resume in mid-epoch from a checkpoint of either kind: the run ends as the uninterrupted one."""
    make_optimizer, make_algorithms = {**PERTURBED, **CURVED}[name]
    filename = "ba{batch}/{rank}.pt" if kind == "sharded" else "ba{batch}.pt"
    saving = {"save_folder": str(folder), "save_filename": filename, "save_interval": "3ba"}
    run = build(make_optimizer, make_algorithms(), shard=kind, **saving)
    run.fit()
    expected = everything(run)
    run.close()
    resumed = build(make_optimizer, make_algorithms(), shard=kind, load_path=checkpoint(folder, kind))
    assert resumed.state.timestamp.batch == 3
    resumed.fit()
    assert_same(expected, everything(resumed))
    resumed.close()


def save(name: str, folder: Path) -> None:
    """Train for three batches; leave the checkpoint and a copy of what it must hold."""
    make_optimizer, make_algorithms = {**PERTURBED, **CURVED}[name]
    saving = {"save_folder": str(folder), "save_filename": "ba{batch}/{rank}.pt", "save_interval": "3ba"}
    run = build(make_optimizer, make_algorithms(), max_duration="3ba", **saving)
    run.fit()
    held = everything(run)
    if dist.get_global_rank() == 0:
        torch.save(held, folder / "held.pt")
    run.close()
    dist.barrier()


def loads(name: str, folder: Path) -> None:
    """Load whole what another number of ranks has saved, and train on with it."""
    make_optimizer, make_algorithms = {**PERTURBED, **CURVED}[name]
    (path,) = (folder / "ba3").iterdir()
    run = build(make_optimizer, make_algorithms(), load_path=str(path), max_duration="4ba")
    assert run.state.timestamp.batch == 3
    held = torch.load(folder / "held.pt", weights_only=False)
    assert_same(held, everything(run))
    run.fit()
    assert run.state.optimizers[0].steps_taken == 4
    run.close()


def checkpoint(folder: Path, kind: str) -> str:
    return str(folder / ("ba3/ep1-ba3" if kind == "sharded" else "ba3.pt"))


def changes(before: str, after: str, kind: str, folder: Path) -> None:
    """Continue a checkpoint of one method under another with the same optimizer, which keeps its state."""
    how = {"plain": (sgd, list), **PERTURBED}
    filename = "ba{batch}/{rank}.pt" if kind == "sharded" else "ba{batch}.pt"
    saving = {"save_folder": str(folder), "save_filename": filename, "save_interval": "3ba"}
    run = build(sgd, how[before][1](), shard=kind, max_duration="3ba", **saving)
    run.fit()
    saved = everything(run)
    run.close()
    changed = build(
        sgd,
        how[after][1](),
        shard=kind,
        load_path=checkpoint(folder, kind),
        load_ignore_keys=ignore_own_entries,
    )
    loaded = everything(changed)
    assert_same(saved["weights"], loaded["weights"])
    for name, state in loaded["state"].items():
        assert_same(saved["state"][name]["momentum_buffer"], state["momentum_buffer"], name)
        assert ("looksam_g_v" in state) == (after == "looksam")
    assert loaded["groups"][0].get("steps_taken") == (None if after == "plain" else 0)
    changed.fit()
    changed.close()
