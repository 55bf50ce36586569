"""The methods on a GPU, in the precisions that they support there."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from composer.devices import DeviceGPU
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch.utils.data import TensorDataset
from torchvision.models import VisionTransformer

from composer_sassha import SAM, SASSHA, ClosureGradScaler
from composer_sassha.recipes.models import CIFARResNet
from tests.helpers import assert_same, digits, everything, method_trainer, trainer
from tests.methods import METHODS, NAMED, sassha, sgd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.fixture(autouse=True)
def _switches():
    """Put back what `deterministic_mode` and `DeviceGPU` set for the whole process."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


def on_cpu(state):
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, list) else state


def device():
    """A GPU that multiplies in full float32: differences of gradients are refused elsewhere."""
    return DeviceGPU(allow_tf32=False)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
def test_trains(method, precision):
    if method.name == "sassha_difference" and precision != "fp32":
        pytest.skip("differences need fp32")
    if method.optimizer is sassha and precision == "amp_bf16":
        # An entry of the Hessian that rounds to 0 leaves the gradient to be divided by eps.
        method = replace(method, optimizer=partial(SASSHA, lr=0.05, weight_decay=1e-2, eps=1e-2))
    log = InMemoryLogger()
    run = method_trainer(method, device=device(), precision=precision, max_duration="12ep", loggers=[log])
    run.fit()
    losses = [value for _, value in log.data["loss/train/total"]]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    run.close()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_resumes_bit_for_bit(method, tmp_path):
    settings = {"precision": "fp32", "deterministic_mode": True}  # a GPU trains in amp_fp16 otherwise
    run = method_trainer(
        method,
        device=device(),
        save_folder=str(tmp_path),
        save_interval="1ba",
        save_filename="ba{batch}.pt",
        **settings,
    )
    run.fit()
    expected = on_cpu(everything(run))
    run.close()
    for batch in (1, 3, 6):
        resumed = method_trainer(
            method, device=device(), load_path=str(tmp_path / f"ba{batch}.pt"), **settings
        )
        resumed.fit()
        assert_same(expected, on_cpu(everything(resumed)))
        resumed.close()


def test_the_second_pass_leaves_no_trace():
    ends = []
    for algorithms in ([], [SAM(rho=0.0)]):
        run = trainer(sgd, algorithms, device=device(), precision="fp32", deterministic_mode=True)
        run.fit()
        (optimizer,) = run.state.optimizers
        ends.append(on_cpu([dict(run.state.model.state_dict()), optimizer.state_dict()["state"]]))
        run.close()
    assert_same(*ends)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "sassha_difference"], ids=str)
def test_recovers_in_fp16_from_far_too_large_a_scale(method):
    run = method_trainer(method, device=device(), precision="amp_fp16", max_duration="15ep")
    scaler = run.state.scaler
    assert isinstance(scaler, ClosureGradScaler)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**24})
    run.fit()
    (optimizer,) = run.state.optimizers
    assert optimizer.steps_taken + optimizer.skipped_steps == 60 and optimizer.steps_taken > 30
    assert all(p.isfinite().all() for p in run.state.model.parameters())
    run.close()


def resnet():
    return CIFARResNet(20, 10)


def vit():
    return VisionTransformer(32, 8, 4, 4, 64, 128, num_classes=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam_sgd", "sassha", "msassha", "none_adahessian"])
@pytest.mark.parametrize("build", [resnet, vit])
def test_precisions_end_alike(build, name):
    """Over three seeds the final losses differ by no more than those of the seeds do."""
    small = digits(1437).tensors
    x = torch.nn.functional.interpolate(small[0], size=(32, 32)).expand(-1, 3, -1, -1).contiguous()
    ends = {}
    for precision in ("fp32", "amp_bf16", "amp_fp16"):
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            log = InMemoryLogger()
            run = method_trainer(
                NAMED[name],
                model=ComposerClassifier(build(), num_classes=10),
                dataset=TensorDataset(x, small[1]),
                batch_size=128,
                device=device(),
                precision=precision,
                seed=seed,
                max_duration="8ep",
                loggers=[log],
            )
            run.fit()
            (optimizer,) = run.state.optimizers
            assert optimizer.steps_taken + optimizer.skipped_steps == run.state.timestamp.batch
            losses.append(sum(float(v) for _, v in log.data["loss/train/total"][-10:]) / 10)
            run.close()
        ends[precision] = torch.tensor(losses)
    noise = max(float(losses.std()) for losses in ends.values())
    for precision in ("amp_bf16", "amp_fp16"):
        assert abs(float(ends[precision].mean() - ends["fp32"].mean())) <= 3 * noise + 0.02
