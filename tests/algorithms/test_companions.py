"""Our methods together with Composer's other algorithms: what works, what is refused, and what results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from composer import algorithms as others
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import (
    apply_low_precision_layernorm,
)
from composer.core import Algorithm, Event, Precision
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier, ComposerModel, HuggingFaceModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck
from transformers import BertConfig, BertForMaskedLM

from composer_sassha import (
    ASAM,
    ESAM,
    GSAM,
    MSAM,
    SAM,
    SASSHA,
    SSAM,
    USAM,
    FollowLR,
    LazyHessian,
    LookSAM,
    MSassha,
    Sassha,
    Schedule,
    SharpnessAwareOptimizer,
)
from composer_sassha.perturbations import SAMPerturbation
from tests.helpers import Injected, Spy, assert_same, copied, rng_states, trainer
from tests.methods import Method, sassha, sgd

pytestmark = [
    pytest.mark.filterwarnings("ignore::composer.algorithms.warnings.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoints with layer freezing"),
    pytest.mark.filterwarnings("ignore:GyroDropout is not implemented"),
    pytest.mark.filterwarnings("ignore:SWA has known issues"),
    pytest.mark.filterwarnings("ignore:Some targets have less than 1 total"),
    pytest.mark.filterwarnings("ignore:Cannot split tensor of length"),
]

PIXELS = 8


def images(count=48):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 2, PIXELS, PIXELS, generator=generator)
    return TensorDataset(x, (x[:, 0].mean(dim=(1, 2)) > 0).long() + (x[:, 1, 0, 0] > 0).long())


def convolutions():
    """All that Composer's algorithms look for: strides, pooling, norms, dropout; any size of image."""
    torch.manual_seed(11)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Dropout(0.2),
        nn.Linear(8, 3),
    )
    return ComposerClassifier(net, num_classes=3)


