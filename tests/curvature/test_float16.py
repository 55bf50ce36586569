"""Second derivatives in float16: normalisation that sums over pixels, and activation checkpoints."""

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from composer_sassha import SAM, SASSHA, ClosureGradScaler, LazyHessian, SharpnessAwareOptimizer
from composer_sassha.curvature import ESTIMATORS, LazyCurvature, NormsInFloat32
from composer_sassha.perturbations import SAMPerturbation
from tests.helpers import CLASSES, assert_same, copied, trainer
from tests.methods import sassha

NORMS = {
    "BatchNorm2d": nn.BatchNorm2d(4),
    "F.batch_norm": lambda x: F.batch_norm(input=x, running_mean=None, running_var=None, training=True),
    "torch.batch_norm": lambda x: torch.batch_norm(
        input=x,
        weight=None,
        bias=None,
        running_mean=None,
        running_var=None,
        training=True,
        momentum=0.1,
        eps=1e-5,
        cudnn_enabled=True,
    ),
    "InstanceNorm2d": nn.InstanceNorm2d(4),
    "InstanceNorm2d(affine)": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "F.instance_norm": lambda x: F.instance_norm(input=x),
    "torch.instance_norm": lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, True),
}


class Wide(nn.Module):
    """Normalises activations of about 3 over many pixels."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), norm, nn.Linear(4, 3)
        with torch.no_grad():
            self.conv.weight.mul_(6)

    def forward(self, x):
        return self.head(F.silu(self.norm(self.conv(x))).mean(dim=(2, 3)))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_norm_over_many_pixels_has_a_hessian_in_float16(norm):
    # 96 x 96 squares of about 9 are more than float16 holds, whatever the loss is scaled with.
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(2, 1, 96, 96, generator=generator), torch.randint(3, (2,), generator=generator)
    found = []
    for half in (False, True):
        model = Wide(norm)
        base = SASSHA(model.parameters(), lr=0.01)
        optimizer = SharpnessAwareOptimizer(
            base, SAMPerturbation(0.01), curvature=LazyCurvature(), model=model
        )
        scaler = ClosureGradScaler("cpu", init_scale=2.0**10, enabled=half)

        def closure(half=half, model=model, optimizer=optimizer, scaler=scaler):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = F.cross_entropy(model(x), y)
            optimizer.backward(loss, scaler=scaler)
            return loss.detach()

        assert scaler.step(optimizer, closure=closure) is not None
        assert optimizer.param_groups[0]["refreshes"] == 1
        found.append(base.state[model.head.weight]["exp_hessian"])
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize(
    ("name", "layer"), [("batch_norm", nn.BatchNorm2d), ("instance_norm", nn.InstanceNorm2d)]
)
def test_only_float16_is_cast_and_the_context_leaves_nothing_behind(name, layer, monkeypatch):
    real, seen = getattr(torch, name), []

    def watched(x, *args):
        seen.append(x.dtype)
        return real(x, *args)

    monkeypatch.setattr(torch, name, watched)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    given = [torch.randn(2, 4, 3, 3).to(dtype) for dtype in dtypes]
    with pytest.raises(ZeroDivisionError), NormsInFloat32():
        for x in given:
            norm = layer(4, affine=True).to(torch.promote_types(x.dtype, torch.float32))
            assert norm(x).dtype == x.dtype
        assert layer(4, affine=True).half()(given[0]).dtype == torch.float16
        raise ZeroDivisionError
    # The last layer is in float16 by the user's own wish.
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float16]
    assert getattr(torch, name) is watched


class Checkpointed(nn.Module):
    """Computes its activations again during the backward, if told to."""

    def __init__(self, again, norm):
        super().__init__()
        torch.manual_seed(6)
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.SiLU(), nn.Dropout(0.2))
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.SiLU())
        self.head = nn.Linear(16, CLASSES)
        self.again = again

    def forward(self, x):
        for part in (self.first, self.second):
            x = checkpoint(part, x, use_reentrant=False) if self.again else part(x)
        return self.head(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activation_checkpoints_change_nothing(estimator, norm, half):
    ends = []
    for again in (False, True):
        run = trainer(
            sassha,
            [SAM(rho=0.1), LazyHessian(2, estimator=estimator)],
            model=ComposerClassifier(Checkpointed(again, norm), num_classes=CLASSES),
            max_duration="4ba",
            device_train_microbatch_size=5,
            **({} if estimator == "finite_difference" else half),  # that one is refused in float16
        )
        run.fit()
        (optimizer,) = run.state.optimizers
        assert optimizer.steps_taken == 4 and optimizer.param_groups[0]["refreshes"] == 2
        # Not the buffers: BatchNorm's statistics see an activation that is computed again twice.
        ends.append(copied([list(run.state.model.parameters()), optimizer.state_dict()]))
        run.close()
    assert_same(*ends)
