"""The estimators through the Trainer: what they find, what they cost, and that they leave no trace."""

import contextlib
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from composer.algorithms import LabelSmoothing, MixUp
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier, ComposerModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from composer_sassha import ESAM, SAM, SASSHA, LazyHessian
from composer_sassha.curvature import (
    ESTIMATORS,
    empirical_fisher_diagonal,
    finite_difference_diagonal,
    gauss_newton_diagonal,
    hutchinson_diagonal,
)
from tests.helpers import Injected, Spy, assert_same, copied, everything, images, network, rng_states, trainer

each_estimator = pytest.mark.parametrize("name", ESTIMATORS)
SEED = 9


def rule(params):
    """After one step, its `exp_hessian` is the estimate's absolute value."""
    return SASSHA(params, lr=0.05, betas=(0.9, 0.0))


def smooth():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3))
    return ComposerClassifier(net, num_classes=3).double()


def doubles(count=20):
    x, y = images(count).tensors
    return TensorDataset(x.double(), y)


def one_step(algorithms, model, dataset, microbatch, **kwargs):
    """Train one batch. Return the run, the batch, and the weights before."""
    seen = []

    def look(event, state, passes):
        if event == Event.BATCH_START:
            seen.append(copied(state.batch))

    before = copied(dict(model.named_parameters()))
    run = trainer(
        rule,
        algorithms,
        model=model,
        dataset=dataset,
        batch_size=len(dataset),
        device_train_microbatch_size=microbatch,
        max_duration="1ba",
        callbacks=[Spy(look)],
        **kwargs,
    )
    run.fit()
    run.close()
    return run, seen[0], before


def estimate_of(run):
    state = run.state.optimizers[0].state
    return torch.cat([state[p]["exp_hessian"].flatten() for p in run.state.model.parameters()])


def by_hand(name, model, x, y, params, key):
    """The estimate on some samples, without the Trainer."""
    logits = model.module(x)
    grads = torch.autograd.grad(F.cross_entropy(logits, y), params, create_graph=True)
    if name == "gauss_newton":
        diagonal = gauss_newton_diagonal(logits, y, params, [key])
    elif name == "empirical_fisher":
        diagonal = empirical_fisher_diagonal([g.detach() for g in grads], len(x))
    elif name == "finite_difference":
        grads = [g.detach() for g in grads]

        def again():
            return contextlib.nullcontext(F.cross_entropy(model.module(x), y))

        diagonal = finite_difference_diagonal(grads, params, [key], again)
    else:
        diagonal = hutchinson_diagonal(grads, params, [key])
    return torch.cat([d.flatten() for d in diagonal])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("microbatch", "fraction", "parts"),
    [(20, 1.0, [20]), (8, 1.0, [8, 8, 4]), (8, 0.6, [8, 4]), (20, 0.25, [5]), (8, 0.4, [8])],
)
@each_estimator
def test_the_estimate_is_the_one_computed_by_hand(name, microbatch, fraction, parts):
    model = smooth()
    algorithm = LazyHessian(estimator=name, seed=SEED, batch_fraction=fraction)
    run, (x, y), before = one_step([algorithm], model, doubles(), microbatch)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before.values(), strict=True):
            p.copy_(value)
    params, expected = list(model.parameters()), 0
    if name == "empirical_fisher":  # squared once, whatever the microbatches
        parts = [sum(parts)]
    for k, size in enumerate(parts):
        some = slice(k * microbatch, k * microbatch + size)
        expected += size / sum(parts) * by_hand(name, model, x[some], y[some], params, (SEED, 0, 0, k, 0))
    # A difference divides what rounding leaves by 1.5e-9.
    tolerance = {"rtol": 1e-10, "atol": 1e-5 if name == "finite_difference" else 1e-13}
    torch.testing.assert_close(estimate_of(run), expected.abs(), **tolerance)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("microbatch", "estimated", "forwarded"),
    [(10, [10], [10, 10, 10, 10]), (40, [10], [40, 10]), (8, [8, 2], [8, 8, 2, 8, 8, 8])],
)
@pytest.mark.parametrize("perturbed", [False, True])
@each_estimator
def test_a_quarter_of_the_batch_costs_a_quarter(
    name, perturbed, microbatch, estimated, forwarded, monkeypatch
):
    sizes, forwards = [], []
    original = ESTIMATORS[name].diagonal

    def counted(batch):
        sizes.append(batch.size)
        if name in ("hutchinson", "empirical_fisher", "finite_difference"):
            assert len(batch.grads) == 4
        return original(batch)

    monkeypatch.setitem(ESTIMATORS, name, replace(ESTIMATORS[name], diagonal=counted))
    model = smooth()
    model.module.register_forward_pre_hook(lambda _, inputs: forwards.append(len(inputs[0])))
    perturbation = [SAM(rho=0.1)] if perturbed else []
    one_step(
        [*perturbation, LazyHessian(estimator=name, batch_fraction=0.25)], model, doubles(40), microbatch
    )
    assert sizes == estimated
    if perturbed:  # the first pass estimates nothing
        first = 40 // microbatch
        assert forwards[:first] == [microbatch] * first
        forwards = forwards[first:]
    if name == "finite_difference":  # another forward at the displaced weights, of the same samples
        assert sum(forwards) == sum(forwarded) + 10
    else:
        assert forwards == forwarded


