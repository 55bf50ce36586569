"""How often a step waits for a device and how much it launches and allocates, counted and not timed."""

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from composer_sassha import SASSHA, SharpnessAwareOptimizer
from composer_sassha.curvature import LazyCurvature
from composer_sassha.optim.driver import LOOK_EVERY
from composer_sassha.perturbations import (
    ASAMPerturbation,
    ESAMPerturbation,
    GSAMPerturbation,
    LookSAMPerturbation,
    MSAMPerturbation,
    SAMPerturbation,
    SSAMPerturbation,
    USAMPerturbation,
)

READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "cpu")


class Calls(TorchFunctionMode):
    """Counts the calls that read a tensor: of one on a CPU, `tolist` is no operation."""

    reads = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.reads += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts operations, those of them that read a tensor, and the memory that they allocate."""

    def __init__(self):
        super().__init__()
        self.launches = self.reads = self.allocations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.reads += name in ("_local_scalar_dense", "is_nonzero", "equal")
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        new = [storage for storage in made if storage._cdata not in known]
        self.launches += bool(new) or name.endswith("_")
        self.allocations += len(new)
        self.bytes += sum(storage.nbytes() for storage in new)
        return result


def stepper(perturbation=None, rule=torch.optim.SGD, device="cpu", interval=1, **rule_settings):
    """Return an optimizer and a function that takes a step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    base = rule(model.parameters(), lr=0.05, **rule_settings)
    curvature = LazyCurvature(interval=2) if rule is SASSHA else None
    optimizer = SharpnessAwareOptimizer(base, perturbation, interval, curvature=curvature, model=model)
    x, y = torch.randn(6, 4).to(device), torch.arange(6).remainder(2).to(device)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.backward(loss)
        return loss

    return optimizer, lambda: optimizer.step(closure)


def counted(perturbation, step=2, **settings):
    """Return the operations, and the number of reads, of a step after some others."""
    optimizer, take = stepper(perturbation, **settings)
    for _ in range(step):
        take()
    # These look at once only at what is on the host already.
    optimizer.watch._warned_of_norm = optimizer.refresh._warned_of_zeros = True
    with Calls() as calls, Operations() as operations:
        take()
    assert optimizer.steps_taken == step + 1
    return operations, max(calls.reads, operations.reads)


SGD = {"momentum": 0.9}
STEPS = [
    ("SAM", SAMPerturbation(), SGD, 0),
    ("SAM, p = inf", SAMPerturbation(p=float("inf")), SGD, 0),
    ("ASAM", ASAMPerturbation(), SGD, 0),
    ("USAM", USAMPerturbation(), SGD, 0),
    ("ESAM", ESAMPerturbation(), SGD, 0),
    ("MSAM", MSAMPerturbation(), SGD, 0),
    ("GSAM", GSAMPerturbation(), SGD, 1),
    ("SSAM", SSAMPerturbation(), SGD, 1),
    ("LookSAM, ascent", LookSAMPerturbation(), {**SGD, "interval": 2}, 1),
    ("LookSAM, between", LookSAMPerturbation(), {**SGD, "interval": 2, "step": 3}, 1),
    ("SASSHA, refresh", SAMPerturbation(), {"rule": SASSHA}, 1),
    ("SASSHA, no refresh", SAMPerturbation(), {"rule": SASSHA, "step": 3}, 0),
    ("M-SASSHA, refresh", MSAMPerturbation(), {"rule": SASSHA}, 1),
    ("M-SASSHA, no refresh", MSAMPerturbation(), {"rule": SASSHA, "step": 3}, 0),
]


@pytest.mark.parametrize(
    ("perturbation", "settings", "most"), [row[1:] for row in STEPS], ids=[row[0] for row in STEPS]
)
def test_a_step_reads_back(perturbation, settings, most):
    _, reads = counted(perturbation, **settings)
    assert reads == most


def test_the_counts_see_every_kind_of_read():
    t = torch.ones(1)
    with Calls() as calls, Operations() as operations:
        assert (t.item(), t.tolist(), bool(t), float(t), t.numpy()[0]) == (1.0, [1.0], True, 1.0, 1.0)
        t.add_(1.0).mul(2.0)
    assert calls.reads == 5 and operations.reads == 3
    assert (operations.launches, operations.allocations, operations.bytes) == (2, 1, 4)


@pytest.mark.parametrize(
    "perturbation",
    [SAMPerturbation(), SAMPerturbation(p=float("inf")), ASAMPerturbation(), USAMPerturbation()],
    ids=repr,
)
def test_a_device_never_waits(perturbation):
    """On the meta device there is nothing to read, and the attempt is an error."""
    optimizer, take = stepper(perturbation, device="meta")
    optimizer.watch._looks = 1
    for _ in range(2):
        take()
    assert optimizer.metrics["grad_norm"].is_meta and optimizer.steps_taken == 2
    optimizer.watch._looks = LOOK_EVERY
    with pytest.raises(NotImplementedError, match="meta"):  # now all norms are looked at
        take()


if __name__ == "__main__":  # python -m tests.optim.test_counts
    print("| step | launches | read-backs | allocations | bytes |")
    for name, perturbation, settings, _ in STEPS:
        ops, reads = counted(perturbation, **settings)
        print(f"| {name} | {ops.launches} | {reads} | {ops.allocations} | {ops.bytes} |")