def residual():
    """torchvision's bottlenecks, the only blocks that StochasticDepth knows."""
    torch.manual_seed(12)
    blocks = [Bottleneck(16, 4) for _ in range(3)]
    net = nn.Sequential(nn.Conv2d(2, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    return ComposerClassifier(net, num_classes=3)


def bert():
    torch.manual_seed(13)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    return HuggingFaceModel(BertForMaskedLM(config), use_logits=True)


def sentences():
    ids = torch.randint(5, 30, (48, 16), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]


@dataclass(frozen=True)
class Companion:
    """One of Composer's algorithms, a model that it changes, and whether such a run resumes bit for bit."""

    name: str
    algorithms: Callable[[], list[Algorithm]]
    model: Callable[[], Any] = convolutions
    data: Callable[[], Any] = images
    resumes: bool = True

    def __str__(self):
        return self.name

    def trainer(self, method, **kwargs):
        """A Trainer over three epochs of two batches."""
        return trainer(
            method.optimizer,
            [*method.algorithms(), *self.algorithms()],
            model=self.model(),
            dataset=self.data(),
            **{"batch_size": 24, "max_duration": "3ep", **kwargs},
        )


class Norms(others.LowPrecisionLayerNorm):
    """Replaces the norms on the CPU too, where they compute in full precision."""

    def apply(self, event, state, logger):
        apply_low_precision_layernorm(state.model, Precision.AMP_BF16, state.optimizers)


def factorize():
    return [others.Factorize(min_channels=2, latent_channels=2, min_features=2, latent_features=1)]


def depth(method):
    return lambda: [others.StochasticDepth("ResNetBottleneck", method, drop_rate=0.5)]


def length():
    return [others.SeqLengthWarmup(0.6, min_seq_length=8, max_seq_length=16, step_size=4)]


COMPANIONS = [
    Companion("ema", lambda: [others.EMA("3ba")]),
    Companion("ema_epochs", lambda: [others.EMA("1ep", ema_start="1ep")]),
    Companion("swa", lambda: [others.SWA("1ep", "2ep", update_interval="1ba")]),
    Companion("swa_lr", lambda: [others.SWA("1ep", "2ep", "1ba", schedule_swa_lr=True)]),
    Companion("label_smoothing", lambda: [others.LabelSmoothing(0.1)]),
    Companion("mixup", lambda: [others.MixUp(1.0)]),
    Companion("mixup_loss", lambda: [others.MixUp(1.0, interpolate_loss=True)]),
    Companion("cutmix", lambda: [others.CutMix(1.0)]),
    Companion("cutmix_loss", lambda: [others.CutMix(1.0, interpolate_loss=True)]),
    Companion("ghost_batchnorm", lambda: [others.GhostBatchNorm(3)]),
    Companion("low_precision_groupnorm", lambda: [others.LowPrecisionGroupNorm()]),
    Companion("low_precision_layernorm", lambda: [Norms(Event.INIT)]),
    Companion("norms_before_load", lambda: [Norms(Event.BEFORE_LOAD)]),
    # New parameters after the state has been loaded: the old ones' momentum is lost.
    Companion("norms_after_load", lambda: [Norms(Event.AFTER_LOAD)], resumes=False),
    Companion("clip_norm", lambda: [others.GradientClipping("norm", 0.1)]),
    Companion("clip_value", lambda: [others.GradientClipping("value", 0.01)]),
    Companion("clip_adaptive", lambda: [others.GradientClipping("adaptive", 0.01)]),
    # torch cannot write down the state of parameters that have left the optimizer.
    Companion("layer_freezing", lambda: [others.LayerFreezing(0.0, 1.0)], resumes=False),
    Companion("selective_backprop", lambda: [others.SelectiveBackprop(0.2, 0.9, 0.5)]),
    Companion("cutout", lambda: [others.CutOut()]),
    Companion("colout", lambda: [others.ColOut()]),
    Companion("progressive_resizing", lambda: [others.ProgressiveResizing(delay_fraction=0.3)]),
    Companion("squeeze_excite", lambda: [others.SqueezeExcite(2, min_channels=8)]),
    Companion("blurpool", lambda: [others.BlurPool(min_channels=2)]),
    Companion("channels_last", lambda: [others.ChannelsLast()]),
    Companion("factorize", factorize),
    Companion("weight_standardization", lambda: [others.WeightStandardization()]),
    Companion("stochastic_depth", depth("block"), residual),
    Companion("stochastic_samples", depth("sample"), residual),
    Companion("gated_linear_units", lambda: [others.GatedLinearUnits()], bert, sentences),
    Companion("alibi", lambda: [others.Alibi(16)], bert, sentences),
    # Its look for the longest sentence that fits draws random numbers, in the resumed run again.
    Companion("seq_length_warmup", length, bert, sentences, resumes=False),
]
each_companion = pytest.mark.parametrize("companion", COMPANIONS, ids=str)
NAMED = {companion.name: companion for companion in COMPANIONS}

PLAIN = Method("sgd", sgd, list)
SASSHA_METHOD = Method("sassha", sassha, lambda: [Sassha(rho=0.1, hessian_interval=2)])
METHODS = [
    Method("sam", sgd, lambda: [SAM(rho=0.1)]),
    Method("esam", sgd, lambda: [ESAM(rho=0.1)]),
    SASSHA_METHOD,
    Method("msassha", sassha, lambda: [MSassha(rho=0.1, hessian_interval=2)]),
    Method("partial", sgd, lambda: [SAM(rho=0.1, ascent_fraction=0.5)]),
]
REFUSED = ("mixup", "mixup_loss", "cutmix", "cutmix_loss", "ghost_batchnorm")
# By these methods, with these words.
REFUSING = {
    "esam": r"ESAM: .*leave it out, or set gamma=1",
    "partial": r" works on whole batches, .*leave it out, or set ascent_fraction=1",
}


def adapted(method, companion):
    """Return the method, with the settings that ESAM needs for batches that are dictionaries."""
    if method.name == "esam" and companion.data is sentences:  # one loss a token: nothing to select by
        return Method("esam", sgd, lambda: [ESAM(rho=0.1, gamma=1.0)])
    return method


def outcome(run):
    """Weights, buffers, optimizer state in the order of the weights, RNG states and metrics."""
    (optimizer,) = run.state.optimizers
    model, state = run.state.model, optimizer.state
    momenta = {name: state[p] for name, p in model.named_parameters() if p in state}
    return copied([model.state_dict(), momenta, rng_states(), run.state.train_metric_values])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Sassha's step has all that a companion can meet: two passes, and a refresh. ESAM and a partial ascent also
# cut batches. M-SASSHA's only pass and SAM's two are parts of Sassha's step.
CUTTING = ("esam", "partial")
CHANGED = (*REFUSED, "label_smoothing", "selective_backprop", "ema", "layer_freezing", "progressive_resizing")
IN_ONE_PASS = ("ema", "swa", "layer_freezing", "factorize", "norms_after_load")


def pairs():
    """Yield every method with every companion, slow where another pair shows the same."""
    for companion in COMPANIONS:
        for method in METHODS:
            by_default = (
                method is SASSHA_METHOD
                or (method.name in CUTTING and companion.name in CHANGED)
                or (method.name == "msassha" and companion.name in IN_ONE_PASS)
            )
            marks = [] if by_default else pytest.mark.slow
            yield pytest.param(method, companion, id=f"{method}-{companion}", marks=marks)


@pytest.mark.parametrize(("method", "companion"), list(pairs()))
def test_trains_with_a_companion_and_resumes_in_mid_epoch(method, companion, tmp_path):
    if method.name in REFUSING and companion.name in REFUSED:
        with pytest.raises(ValueError, match=REFUSING[method.name]) as error:
            companion.trainer(method)
        assert "\n" not in str(error.value)
        return
    method = adapted(method, companion)
    losses = InMemoryLogger()
    # EMA leaves its weights in the model where a checkpoint is due: let one be due in both runs.
    saving = {"save_interval": "3ba", "save_filename": "ba{batch}.pt"} if companion.resumes else {}
    run = companion.trainer(
        method, loggers=[losses], **saving, save_folder=str(tmp_path / "a") if saving else None
    )
    start = {name: p.detach().clone() for name, p in run.state.model.named_parameters()}
    run.fit()
    end = dict(run.state.model.named_parameters())
    assert all(torch.isfinite(p).all() for p in end.values())
    assert any(p.shape == start[name].shape and not torch.equal(p, start[name]) for name, p in end.items())
    assert len(losses.data["loss/train/total"]) == 6
    expected = outcome(run)
    run.close()
    if companion.resumes:
        resumed = companion.trainer(
            method, **saving, load_path=str(tmp_path / "a" / "ba3.pt"), save_folder=str(tmp_path / "b")
        )
        resumed.fit()
        assert_same(expected, outcome(resumed))
        resumed.close()


@pytest.mark.parametrize("name", [companion.name for companion in COMPANIONS if not companion.resumes])
def test_what_does_not_resume_does_not_with_plain_sgd(name, tmp_path):
    companion = NAMED[name]
    saving = {"save_folder": str(tmp_path), "save_interval": "1ba", "save_filename": "ba{batch}.pt"}
    if name == "layer_freezing":
        run = companion.trainer(PLAIN, **saving)
        with pytest.raises(KeyError):
            run.fit()
        run.close()
        return
    run = companion.trainer(PLAIN, **saving)
    run.fit()
    resumed = companion.trainer(PLAIN, load_path=str(tmp_path / "ba3.pt"))
    resumed.fit()
    with pytest.raises(AssertionError):
        assert_same(outcome(run), outcome(resumed))
    run.close()
    resumed.close()


# Each without a perturbation, and with one of radius 0, whose second pass must come out as no pass at all.
TWICE = [
    (PLAIN, Method("sam", sgd, lambda: [SAM(rho=0.0)])),
    (
        Method("hessian", sassha, lambda: [LazyHessian(2)]),
        Method("sassha", sassha, lambda: [Sassha(rho=0.0, hessian_interval=2)]),
    ),
]


each_pair = pytest.mark.parametrize(
    "pair",
    [
        # The other pair shows the same and refreshes too.
        pytest.param(TWICE[0], id="sam", marks=pytest.mark.slow),
        pytest.param(TWICE[1], id="sassha"),
    ],
)


@each_companion
@each_pair
def test_the_second_pass_is_not_seen_by_it(pair, companion):
    ends = []
    for method in pair:
        run = companion.trainer(method, max_duration="4ba", device_train_microbatch_size=16)
        run.fit()
        ends.append(outcome(run))
        run.close()
    assert_same(*ends)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_ema_averages_the_weights_between_the_steps(method):
    algorithm = others.EMA(half_life=None, smoothing=0.9, update_interval="1ba")
    weights, averages, evaluated = [], [], []

    def look(event, state, passes):
        if event == Event.BATCH_END:
            weights.append(flat(state.model).double())
            averages.append(torch.cat([p.flatten() for _, p in algorithm.ema_model.named_parameters()]))
        elif event == Event.EVAL_BATCH_START:
            evaluated.append(flat(state.model))
        elif event == Event.BATCH_START and weights:
            assert torch.equal(flat(state.model).double(), weights[-1])

    run = trainer(
        method.optimizer,
        [*method.algorithms(), algorithm],
        model=convolutions(),
        dataset=images(),
        batch_size=12,
        eval_dataloader=DataLoader(images(), batch_size=48),
        eval_interval="1ba",
        callbacks=[Spy(look)],
    )
    run.fit()
    run.close()
    assert len(weights) == len(evaluated) == 8
    average = weights[0]
    for w, ema, seen in zip(weights, averages, evaluated, strict=True):
        average = 0.9 * average + 0.1 * w
        assert (ema - average).abs().max() < 1e-6
        assert torch.equal(seen, ema)
    assert (averages[-1] - weights[-1]).abs().max() > 1e-3


AT_REST = [
    ("sam", torch.optim.SGD, lambda: [SAM(rho=5.0)]),
    ("esam", torch.optim.SGD, lambda: [ESAM(rho=5.0)]),
    ("sassha", SASSHA, lambda: [Sassha(rho=5.0, hessian_interval=2)]),
    ("msassha", SASSHA, lambda: [MSassha(rho=5.0, hessian_interval=2)]),
]


@pytest.mark.parametrize(("name", "rule", "algorithms"), AT_REST, ids=[row[0] for row in AT_REST])
def test_averages_hold_no_displaced_weights(name, rule, algorithms):
    """At a learning rate of 0 the weights rest, however far they are displaced in between."""
    ema, swa = others.EMA("1ba"), others.SWA("1ep", "2ep", update_interval="1ba")
    displaced = []

    def look(event, state, passes):
        if event == Event.BEFORE_FORWARD and state.timestamp.batch == 5:
            displaced.append(not torch.equal(flat(state.model), start))
        elif event == Event.EVAL_BATCH_START:
            assert torch.allclose(flat(state.model), start, rtol=0, atol=1e-6)

    run = trainer(
        lambda params: rule(params, lr=0.0),
        [*algorithms(), ema, swa],
        model=convolutions(),
        dataset=images(),
        batch_size=24,
        max_duration="3ep",
        eval_dataloader=DataLoader(images(), batch_size=48),
        eval_interval="1ba",
        callbacks=[Spy(look)],
    )
    start = flat(run.state.model)
    run.fit()
    averages = [torch.cat([p.flatten() for _, p in ema.ema_model.named_parameters()]), flat(swa.swa_model)]
    for average in averages:
        assert (average - start).abs().max() < 1e-6
    assert any(displaced)
    run.close()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_swa_averages_the_weights_between_the_steps(method):
    algorithm = others.SWA("1ep", "2ep", update_interval="1ba")
    weights, checked = [], []

    def look(event, state, passes):
        if event == Event.BATCH_END and 5 <= state.timestamp.batch.value <= 8:
            weights.append(flat(state.model).double())
            mean = sum(weights) / len(weights)
            checked.append((flat(algorithm.swa_model) - mean).abs().max() < 1e-6)
        elif event == Event.BATCH_END and state.timestamp.batch == 9:  # the mean takes the model's place
            checked.append(torch.equal(flat(state.model), flat(algorithm.swa_model)))

    companion = Companion("swa", lambda: [algorithm])
    run = companion.trainer(method, callbacks=[Spy(look)], batch_size=12)
    run.fit()
    run.close()
    assert len(checked) == 5 and all(checked)


EVERY = [SAM, ASAM, SSAM, USAM, ESAM, MSAM, GSAM, LookSAM]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_gradient_clipping_clips_what_is_applied(kind):
    """And neither the gradient of an ascent nor one of several that an update is made of."""
    threshold, lr = 0.1, 1.0
    norms, weights = {}, []

    def look(event, state, passes):
        if event == Event.AFTER_TRAIN_BATCH:
            norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()])
            norms.setdefault(state.optimizers[0].phase, []).append(norm)
        elif event in (Event.BATCH_START, Event.BATCH_END):
            weights.append(flat(state.model))

    alpha = {GSAM: {"alpha": 0.9, "rho_max": 0.5, "rho_min": 0.5}, LookSAM: {"alpha": 0.7, "interval": 2}}
    algorithm = kind(**alpha.get(kind, {"rho": 0.5}))
    run = trainer(
        # A momentum, for MSAM to go along, but not in the update.
        lambda params: torch.optim.SGD(params, lr=lr, momentum=1e-6 if kind is MSAM else 0.0),
        [algorithm, others.GradientClipping("norm", threshold)],
        model=convolutions(),
        dataset=images(),
        callbacks=[Spy(look)],
        max_duration="4ba",
    )
    run.fit()
    run.close()
    clipped = [] if algorithm.perturbation.mixes else norms.pop("descent", []) + norms.pop(None, [])
    assert all(min(each) > threshold * 1.1 for each in norms.values())
    updates = [(end - start).norm() / lr for start, end in zip(weights[::2], weights[1::2], strict=True)]
    for each in (*clipped, *updates):
        assert threshold * 0.99 < each < threshold * 1.001


