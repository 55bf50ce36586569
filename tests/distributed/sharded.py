"""The checks of sharded parameters (FSDP2) that each of two ranks runs. See test_sharded.py."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer.core import Event
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from composer_sassha import SAM, SASSHA, AdaHessian, LazyHessian, SharpnessAwareOptimizer
from composer_sassha.common.sharding import local
from composer_sassha.curvature import LazyCurvature, rademacher
from composer_sassha.curvature.gauss_newton import draw_labels
from composer_sassha.perturbations import SAMPerturbation
from tests.distributed.launch import run_checks
from tests.distributed.sharded_checkpoints import (
    ACROSS,
    CHANGES,
    KINDS,
    RESUMED,
    changes,
    loads,
    resumes,
    save,
)
from tests.distributed.sharded_runs import PERTURBED, build, dataset, everything, network, whole
from tests.helpers import Injected, Spy, assert_same
from tests.methods import sassha, sgd

ESTIMATED = [("gauss_newton", 0.3), ("finite_difference", 0.3), ("finite_difference", 0.0)]


def agrees(name: str) -> None:
    """Train sharded, with evaluations in between: the steps are those of data-parallel training."""
    make_optimizer, make_algorithms = PERTURBED[name]
    ends = []
    for shard in (None, "sharded"):
        test = DataLoader(dataset(20), batch_size=10, sampler=dist.get_sampler(dataset(20)))
        run = build(make_optimizer, make_algorithms(), shard=shard, eval_dataloader=test, eval_interval="1ba")
        assert any(isinstance(p, DTensor) for p in run.state.model.parameters()) == (shard is not None)
        run.fit()
        ends.append(everything(run)["weights"])
        run.close()
    for key, expected in ends[0].items():
        assert (ends[1][key] - expected).abs().max() <= 1e-10, key


def curvature_agrees(estimator: str, rho: float) -> None:
    """Three steps of SASSHA on ranks with unequal batches, against plain arithmetic on the whole batch."""
    rank = dist.get_global_rank()
    x, y = dataset(44).tensors
    mine = slice(0, 20) if rank == 0 else slice(20, 44)  # two batches each, of 10 and of 12 samples
    size = 10 if rank == 0 else 12
    own = TensorDataset(x[mine], y[mine])
    in_order = DistributedSampler(own, num_replicas=1, rank=0, shuffle=False)
    loader = DataLoader(own, batch_size=size, sampler=in_order)
    torch.manual_seed(17)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model = ComposerClassifier(net, num_classes=3)
    w = {name: p.detach().clone() for name, p in net.named_parameters()}
    run = build(
        # a root would magnify the rounding of differences near 0
        lambda params: SASSHA(params, lr=0.1, eps=1e-2, hessian_power=1.0),
        [
            LazyHessian(2, estimator=estimator, samples=2, floor=0.3),
            *([SAM(rho, sync_ascent=True)] if rho else []),
        ],
        model=model,
        train_dataloader=loader,
        max_duration="3ba",
        device_train_microbatch_size=6,  # 6 + 4 and 6 + 6 samples
    )
    parts = [[*local([p])[0].shape] for p in run.state.model.parameters()]
    shapes = dist.all_gather_object(parts)
    run.fit()

    # The same by hand.
    reference = nn.Sequential(nn.Flatten(), nn.Linear(50, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(reference, params, (x,))

    def gradient(params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: nn.functional.cross_entropy(logits(p, x), y))(params)

    def probe(key: tuple[int, ...]) -> dict[str, Tensor]:
        """Put together what the two ranks have drawn for their parts."""
        drawn = [
            rademacher([torch.zeros(s) for s in shape], (0, key[0], part, *key[1:]))
            for part, shape in enumerate(shapes)
        ]
        return {name: torch.cat(pieces) for name, pieces in zip(w, zip(*drawn, strict=True), strict=True)}

    def diagonal(params: dict[str, Tensor], step: int, number: int, shards: list) -> dict[str, Tensor]:
        x, y = torch.cat([x for x, _ in shards]), torch.cat([y for _, y in shards])
        estimates = []
        for sample in range(2):
            if estimator == "finite_difference":
                h = torch.finfo(torch.float64).eps ** 0.5 / 10
                z, g = probe((step, number, sample)), gradient(params, x, y)
                there = gradient({n: params[n] + h * z[n] for n in params}, x, y)
                estimates.append({n: z[n] * (there[n] - g[n]) / h for n in params})
            else:
                drawn = [
                    draw_labels(logits(params, x).softmax(1), (0, step, rank, number, sample))
                    for rank, (x, _) in enumerate(shards)
                ]
                g = gradient(params, x, torch.cat(drawn))
                estimates.append({n: len(x) * g[n] ** 2 for n in params})
        return {n: (estimates[0][n] + estimates[1][n]) / 2 for n in params}

    m = {n: torch.zeros_like(p) for n, p in w.items()}
    d = {n: torch.zeros_like(p) for n, p in w.items()}
    tolerance = 1e-10 if estimator == "gauss_newton" else 1e-5  # rounding, over h
    for step in range(3):
        start = 0 if step != 1 else 1
        batches = [
            TensorDataset(x[a : a + n], y[a : a + n]).tensors
            for a, n in ((10 * start, 10), (20 + 12 * start, 12))
        ]
        x_all, y_all = (torch.cat(part) for part in zip(*batches, strict=True))
        g = gradient(w, x_all, y_all)
        norm = sum((v**2).sum() for v in g.values()).sqrt()
        displaced = {n: w[n] + rho * g[n] / norm for n in w}
        g_hat = gradient(displaced, x_all, y_all)
        if step % 2 == 0:
            micro = [[(bx[:6], by[:6]) for bx, by in batches], [(bx[6:], by[6:]) for bx, by in batches]]
            h = {n: torch.zeros_like(p) for n, p in w.items()}
            for number, shards in enumerate(micro):
                count = sum(len(x) for x, _ in shards)
                part = diagonal(displaced, step, number, shards)
                h = {n: h[n] + count / 22 * part[n] for n in w}
            h = {n: v.abs().clamp(min=0.3 * v.abs().mean()) for n, v in h.items()}
            d = {n: 0.999 * d[n] + 0.001 * h[n] for n in w}
            correction = 1 - 0.999 ** (step + 1)
        m = {n: 0.9 * m[n] + 0.1 * g_hat[n] for n in w}
        rate = 0.1 / (1 - 0.9 ** (step + 1))
        w = {n: w[n] - rate * m[n] / (d[n] / correction + 1e-2) for n in w}
    found = everything(run)["weights"]
    for name, expected in w.items():
        error = (found[name] - expected).abs().max()
        assert error <= tolerance, (name, error)
    run.close()


def a_mesh_of_one_rank_agrees() -> None:
    """Each rank's model is sharded over that rank alone: the other rank has no part in its estimate."""
    rank, ends = dist.get_global_rank(), []
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("models", "shards"))
    x, y = dataset(10 + 4 * rank).tensors
    for sharded in (False, True):
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3))
        if sharded:
            fully_shard(model, mesh=mesh["shards"])
        optimizer = SharpnessAwareOptimizer(
            SASSHA(model.parameters(), lr=0.05),
            SAMPerturbation(0.1),
            curvature=LazyCurvature(2, estimator="gauss_newton"),
            model=model,
            process_group=None if sharded else False,
        )

        def closure(model=model, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.backward(loss, logits=logits, labels=y, size=len(y))
            return loss.detach()

        for _ in range(3):
            optimizer.step(closure)
        ends.append(whole([*model.parameters()]))
    for expected, found in zip(*ends, strict=True):
        assert (found - expected).abs().max() <= 1e-12


def an_exception_leaves_the_weights(at_pass: int) -> None:
    """Also what FSDP2 has gathered of the displaced ones is forgotten."""
    run = build(sgd, [SAM(0.5)], callbacks=[])
    before = everything(run)["weights"]

    def throw(event: Event, state: Any, passes: int) -> None:
        if event == Event.AFTER_FORWARD and passes == at_pass:
            raise Injected

    run.state.callbacks.append(Spy(throw))
    try:
        run.fit()
    except Injected:
        pass
    else:
        raise AssertionError("nothing was thrown")
    assert_same(before, everything(run)["weights"])
    run.state.model.eval()
    unsharded = network().eval()
    with torch.no_grad():
        batch = dataset(6).tensors
        assert_same(unsharded(batch), run.state.model(batch))
    run.close()


def an_exception_in_the_second_evaluation() -> None:
    """Of an estimate by differences: FSDP2 forgets the weights that it has gathered there."""
    model, calls = network(), []
    run = build(sassha, [LazyHessian(2, estimator="finite_difference")], model=model)
    loss = model.loss

    def failing(outputs: Any, batch: Any) -> Tensor:
        calls.append(batch)
        if len(calls) == 2:
            raise Injected
        return loss(outputs, batch)

    model.loss = failing
    before = everything(run)["weights"]
    with contextlib.suppress(Injected):
        run.fit()
    assert len(calls) == 2
    assert_same(before, everything(run)["weights"])
    with torch.no_grad():
        batch = dataset(6).tensors
        assert_same(network().eval()(batch), run.state.model.eval()(batch))
    run.close()


def gradients_that_are_not_averaged_are_refused() -> None:
    """A loop that accumulates without communication would mix the estimate's gradients into its own."""
    model = fully_shard(nn.Sequential(nn.Linear(4, 3)))
    rule = SASSHA(model.parameters(), lr=0.1)
    optimizer = SharpnessAwareOptimizer(rule, curvature=LazyCurvature(estimator="gauss_newton"), model=model)
    model.set_requires_gradient_sync(False)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits, labels = model(torch.randn(6, 4)), torch.arange(6) % 3
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.backward(loss, logits=logits, labels=labels)
        return loss

    try:
        optimizer.step(closure)
    except RuntimeError as error:
        assert "model.set_requires_gradient_sync(True)" in str(error)
    else:
        raise AssertionError("nothing was said")


def zeros_are_counted_on_all_ranks() -> None:
    model = fully_shard(nn.Linear(4, 3, bias=False))
    (p,) = model.parameters()
    p.grad = torch.ones_like(p)
    rule = SASSHA([p])
    (part,) = local([p])
    rule.update_curvature({p: torch.full_like(part, dist.get_global_rank())})
    assert rule.zero_fraction() == 2 / 3  # rank 0 holds two of the three rows


def blocks_that_shards_would_cut_are_refused() -> None:
    model = fully_shard(nn.Linear(6, 6))
    try:
        AdaHessian(model.parameters(), block_size=4)
    except ValueError as error:
        assert "block_size=4 is not allowed for a sharded parameter of shape (6, 6)" in str(error)
    else:
        raise AssertionError("nothing was said")


def a_plain_loop_needs_the_model() -> None:
    model = fully_shard(nn.Linear(4, 2))
    optimizer = SharpnessAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAMPerturbation(0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except ValueError as error:
        assert "sharded parameters need model=" in str(error)
    else:
        raise AssertionError("nothing was said")
    before = whole([*model.parameters()])
    optimizer.model = optimizer.runner.model = model
    optimizer.step(closure)
    assert not torch.equal(before[0], whole([*model.parameters()])[0])


OTHERS = [
    a_mesh_of_one_rank_agrees,
    an_exception_in_the_second_evaluation,
    gradients_that_are_not_averaged_are_refused,
    zeros_are_counted_on_all_ranks,
    blocks_that_shards_would_cut_are_refused,
    a_plain_loop_needs_the_model,
]


def checks_in(out: Path) -> dict[str, Callable[[], None]]:
    """Return every check by its name, in the order in which they run; `out` is for their files."""
    checks = {f"agrees[{name}]": partial(agrees, name) for name in PERTURBED}
    for estimator, rho in ESTIMATED:
        checks[f"curvature_agrees[{estimator}-{rho}]"] = partial(curvature_agrees, estimator, rho)
    for name in ACROSS:
        checks[f"loads[{name}]"] = partial(loads, name, out / "from_one" / name)
        checks[f"saves[{name}]"] = partial(save, name, out / "from_two" / name)
    for kind in KINDS:
        folder = out / "checkpoints" / kind
        for name in RESUMED:
            checks[f"resumes[{name}-{kind}]"] = partial(resumes, name, kind, folder / name)
        for before, after in CHANGES:
            part = folder / f"{before}_{after}"
            checks[f"changes[{before}-{after}-{kind}]"] = partial(changes, before, after, kind, part)
    for number in (1, 2):
        checks[f"an_exception_leaves_the_weights[{number}]"] = partial(
            an_exception_leaves_the_weights, number
        )
    return checks | {check.__name__: check for check in OTHERS}


def main(out: Path, names: Sequence[str]) -> None:
    """Run the named checks of `checks_in`."""
    warnings.simplefilter("ignore")
    found = checks_in(out)
    run_checks(
        {name: found[name] for name in found if name in names}, out, double=lambda name: "agrees" in name
    )