@pytest.mark.usefixtures("float64")
@each_estimator
def test_with_esam_every_selected_sample_weighs_the_same(name):
    model, parts = smooth(), []

    def look(event, state, passes):
        if event == Event.BEFORE_FORWARD and passes == 2:
            parts.append(state)
        if event == Event.BEFORE_BACKWARD and passes == 2:
            parts[-1] = copied(state.batch)

    before = copied(dict(model.named_parameters()))
    run = trainer(
        rule,
        [ESAM(rho=0.0, gamma=0.5), LazyHessian(estimator=name, seed=SEED)],
        model=model,
        dataset=doubles(),
        batch_size=20,
        device_train_microbatch_size=9,
        max_duration="1ba",
        callbacks=[Spy(look)],
    )
    run.fit()
    run.close()
    assert isinstance(run.state.algorithms[-1], ESAM), "its weights come after the estimate"
    with torch.no_grad():
        for p, value in zip(model.parameters(), before.values(), strict=True):
            p.copy_(value)
    # Nothing rises at radius 0, and topk takes any ten of 9 + 9 + 2; of one without, two at weight 0.
    params, expected = list(model.parameters()), 0
    taken = torch.topk(torch.zeros(20), 10).indices
    counts = [int(((taken >= start) & (taken < start + 9)).sum()) for start in (0, 9, 18)]
    assert 0 in counts and [len(x) for x, _ in parts] == [count or 2 for count in counts]
    if name == "empirical_fisher":  # squared once, whatever the microbatches
        chosen = [part for part, count in zip(parts, counts, strict=True) if count]
        parts, counts = [tuple(map(torch.cat, zip(*chosen, strict=True)))], [10]
    for k, ((x, y), count) in enumerate(zip(parts, counts, strict=True)):
        expected += count / 10 * by_hand(name, model, x, y, params, (SEED, 0, 0, k, 0))
    tolerance = {"rtol": 1e-10, "atol": 1e-5 if name == "finite_difference" else 1e-13}
    torch.testing.assert_close(estimate_of(run), expected.abs(), **tolerance)


def seen_by_others(algorithm, **kwargs):
    """Everything after one step that does not follow from the estimate."""
    log = InMemoryLogger()
    visible = {}

    def look(event, state, passes):
        if event == Event.AFTER_TRAIN_BATCH:
            visible.update(
                grads=copied([p.grad for p in state.model.parameters()]),
                loss=copied(state.loss.detach()),
                outputs=copied(state.outputs.detach()),
                batch=copied(state.batch),
            )

    run = trainer(
        rule,
        [*kwargs.pop("others", []), algorithm],
        model=network(dropout=0.3),
        batch_size=20,
        device_train_microbatch_size=8,
        max_duration="1ba",
        callbacks=[Spy(look)],
        loggers=[log],
        **kwargs,
    )
    run.fit()
    logged = {
        n: [v for _, v in values] for n, values in log.data.items() if n.startswith(("loss/", "metrics/"))
    }
    buffers = copied(dict(run.state.model.named_buffers()))
    run.close()
    return {"visible": visible, "logged": logged, "buffers": buffers, "rng": rng_states()}