@pytest.mark.parametrize("kind", ["norm", "value", "adaptive"])
def test_gradient_clipping_leaves_the_displacement(kind):
    seen = []
    for clipping in ([], [others.GradientClipping(kind, 1e-3)]):

        def look(event, state, passes):
            if event == Event.BEFORE_FORWARD and passes == 2:
                seen.append(flat(state.model))

        run = trainer(
            sgd,
            [USAM(rho=0.5), *clipping],
            model=convolutions(),
            dataset=images(),
            callbacks=[Spy(look)],
            max_duration="1ba",
        )
        run.fit()
        run.close()
    assert torch.equal(*seen)


@dataclass  # so that it cannot be hashed
class Halves(Algorithm):
    """A user's own edit of the gradient, which also has something to do on another event."""

    forwards: int = 0

    def match(self, event, state):
        return event in (Event.BEFORE_FORWARD, Event.AFTER_TRAIN_BATCH)

    def apply(self, event, state, logger):
        if event == Event.BEFORE_FORWARD:
            self.forwards += 1
        else:
            torch._foreach_mul_([p.grad for p in state.model.parameters()], 0.5)


@pytest.mark.parametrize("algorithm", [SAM(), GSAM(), LookSAM()], ids=lambda a: type(a).__name__)
def test_an_edit_of_the_gradient_is_made_once_per_step(algorithm):
    """Half the gradient in steps of twice the size is the gradient; an interrupted pass leaves no trace."""
    ends, interrupted = [], []

    def look(event, state, passes):
        if event == Event.AFTER_LOSS and passes == 2 and len(interrupted) == len(ends):
            interrupted.append(True)
            raise Injected

    for lr, edits in ((0.1, []), (0.2, [Halves()])):
        run = trainer(
            lambda params, lr=lr: torch.optim.SGD(params, lr=lr),
            [algorithm, *edits],
            model=convolutions(),
            dataset=images(),
            callbacks=[Spy(look)],
            max_duration="2ba",
        )
        with pytest.raises(Injected):
            run.fit()
        assert not any("apply" in vars(each) for each in run.state.algorithms)
        run.fit()
        ends.append(flat(run.state.model))
        run.close()
    # Of its two steps, only LookSAM's first has two passes.
    assert torch.equal(*ends) and edits[0].forwards == 2 + (3 if isinstance(algorithm, LookSAM) else 4)


