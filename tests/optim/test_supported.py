"""What the wrapper refuses before a step changes anything, and what it takes as the base optimizer does."""

import collections
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from composer_sassha import SASSHA, ClosureGradScaler, SharpnessAwareOptimizer
from composer_sassha.curvature import LazyCurvature
from composer_sassha.perturbations import GSAMPerturbation, MSAMPerturbation, SAMPerturbation
from composer_sassha.sharpness import Objective
from tests.helpers import assert_same, copied


@pytest.fixture
def alone():
    """A process group of one rank; another test may have left one."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if made:
        dist.destroy_process_group()


def step(optimizer, model, count=1):
    for _ in range(count):

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().mean()
            optimizer.backward(loss)
            return loss

        optimizer.step(closure)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **settings)


@pytest.mark.parametrize(
    ("perturbation", "curvature"),
    [(SAMPerturbation(), None), (GSAMPerturbation(), None), (None, LazyCurvature())],
)
def test_a_static_graph_is_refused_before_anything_trained(perturbation, curvature, alone):
    model = DistributedDataParallel(nn.Linear(3, 2), static_graph=True)
    base = sgd(model) if curvature is None else SASSHA(model.parameters())
    optimizer = SharpnessAwareOptimizer(base, perturbation, curvature=curvature, model=model)
    before = copied(model.state_dict())
    with pytest.raises(ValueError, match="set static_graph=False") as error:
        step(optimizer, model)
    assert "\n" not in str(error.value)
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("perturbation", [None, MSAMPerturbation()])
def test_one_plain_pass_takes_a_static_graph(perturbation, alone):
    model = DistributedDataParallel(nn.Linear(3, 2), static_graph=True)
    step(SharpnessAwareOptimizer(sgd(model), perturbation, model=model), model, count=3)


def test_a_base_that_shards_its_state_is_refused(alone):
    model = DistributedDataParallel(nn.Linear(3, 2))
    base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer is not supported.*fully_shard"):
        step(SharpnessAwareOptimizer(base, SAMPerturbation(), model=model), model)


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_parameters_that_fsdp1_flattened_are_refused(mark):
    model = nn.Linear(3, 2)
    setattr(model.weight, mark, True)
    with pytest.raises(ValueError, match=r"\(FSDP1\) is not supported.*fully_shard"):
        step(SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), model=model), model)


def test_a_change_of_settings_is_checked_again(alone):
    model = DistributedDataParallel(nn.Linear(3, 2), static_graph=True)
    optimizer = SharpnessAwareOptimizer(sgd(model), model=model)
    step(optimizer, model)
    optimizer.set_perturbation(SAMPerturbation())
    with pytest.raises(ValueError, match="static_graph"):
        step(optimizer, model)


@pytest.mark.parametrize("wrong", [True, 0, "world", [0]])
def test_what_is_no_process_group_is_refused_in_one_line(wrong):
    params = [nn.Parameter(torch.ones(1))]
    for build in (
        lambda: SharpnessAwareOptimizer(torch.optim.SGD(params, lr=0.1), process_group=wrong),
        lambda: ClosureGradScaler("cpu", process_group=wrong),
        lambda: Objective({"w": params[0]}, torch.sum, [(params[0], 1)], process_group=wrong),
    ):
        with pytest.raises(TypeError, match=r"process_group=.* is not allowed; it must be a") as error:
            build()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [None, False])
def test_one_rank_is_asked_for_no_group(given, alone):
    model = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(SharpnessAwareOptimizer(sgd(model), GSAMPerturbation(), model=model, process_group=given), model)


class WithBuffer(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("kept", buffer)

    def forward(self, x):
        return self.linear(x)


BUFFERS = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_that_cannot_be_copied_into_are_no_obstacle(kind):
    model = WithBuffer(BUFFERS[kind]())
    buffer = model.kept
    step(SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), model=model), model)
    assert model.kept is buffer


def test_lazy_modules_train_and_keep_statistics_of_one_pass():
    torch.manual_seed(0)
    model, plain = (nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d(affine=False)) for _ in range(2))
    plain[0].load_state_dict(model[0].state_dict())
    step(SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), model=model), model)
    plain(torch.ones(2, 3))
    assert_same(copied(plain[1].state_dict()), copied(model[1].state_dict()))


def test_frozen_parameters_of_other_dtypes_are_left_alone():
    model = nn.Linear(3, 2)
    frozen = [
        nn.Parameter(torch.ones(2, dtype=d), requires_grad=False) for d in (torch.int8, torch.complex64)
    ]
    base = torch.optim.AdamW([*model.parameters(), *frozen], lr=0.1)
    step(SharpnessAwareOptimizer(base, SAMPerturbation(), model=model), model)
    assert all(torch.equal(p, torch.ones_like(p)) for p in frozen)


def test_the_state_can_be_replaced_as_that_of_any_optimizer():
    model = nn.Linear(3, 2)
    optimizer = SharpnessAwareOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), SAMPerturbation(), model=model
    )
    step(optimizer, model, 2)
    optimizer.state = collections.defaultdict(dict)
    assert optimizer.base_optimizer.state is optimizer.state
    step(optimizer, model, 2)
    assert optimizer.state[model.weight]["step"] == 2


def test_editing_a_state_dict_does_not_edit_the_state():
    # Composer does, for save_ignore_keys.
    model = nn.Linear(3, 2)
    optimizer = SharpnessAwareOptimizer(sgd(model), SAMPerturbation(), model=model)
    step(optimizer, model)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry.clear()
    for group in saved["param_groups"]:
        group.clear()
    assert optimizer.state[model.weight].keys() == {"momentum_buffer"}
    assert optimizer.param_groups[0]["lr"] == 0.1