@each_estimator
@pytest.mark.parametrize("perturbed", [False, True])
def test_nothing_but_the_estimate_tells_that_there_was_one(name, perturbed):
    # Gradients, BatchNorm, RNG states, losses and metrics, with dropout and microbatches of unequal size.
    def others():
        return [SAM(rho=0.1)] if perturbed else []

    plain = seen_by_others(LazyHessian(estimator="hutchinson"), others=others())
    for fraction in (0.2, 0.5, 1.0):
        again = seen_by_others(LazyHessian(estimator=name, batch_fraction=fraction), others=others())
        # The gradient of a graph that is differentiated again may be added up in another order.
        for mine, reference in zip(
            again["visible"].pop("grads"), copied(plain["visible"]["grads"]), strict=True
        ):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)
        rest = {**plain, "visible": {k: v for k, v in plain["visible"].items() if k != "grads"}}
        assert_same(rest, again)


@pytest.mark.filterwarnings("ignore:Some targets have less than 1 total probability")  # by a rounding
@pytest.mark.parametrize(
    "others",
    [
        list,
        lambda: [SAM(rho=0.1)],
        lambda: [LabelSmoothing(0.2)],
        lambda: [MixUp(alpha=0.5)],
        lambda: [MixUp(alpha=0.5), LabelSmoothing(0.2)],
    ],
)
def test_the_second_evaluation_sees_the_same_function(others, monkeypatch):
    # Dropout's masks, buffers, and the inputs and labels that other algorithms leave.
    original, checked = ESTIMATORS["finite_difference"].diagonal, []

    def compare(batch):
        with batch.again(batch.size) as again:
            assert torch.equal(again.loss, batch.evaluation.loss)
        with batch.again(1) as single:
            assert not torch.equal(single.loss, batch.evaluation.loss)
        checked.append(batch.size)
        return original(batch)

    monkeypatch.setitem(
        ESTIMATORS, "finite_difference", replace(ESTIMATORS["finite_difference"], diagonal=compare)
    )
    seen_by_others(LazyHessian(estimator="finite_difference"), others=others())
    assert checked == [8, 8, 4]


class Dictionaries(ComposerModel):
    """Its batches are dictionaries, in which LabelSmoothing puts the labels back in place."""

    def __init__(self):
        super().__init__()
        self.net = smooth().module.float()

    def forward(self, batch):
        return self.net(batch["x"])

    def loss(self, outputs, batch, *args, **kwargs):
        return F.cross_entropy(outputs, batch["y"])