FREEZING = [
    *METHODS,
    Method("asam", sgd, lambda: [ASAM()]),
    Method("gsam", sgd, lambda: [GSAM()]),
    Method("looksam", sgd, lambda: [LookSAM(interval=2)]),
    Method("difference", sassha, lambda: [LazyHessian(2, "finite_difference")]),
]


@pytest.mark.filterwarnings("ignore:LazyHessian.*kinks")
@pytest.mark.parametrize("method", FREEZING, ids=str)
def test_frozen_layers_stay_exactly_and_in_every_pass(method):
    frozen = {}

    def look(event, state, passes):
        named = state.model.named_parameters()
        if event == Event.EPOCH_END:
            frozen.update({name: p.detach().clone() for name, p in named if not p.requires_grad})
        elif event in (Event.BEFORE_FORWARD, Event.FIT_END):
            assert all(torch.equal(p, frozen[name]) for name, p in named if name in frozen)

    run = NAMED["layer_freezing"].trainer(method, max_duration="4ep", callbacks=[Spy(look)])
    head = run.state.model.module[-1].weight
    start = head.detach().clone()
    run.fit()
    assert len(frozen) == 10 and head.requires_grad and not torch.equal(head, start)
    run.close()


@pytest.mark.parametrize("name", ["squeeze_excite", "factorize", "norms_before_load"])
def test_new_parameters_reach_an_optimizer_that_the_user_wrapped(name):
    def wrapped(params):
        return SharpnessAwareOptimizer(SASSHA(params, lr=0.05))

    ends = []
    for optimizer in (wrapped, lambda params: SASSHA(params, lr=0.05)):
        run = NAMED[name].trainer(Method(name, optimizer, lambda: [Sassha(rho=0.1)]))
        run.fit()
        ends.append(outcome(run))
        trained = {id(p) for group in run.state.optimizers[0].param_groups for p in group["params"]}
        assert trained == {id(p) for p in run.state.model.parameters()}
        run.close()
    assert_same(*ends)


