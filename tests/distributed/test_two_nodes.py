"""Two nodes that share a disk end as two processes of one node do.

By default they are two processes with the environment that a launcher gives them. With `-m slow` they are
two real launchers on this machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.utils import dist, get_free_tcp_port

from composer_sassha.recipes.config import load_recipe
from composer_sassha.recipes.run import train_recipe
from tests.distributed.launch import finish, launches, start, wait
from tests.helpers import assert_same

pytestmark = launches

ROOT = Path(__file__).parents[2]
SETTINGS = ["max_duration=12ba", "save_interval=5ba", "progress_bar=false"]
TRAIN = f"-m composer_sassha train digits {' '.join(SETTINGS)}"

# What is run on each node; $NODE is its number.
COMPOSER = "composer --world_size 2 --node_rank $NODE -n 1 --master_addr 127.0.0.1 --master_port $PORT"
TORCHRUN = (
    "NODE_RANK=$NODE torchrun --nnodes 2 --node-rank $NODE --nproc-per-node 1 "
    "--master-addr 127.0.0.1 --master-port $PORT"
)
SLURM = (  # after srun, which sets these
    "export SLURM_PROCID=$NODE SLURM_LOCALID=0 SLURM_NODEID=$NODE SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1; "
    "export MASTER_ADDR=127.0.0.1 MASTER_PORT=$PORT; "
    "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID "
    "WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE python"
)


def on_two_nodes(command: str, folder: Path) -> list[tuple[int, str]]:
    """Run the command on each node; return the exit status and the output of both."""
    port = get_free_tcp_port()
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env={**os.environ, **paths, "NODE": str(node), "PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=540)[0] for node in nodes]
    return [(node.returncode, out) for node, out in zip(nodes, said, strict=True)]


def train_in(folder: Path) -> None:
    os.chdir(folder)
    train_recipe(load_recipe("digits", SETTINGS))


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_node")
    log = tmp_path_factory.mktemp("log") / "log"
    assert finish(start(2, log, train_in, folder)), log.read_text()
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Train on two nodes, of which the second breaks down after the first checkpoint."""
    folder = tmp_path_factory.mktemp("broken")
    log = folder.with_suffix(".log")
    nodes = start(2, log, break_down_in, folder, nodes=2, meet=False)
    wait(nodes, seconds=240)
    nodes[0].join(240)
    assert all(node.exitcode for node in nodes), "the other one notices"
    assert list(folder.glob("runs/digits/sassha/seed0/checkpoints/ep0-ba5-rank0.pt")), log.read_text()
    return folder


def test_two_nodes_continue_after_one_has_broken_down(one_node, broken, tmp_path):
    shutil.copytree(broken / "runs", tmp_path / "runs", symlinks=True)
    log = tmp_path.with_suffix(".log")
    assert finish(start(2, log, train_in, tmp_path, nodes=2, meet=False)), log.read_text()
    same_end(one_node, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [COMPOSER, TORCHRUN, SLURM], ids=["composer", "torchrun", "slurm"])
def test_two_launchers_train_as_one_node_does(launcher, one_node, tmp_path):
    trained_by(launcher, one_node, tmp_path)


@pytest.mark.slow
def test_the_same_commands_continue_after_a_breakdown(one_node, broken, tmp_path):
    shutil.copytree(broken / "runs", tmp_path / "runs", symlinks=True)
    trained_by(SLURM, one_node, tmp_path)


def trained_by(launcher: str, one_node: Path, folder: Path) -> None:
    """Run the command on both nodes; one of them names the run folder."""
    (status, said), (other_status, other_said) = on_two_nodes(f"{launcher} {TRAIN}", folder)
    assert status == other_status == 0, said + other_said
    assert said.count("run folder: ") == 1 and "run folder: " not in other_said
    same_end(one_node, folder)


def same_end(first: Path, second: Path) -> None:
    """Compare files, results, metrics, weights, state and random numbers, whatever the time it took."""
    folders = [root / "runs/digits/sassha/seed0" for root in (first, second)]
    files = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (first, second)]
    assert files[0] == files[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert results[0]["world_size"] == 2 and results[0]["steps"] == 12
    assert_same(*[{k: v for k, v in result.items() if "seconds" not in k} for result in results])
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
    assert_same(
        *[[json.loads(line) | {"seconds": 0, "processor_seconds": 0} for line in part] for part in lines]
    )
    links = [folder / "checkpoints/latest-rank0.pt" for folder in folders]
    checkpoints = [torch.load(link, weights_only=False) for link in links]
    for key in ("model", "optimizers"):
        assert_same(*[checkpoint["state"][key] for checkpoint in checkpoints], key)
    assert len(checkpoints[0]["rng"]) == 2
    assert_same(*[checkpoint["rng"] for checkpoint in checkpoints], "rng")


class Breakdown(Callback):
    """End the second node's process as a failure of its machine would."""

    def batch_start(self, state, logger):
        if dist.get_global_rank() == 1 and state.timestamp.batch == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def break_down_in(folder: Path) -> None:
    os.chdir(folder)
    train_recipe(load_recipe("digits", SETTINGS), [Breakdown()])
