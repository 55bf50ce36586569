"""Checks of which ranks share a gradient: plain loops with one model per rank, group or world."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from composer_sassha import SASSHA, ClosureGradScaler, SharpnessAwareOptimizer
from composer_sassha.common.ranks import ALONE, Ranks, world
from composer_sassha.common.sharding import shards_of
from composer_sassha.curvature import LazyCurvature
from composer_sassha.perturbations import (
    GSAMPerturbation,
    LookSAMPerturbation,
    SAMPerturbation,
    SSAMPerturbation,
)
from composer_sassha.sharpness import Objective, objective_of, top_eigenvalues, undisturbed
from tests.distributed.launch import run_checks
from tests.helpers import assert_same, copied, images, network, trainer
from tests.methods import NAMED


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _sassha(model: nn.Module) -> torch.optim.Optimizer:
    return SASSHA(model.parameters(), lr=0.05)


# Two that mix gradients (one of them keeps a vector), one that draws, and one that estimates.
LOOPS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], Callable[[], dict[str, Any]]]] = {
    "gsam": (_sgd, lambda: {"perturbation": GSAMPerturbation(0.1, alpha=0.3)}),
    "looksam": (_sgd, lambda: {"perturbation": LookSAMPerturbation(0.1, alpha=0.5), "interval": 2}),
    "ssam": (_sgd, lambda: {"perturbation": SSAMPerturbation(0.1)}),
    "sassha": (_sassha, lambda: {"perturbation": SAMPerturbation(0.1), "curvature": LazyCurvature(2)}),
}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(50, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
    )


def train(
    loop: str,
    trained: nn.Module,
    part: int,
    *,
    average: Callable[[Tensor], Any] | None = None,
    ascents: bool = False,
    steps: int = 5,
    **settings: Any,
) -> list[Any]:
    """Train in a plain loop, and return the weights and the optimizer's state.

    Args:
        loop: a key of `LOOPS`.
        trained: the model.
        part: the number of the quarter of the images to train on; seeds the dropout too.
        average: what the loop does with gradients, by hand.
        ascents: also with those of ascents.
        steps: their number.
        settings: of the wrapper.
    """
    make, method = LOOPS[loop]
    settings = {"model": trained, **method(), **settings}
    optimizer = SharpnessAwareOptimizer(make(trained), **settings)
    x, y = (t[10 * part : 10 * part + 10] for t in images(40).tensors)
    torch.manual_seed(part)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(trained(x), y)
        optimizer.backward(loss)
        if average is not None and (ascents or optimizer.phase != "ascent"):
            for p in trained.parameters():
                average(p.grad)
        return loss.detach()

    for _ in range(steps):
        optimizer.step(closure)
    states = [optimizer.state[p] for p in trained.parameters()]
    return copied([[*trained.parameters()], states, [*trained.buffers()]])


def save_alone(out: Path) -> None:
    """Train the models of two ranks in this process, which is alone, and save the ends."""
    assert not world().several
    ends = {loop: [train(loop, net(rank), rank) for rank in (0, 1)] for loop in LOOPS}
    torch.save(ends, out / "alone.pt")


def independent_models(loop: str, out: Path) -> None:
    """Each rank's model is trained as by a process of its own, bit for bit; also if one takes more steps."""
    rank = dist.get_global_rank()
    expected = torch.load(out / "alone.pt", weights_only=False)[loop][rank]
    own = [torch_dist.new_group([r]) for r in (0, 1)][rank]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(expected, train(loop, net(rank), rank, process_group=False))
        assert_same(expected, train(loop, net(rank), rank, process_group=own))
        wrapped = DistributedDataParallel(net(rank), process_group=own)
        assert_same(expected, train(loop, wrapped, rank))
        if rank == 0:  # in which the other rank has no part
            train(loop, net(rank), rank, process_group=False)
    assert not [w for w in caught if "several ranks" in str(w.message)]