def wrapped_sgd(params):
    return SharpnessAwareOptimizer(sgd(params), SAMPerturbation())


GYRO = Companion("gyro_dropout", lambda: [others.GyroDropout(0.2, sigma=4, tau=4)])


@pytest.mark.parametrize(
    "method",
    [
        METHODS[0],
        SASSHA_METHOD,
        Method("on_part", sassha, lambda: [LazyHessian(batch_fraction=0.5)]),
        Method("wrapped", wrapped_sgd, lambda: [Schedule("rho", FollowLR())]),
    ],
    ids=str,
)
def test_gyro_dropout_with_a_second_forward_is_refused(method):
    with pytest.raises(ValueError, match=r"GyroDropout counts forward passes.*; leave it out, or") as error:
        GYRO.trainer(method)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("plain", "ours"),
    [
        (PLAIN, Method("msam", sgd, lambda: [MSAM(rho=0.0)])),
        (
            Method("hessian", sassha, lambda: [LazyHessian(3)]),
            Method("msassha", sassha, lambda: [MSassha(rho=0.0, hessian_interval=3)]),
        ),
    ],
    ids=["msam", "msassha"],
)
def test_gyro_dropout_with_one_pass_works(plain, ours):
    ends = []
    for method in (plain, ours):
        run = GYRO.trainer(method)
        run.fit()
        ends.append(outcome(run))
        run.close()
    assert_same(*ends)