def test_the_second_evaluation_sees_the_labels_that_the_loss_saw(monkeypatch):
    checked = []

    def compare(batch):
        with batch.again(batch.size) as again:
            assert torch.equal(again.loss, batch.evaluation.loss)
        checked.append(batch.size)
        return [torch.ones_like(p) for p in batch.params]

    monkeypatch.setitem(
        ESTIMATORS, "finite_difference", replace(ESTIMATORS["finite_difference"], diagonal=compare)
    )
    x, y = images(20).tensors
    run = trainer(
        rule,
        [LabelSmoothing(0.2, target_key="y"), LazyHessian(estimator="finite_difference")],
        model=Dictionaries(),
        dataset=[{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
        device_train_microbatch_size=6,
        max_duration="1ba",
    )
    run.fit()
    assert checked == [6, 4]
    run.close()


@pytest.mark.parametrize("settings", [{"estimator": "finite_difference"}, {"batch_fraction": 0.2}])
def test_a_loss_that_cannot_be_computed_again_is_refused(settings):
    with pytest.raises(RuntimeError, match="another algorithm changed the loss") as error:
        seen_by_others(LazyHessian(**settings), others=[MixUp(alpha=0.5, interpolate_loss=True)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "forward"),
    # Forwards of the failing batch until one that only the estimate needs, or that follows it.
    [({"estimator": "finite_difference"}, 2), ({"batch_fraction": 0.2}, 2), ({"batch_fraction": 0.2}, 3)],
)
def test_an_exception_in_the_second_evaluation_leaves_no_trace(settings, forward):
    def run_with(failure):
        forwards = 0

        def count(module, inputs):
            nonlocal forwards
            forwards += 1
            if failure and forwards == forward:
                raise Injected

        model = network()
        model.module[4].register_forward_pre_hook(count)  # after BatchNorm and dropout
        run = trainer(rule, [LazyHessian(**settings)], model=model, device_train_microbatch_size=4)
        train_batch = run._train_batch

        def retried(use_grad_scaling):
            before = everything(run)
            try:
                return train_batch(use_grad_scaling)
            except Injected:
                assert_same(before, everything(run))
                return train_batch(use_grad_scaling)

        run._train_batch = retried
        run.fit()
        result = everything(run)
        run.close()
        return result

    assert_same(run_with(False), run_with(True))


@each_estimator
def test_resumes_bit_for_bit(name, tmp_path):
    def build(**kwargs):
        algorithm = LazyHessian(interval=2, estimator=name, batch_fraction=0.7)
        return trainer(rule, [algorithm], device_train_microbatch_size=4, **kwargs)

    run = build(save_folder=str(tmp_path), save_interval="3ba", save_filename="ba{batch}.pt")
    run.fit()
    expected = everything(run)
    run.close()
    resumed = build(load_path=str(tmp_path / "ba3.pt"))
    resumed.fit()
    assert_same(expected, everything(resumed))
    resumed.close()


# Whole batches are those of tests/models/test_compiled.py.
@pytest.mark.parametrize(
    ("name", "fraction"),
    [
        pytest.param(
            name,
            fraction,
            marks=[] if fraction < 1 and name in ("hutchinson", "finite_difference") else pytest.mark.slow,
        )
        for name in ESTIMATORS
        for fraction in (1.0, 0.3)
    ],
)
def test_trains_a_model_that_the_trainer_compiles(name, fraction):
    torch._dynamo.reset()
    run = trainer(
        rule,
        [LazyHessian(interval=2, estimator=name, batch_fraction=fraction)],
        max_duration="3ba",
        device_train_microbatch_size=5,
        compile_config={"backend": "aot_eager"},
    )
    run.fit()
    assert run.state.optimizers[0].param_groups[0]["refreshes"] == 2
    run.close()


class Words(Dataset):
    """Sequences as a dictionary; the first tokens' labels are ignored, more of them in every other one."""

    def __init__(self, count=6, length=5, vocabulary=7):
        generator = torch.Generator().manual_seed(4)
        self.tokens = torch.randint(vocabulary, (count, length), generator=generator)
        self.labels = self.tokens.clone()
        self.labels[:, 0] = -100
        self.labels[::2, :3] = -100

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


class LanguageModel(ComposerModel):
    """The outside of Composer's HuggingFaceModel: the outputs are a mapping, and bring the loss along."""

    def __init__(self, shift_labels):
        super().__init__()
        self.shift_labels = shift_labels
        torch.manual_seed(8)
        self.net = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)).double()

    def forward(self, batch):
        logits, labels = self.net(batch["input_ids"]), batch["labels"]
        ahead = (logits[:, :-1], labels[:, 1:]) if self.shift_labels else (logits, labels)
        loss = F.cross_entropy(ahead[0].flatten(0, 1), ahead[1].flatten())
        return OrderedDict(loss=loss, logits=logits)

    def loss(self, outputs, batch, *args, **kwargs):
        return outputs["loss"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", ["gauss_newton", "empirical_fisher"])
def test_a_language_models_predictions_are_its_tokens(name, fraction, shift):
    model = LanguageModel(shift)
    algorithm = LazyHessian(estimator=name, seed=SEED, batch_fraction=fraction)
    run, batch, before = one_step([algorithm], model, Words(), 6)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before.values(), strict=True):
            p.copy_(value)
    some = {k: v[: round(6 * fraction)] for k, v in batch.items()}
    outputs, labels, params = model(some), some["labels"], list(model.parameters())
    logits = outputs["logits"].movedim(-1, 1)
    if shift:
        logits, labels = logits[:, :, :-1], labels[:, 1:]
    if name == "gauss_newton":
        expected = gauss_newton_diagonal(logits, labels, params, [(SEED, 0, 0, 0, 0)])
    else:
        count = (labels != -100).sum().item()
        assert 0 < count < labels.numel()
        expected = [count * g**2 for g in torch.autograd.grad(outputs["loss"], params)]
    torch.testing.assert_close(
        estimate_of(run), torch.cat([e.flatten() for e in expected]), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@each_estimator
def test_trains_a_hugging_face_model(name, fraction, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from composer.models import HuggingFaceModel

    original, checked = ESTIMATORS[name].diagonal, []

    def compare(batch):
        loss, logits, labels = batch.evaluation
        if name == "gauss_newton":  # the logits and labels found are those that the model's loss is made of
            torch.testing.assert_close(F.cross_entropy(logits, labels), loss)
        if name == "finite_difference":
            with batch.again(batch.size) as again:
                assert torch.equal(again.loss, loss) or fraction < 1
        checked.append(batch.size)
        return original(batch)

    monkeypatch.setitem(ESTIMATORS, name, replace(ESTIMATORS[name], diagonal=compare))
    config = transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(1)
    run = trainer(
        rule,
        [LazyHessian(interval=2, estimator=name, batch_fraction=fraction)],
        model=HuggingFaceModel(transformers.GPT2LMHeadModel(config)),
        dataset=Words(count=16),
        batch_size=8,
        device_train_microbatch_size=3,
        max_duration="4ba",
    )
    run.fit()
    assert run.state.optimizers[0].param_groups[0]["refreshes"] == 2
    assert checked == ([3, 3, 2] if fraction == 1 else [3, 1]) * 2
    run.close()


class Regression(ComposerModel):
    """Its outputs and targets have the shapes of logits and probabilities, and are none."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(50, 3)

    def forward(self, batch):
        return self.net(batch[0].flatten(1))

    def loss(self, outputs, batch, *args, **kwargs):
        return F.mse_loss(outputs, batch[1])


def test_gauss_newton_without_classes_says_what_it_looked_for():
    x, _ = images().tensors
    run = trainer(
        rule,
        [LazyHessian(estimator="gauss_newton")],
        model=Regression(),
        dataset=TensorDataset(x, torch.randn(len(x), 3)),
    )
    with pytest.raises(ValueError, match=r"finds no class logits.*batch\['labels'\].*'hutchinson'") as error:
        run.fit()
    assert "\n" not in str(error.value)
    run.close()


def test_differences_in_lower_precision_are_refused_at_the_start(monkeypatch):
    algorithm = LazyHessian(estimator="finite_difference")
    run = trainer(rule, [algorithm])
    monkeypatch.setattr(run.state.device, "name", "gpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(ValueError, match=r"needs products in full float32; pass device=") as error:
        algorithm.apply(Event.FIT_START, run.state, run.logger)
    assert "\n" not in str(error.value)
    run.state.precision = "amp_bf16"
    for event in (Event.INIT, Event.FIT_START):
        with pytest.raises(ValueError, match="needs precision='fp32'; gradients in 'amp_bf16'") as error:
            algorithm.apply(event, run.state, run.logger)
        assert "\n" not in str(error.value)
    run.close()


def test_differences_of_a_network_with_kinks_warn():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    run = trainer(
        rule,
        [LazyHessian(interval=1, estimator="finite_difference")],
        model=ComposerClassifier(net, num_classes=3),
        max_duration="2ba",
    )
    with pytest.warns(UserWarning, match=r"has kinks \(MaxPool2DWithIndicesBackward0, Relu") as caught:
        run.fit()
    assert len([w for w in caught if "kinks" in str(w.message)]) == 1
    run.close()