def ranks_that_nothing_is_known_of(loop: str, out: Path) -> None:
    """They are not averaged, and a warning of one line says so, once."""
    rank = dist.get_global_rank()
    expected = torch.load(out / "alone.pt", weights_only=False)[loop][rank]
    settings: dict[str, Any]
    for settings in ({}, {"model": None}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            end = train(loop, net(rank), rank, **settings)
        if not settings:  # without the model, its statistics move twice
            assert_same(expected, end)
        (said,) = [str(w.message) for w in caught if "several ranks" in str(w.message)]
        assert "process_group=" in said and "\n" not in said


def the_model_says_its_group(loop: str) -> None:
    """Also where DDP has been compiled, or is a part of the model; the replicas are equal."""
    rank = dist.get_global_rank()
    ends = []
    compiled = partial(torch.compile, backend="eager")  # the default one starts processes of its own
    for around in (lambda ddp: ddp, compiled, nn.Sequential):
        ddp = DistributedDataParallel(net(0))
        # The loop runs `ddp` itself: what the compiler makes of it is not in question.
        ends.append(train(loop, ddp, rank, model=around(ddp))[:2])
    for other in dist.all_gather_object(ends[0]):
        assert_same(ends[0], other)
    for end in ends[1:]:
        assert_same(ends[0], end)


def gradients_averaged_by_hand() -> None:
    """With process_group=WORLD, a loop without DDP takes DDP's steps; dividing by 2 rounds nothing."""
    rank = dist.get_global_rank()
    for loop, ascents in (("sassha", False), ("looksam", True)):
        everyone = {"average": world().average_, "process_group": torch_dist.group.WORLD}
        by_hand = train(loop, net(0), rank, ascents=ascents, **everyone)
        by_ddp = train(loop, DistributedDataParallel(net(0)), rank, sync_ascent=ascents)
        assert_same(by_ddp[:2], by_hand[:2])


def a_group_that_the_models_is_not_in() -> None:
    """What would let replicas drift apart is refused in one line before anything is trained."""
    model = DistributedDataParallel(net(0))
    before = copied(model.state_dict())
    own = [torch_dist.new_group([r]) for r in (0, 1)][dist.get_global_rank()]
    for group in (False, own):
        with pytest.raises(ValueError, match=r"of ranks \[.\] .* \[0, 1\] average .*leave it out$") as error:
            train("gsam", model, 0, process_group=group)
        assert "\n" not in str(error.value)
    two = nn.Sequential(model, DistributedDataParallel(nn.Linear(3, 3), process_group=own))
    with pytest.raises(ValueError, match="over different ranks"):
        train("gsam", two, 0)
    assert_same(before, model.state_dict())
    with pytest.raises(ValueError, match="process_group= is not allowed in a Trainer"):
        trainer(
            lambda params: SharpnessAwareOptimizer(torch.optim.SGD(params, lr=0.1), process_group=own),
            NAMED["sam_sgd"].algorithms(),
        )


def a_wrapper_with_a_group_is_copied() -> None:
    own = [torch_dist.new_group([r]) for r in (0, 1)][dist.get_global_rank()]
    everyone = torch_dist.group.WORLD
    for group, expected in ((own, Ranks((own,))), (everyone, world()), (False, ALONE), (None, None)):
        optimizer = SharpnessAwareOptimizer(_sgd(net(0)), SAMPerturbation(), process_group=group)
        for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert again.process_group == expected


def an_overflow_of_an_independent_model() -> None:
    """The other rank goes on; without a wrapper, the ranks that the scaler is given back off together."""
    rank = dist.get_global_rank()

    def scale_after(wrapped: bool, **settings: Any) -> float:
        model = net(rank)
        optimizer: Any = _sgd(model)
        if wrapped:
            optimizer = SharpnessAwareOptimizer(
                optimizer, GSAMPerturbation(0.1), model=model, process_group=False
            )
        scaler = ClosureGradScaler("cpu", init_scale=2.0**8, **settings)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(images(10).tensors[0]).square().mean()
            scaler.scale(loss).backward()
            if rank == 1:
                next(model.parameters()).grad[0] = torch.inf
            return loss.detach()

        scaler.step(optimizer, closure=closure)
        scaler.update()
        return scaler.get_scale()

    alone = 2.0 ** (8 - rank)
    assert scale_after(True) == scale_after(False) == scale_after(False, process_group=False) == alone
    assert scale_after(False, process_group=torch_dist.group.WORLD) == 2.0**7


def an_objective_of_each_rank() -> None:
    """It is measured without the other rank, unless a group or the model says so."""
    factor = 1.0 + dist.get_global_rank()
    w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def objective(**settings: Any) -> Objective:
        return Objective({"w": w}, lambda x: x * (w**2).sum(), [(torch.tensor(factor), 1)], **settings)

    assert objective().loss() == objective(process_group=False).loss() == 5 * factor
    model = network().double()
    wrapped, batch = DistributedDataParallel(model), images(4 + 8 * dist.get_global_rank()).tensors
    batches = [((batch[0].double(), batch[1]), len(batch[1]))]
    with undisturbed(model):
        alone = objective_of(wrapped, batches, process_group=False).loss()
        assert alone == objective_of(model, batches).loss()
        found = dist.all_gather_object((alone, len(batch[1])))
        mean = sum(loss * count for loss, count in found) / 16
        assert objective_of(wrapped, batches).loss() == pytest.approx(mean, rel=1e-12)
    assert top_eigenvalues(objective(), 1) == pytest.approx([2 * factor])
    shared = objective(process_group=torch_dist.group.WORLD)
    assert shared.loss() == 7.5 and top_eigenvalues(shared, 1) == pytest.approx([3.0])


def copies_of_shards() -> None:
    """With HSDP the ranks that share a gradient are those of both dimensions of its mesh."""
    rank, size = dist.get_global_rank(), dist.get_world_size()
    for copies in {1, 2, size}:
        mesh = init_device_mesh("cpu", (copies, size // copies))
        shards = shards_of([distribute_tensor(torch.zeros(4, 2), mesh, [Replicate(), Shard(0)])])
        assert shards is not None
        ranks, mine = shards.ranks, torch.tensor([float(rank)])
        assert (shards.part, ranks.rank, ranks.size) == (rank % (size // copies), rank, size)
        ranks.average_(mine)
        assert mine == (size - 1) / 2
        assert ranks.any(torch.tensor(rank == size - 1)) and not ranks.any(torch.tensor(False))
        objects, tensor = [rank], torch.tensor([1.0 + rank])
        ranks.broadcast_objects_(objects)
        ranks.broadcast_(tensor)
        assert objects == [0] and tensor == 1


def checks_in(out: Path) -> dict[str, Callable[[], None]]:
    """Return every check by its name; `out` has what `save_alone` left."""
    checks: dict[str, Callable[[], None]] = {}
    for loop in LOOPS:
        checks[f"independent_models[{loop}]"] = partial(independent_models, loop, out)
    for loop in ("looksam", "sassha"):
        checks[f"ranks_that_nothing_is_known_of[{loop}]"] = partial(ranks_that_nothing_is_known_of, loop, out)
        checks[f"the_model_says_its_group[{loop}]"] = partial(the_model_says_its_group, loop)
    alone = (
        gradients_averaged_by_hand,
        a_group_that_the_models_is_not_in,
        a_wrapper_with_a_group_is_copied,
        an_overflow_of_an_independent_model,
        an_objective_of_each_rank,
        copies_of_shards,
    )
    return checks | {check.__name__: check for check in alone}


def groups_of(size: int, out: Path) -> None:
    """Train one model on each group of `size` ranks, every rank on its own images; write the ends."""
    rank = dist.get_global_rank()
    groups = [torch_dist.new_group(range(k, k + size)) for k in range(0, dist.get_world_size(), size)]

    def check() -> None:
        for loop in LOOPS:
            model = DistributedDataParallel(net(rank // size), process_group=groups[rank // size])
            torch.save(train(loop, model, rank), out / f"{loop}.{dist.get_world_size()}.{rank}.pt")
        copies_of_shards()
        if groups[1:]:  # a group of the same size with another rank in it
            crossing = [torch_dist.new_group([k, k + size]) for k in range(size)][rank % size]
            with pytest.raises(ValueError, match="is not allowed for a model whose gradient"):
                train("gsam", model, rank, process_group=crossing)
        torch_dist.barrier()  # the rank that ends first takes its store with it

    run_checks({"groups": check}, out)