class Tokens(ComposerModel):
    """Takes dictionaries, which LabelSmoothing changes in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Linear(2 * PIXELS**2, 3)

    def forward(self, batch):
        return self.net(batch["x"].flatten(1))

    def loss(self, outputs, batch, reduction="mean"):
        return nn.functional.cross_entropy(outputs, batch["y"], reduction=reduction)


def test_esam_compares_losses_of_the_same_labels():
    """At radius 0 no loss rises, smoothed labels or not."""
    log = InMemoryLogger()
    x, y = images().tensors
    run = trainer(
        sgd,
        [ESAM(rho=0.0, gamma=0.5, input_key="x", target_key="y"), others.LabelSmoothing(0.3, target_key="y")],
        model=Tokens(),
        dataset=[{"x": x[i], "y": y[i]} for i in range(len(x))],
        loggers=[log],
        max_duration="2ba",
    )
    run.fit()
    run.close()
    assert [gap for _, gap in log.data["sharpness/loss_gap"]] == [0.0, 0.0]


def dense():
    torch.manual_seed(2)
    return ComposerClassifier(nn.Conv2d(2, 3, 3, padding=1), num_classes=3)


def maps():
    x, _ = images().tensors
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


@each_pair
def test_an_algorithm_may_write_into_the_batch(pair):
    """CutMix does, into targets as large as the images; every pass is given what the first one was."""
    test_the_second_pass_is_not_seen_by_it(
        pair, Companion("cutmix", lambda: [others.CutMix(1.0)], dense, maps)
    )
