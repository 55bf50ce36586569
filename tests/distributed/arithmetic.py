"""Checks of what two ranks compute together against plain arithmetic."""

import copy

import torch
from composer.algorithms import GradientClipping
from composer.models import ComposerClassifier, ComposerModel
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from composer_sassha import GSAM, SASSHA, SSAM, LookSAM, Sassha, SharpnessAwareOptimizer
from composer_sassha.curvature import rademacher
from tests.algorithms.test_sassha import Separable, scalars
from tests.helpers import copied, images, trainer


def recording(model: ComposerModel) -> list:
    """Record the microbatches that a model's loss sees."""
    seen, loss = [], model.loss

    def recorded(outputs, batch):
        seen.append(copied(batch))
        return loss(outputs, batch)

    model.loss = recorded
    return seen


def separable(microbatch: int) -> None:
    """The diagonal is the mean of the analytic ones at the points that the two ranks have perturbed to."""
    model = Separable("scalar")
    seen = recording(model)
    p, a = model.p.detach().clone(), model.a
    x = torch.linspace(0.5, 2.0, 20, dtype=torch.float64)
    run = trainer(
        lambda params: SASSHA(params, lr=0.1, betas=(0.9, 0.0)),
        [Sassha(rho=0.3)],
        model=model,
        dataset=scalars(20),
        max_duration="1ba",
        device_train_microbatch_size=microbatch,
    )
    run.fit()
    (state,) = run.state.optimizers[0].state.values()
    expected = torch.zeros_like(p)
    shards = dist.all_gather_object(torch.cat([x for x, _ in seen[: len(seen) // 2]]))  # of the first pass
    assert torch.equal(torch.cat(shards).sort().values, x)
    for shard in shards:
        g = -shard.mean() * a * p.sin()
        expected += -shard.mean() * a * (p + 0.3 * g / g.norm()).cos() / 2
    assert (state["exp_hessian"] - expected.abs()).abs().max() <= 1e-12
    run.close()


def one_process_agrees(microbatch: int, uneven: bool = False) -> None:
    """With a synchronized ascent, two ranks take the step of one process on the whole batch."""
    x, y = images(20).tensors
    kwargs = {}
    if uneven:  # one rank has 6 samples, the other 14
        mine = slice(0, 6) if dist.get_global_rank() == 0 else slice(6, 20)
        own = TensorDataset(x[mine].double(), y[mine])
        sampler = DistributedSampler(own, num_replicas=1, rank=0)
        kwargs["train_dataloader"] = DataLoader(own, batch_size=len(own), sampler=sampler)
    torch.manual_seed(17)
    model = ComposerClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3)).double(), num_classes=3
    )
    seen = recording(model)
    reference = copy.deepcopy(model.module)
    w = {name: p.detach() for name, p in reference.named_parameters()}
    run = trainer(
        lambda params: SASSHA(params, lr=0.1),
        [Sassha(rho=0.3, sync_ascent=True)],
        model=model,
        dataset=TensorDataset(x.double(), y),
        max_duration="1ba",
        device_train_microbatch_size=microbatch,
        **kwargs,
    )
    run.fit()

    # The same by hand, with the probes that each rank and microbatch has drawn.
    shards = dist.all_gather_object(seen[: len(seen) // 2])
    pieces = [(rank, k, x, y) for rank, shard in enumerate(shards) for k, (x, y) in enumerate(shard)]
    total = sum(len(x) for _, _, x, _ in pieces)
    assert total == 20

    def loss(params, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(reference, params, (x,)), y)

    def gradient(params):
        grads = [torch.func.grad(loss)(params, x, y) for _, _, x, y in pieces]
        shares = [len(x) / total for _, _, x, _ in pieces]
        return {n: sum(s * g[n] for s, g in zip(shares, grads, strict=True)) for n in params}

    g = gradient(w)
    norm = sum((v**2).sum() for v in g.values()).sqrt()
    displaced = {n: w[n] + 0.3 * g[n] / norm for n in w}
    g_hat = gradient(displaced)
    h = {n: torch.zeros_like(v) for n, v in w.items()}
    for rank, k, x, y in pieces:
        z = dict(zip(w, rademacher([*w.values()], (0, 0, rank, k, 0)), strict=True))
        hz = torch.func.jvp(lambda p, x=x, y=y: torch.func.grad(loss)(p, x, y), (displaced,), (z,))[1]
        h = {n: h[n] + len(x) / total * z[n] * hz[n] for n in h}
    for name, p in model.module.named_parameters():
        expected = w[name] - 0.1 * g_hat[name] / (h[name].abs().sqrt() + 1e-4)
        assert (p - expected).abs().max() <= 1e-9, name
    run.close()


def gsam_combines(sync_ascent: bool) -> None:
    """Each rank combines its own gradients and the results are averaged; or averaged ones are combined."""
    x, y = images(20).tensors
    torch.manual_seed(17)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model = ComposerClassifier(net, num_classes=3)
    seen = recording(model)
    reference = copy.deepcopy(net)
    w = {name: p.detach() for name, p in reference.named_parameters()}
    run = trainer(
        lambda params: torch.optim.SGD(params, lr=0.1),
        [GSAM(rho_max=0.3, alpha=0.5, sync_ascent=sync_ascent)],
        model=model,
        dataset=TensorDataset(x.double(), y),
        max_duration="1ba",
        device_train_microbatch_size=7,
    )
    run.fit()

    shards = dist.all_gather_object([torch.cat(part) for part in zip(*seen[: len(seen) // 2], strict=True)])
    if sync_ascent:  # the gradients are those of the whole batch
        shards = [[torch.cat(part) for part in zip(*shards, strict=True)]]

    def gradient(params, shard):
        def loss(params):
            return nn.functional.cross_entropy(
                torch.func.functional_call(reference, params, (shard[0],)), shard[1]
            )

        return torch.func.grad(loss)(params)

    def inner(a, b):
        return sum((a[n] * b[n]).sum() for n in a)

    update = {n: torch.zeros_like(v) for n, v in w.items()}
    for shard in shards:
        g = gradient(w, shard)
        g_p = gradient({n: w[n] + 0.3 * g[n] / inner(g, g).sqrt() for n in w}, shard)
        along = inner(g, g_p) / inner(g_p, g_p)
        update = {n: update[n] + (g_p[n] - 0.5 * (g[n] - along * g_p[n])) / len(shards) for n in w}
    for name, p in net.named_parameters():
        assert (p - (w[name] - 0.1 * update[name])).abs().max() <= 1e-12, name
    run.close()


class Linear(ComposerModel):
    """A loss whose gradient is the data."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        return (batch[0] @ self.w).mean()

    def loss(self, outputs, batch):
        return outputs


def clips_what_is_applied() -> None:
    """Two gradients of norm 10 whose average has norm 0.5 give a step that needs no clipping."""
    x = torch.tensor([[10.0, 0.5]]) if dist.get_global_rank() == 0 else torch.tensor([[-10.0, 0.5]])
    for algorithm in (GSAM(), SSAM(), LookSAM()):
        loader = DataLoader(TensorDataset(x), sampler=DistributedSampler(x, num_replicas=1, rank=0))
        run = trainer(
            lambda params: torch.optim.SGD(params, lr=1.0),
            [algorithm, GradientClipping("norm", 1.0)],
            model=(model := Linear()),
            max_duration="1ba",
            train_dataloader=loader,
        )
        run.fit()
        run.close()

        plain = nn.parallel.DistributedDataParallel(loop := Linear())
        base = torch.optim.SGD(plain.parameters(), lr=1.0)
        optimizer = SharpnessAwareOptimizer(base, algorithm.perturbation, model=plain)

        def clip(*_, w=loop.w):
            nn.utils.clip_grad_norm_([w], 1.0)

        optimizer.register_step_pre_hook(clip)

        def closure(optimizer=optimizer, plain=plain):
            optimizer.zero_grad()
            loss = plain([x])
            optimizer.backward(loss)
            return loss

        optimizer.step(closure)
        for found in (model.w, loop.w):
            assert (found - torch.tensor([0.0, -0.5])).abs().max() <= 1e-6, (algorithm, found)
