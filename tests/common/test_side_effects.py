"""What a forward changes in its model: each step leaves what one pass leaves, and a failed step nothing."""

import array
import contextlib
import copy
import enum
import gc
import random
import types
import warnings
import weakref
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn

from composer_sassha.common import contents
from composer_sassha.common.side_effects import SideEffects
from composer_sassha.optim import SharpnessAwareOptimizer
from composer_sassha.perturbations import SAMPerturbation
from composer_sassha.sharpness.objective import objective_of, undisturbed
from tests.helpers import CLASSES, assert_same, images, method_trainer
from tests.methods import METHODS, rows

X, Y = torch.randn(5, 16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(80).reshape(5, 16) % 3


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, CLASSES)
        self.init()

    def init(self): ...


class Cache(Base):
    """Filled by the first forward, which then says so."""

    def init(self):
        self.register_buffer("scale", torch.zeros(6))
        self.filled = False

    def forward(self, x):
        if not self.filled:
            self.scale.fill_(2.0)
            self.filled = True
        return self.linear(x * self.scale)


class ActNorm(Base):
    """The first forward writes into trained parameters."""

    def init(self):
        self.shift, self.ready = nn.Parameter(torch.zeros(6)), False

    def forward(self, x):
        if not self.ready:
            self.shift.data.copy_(-x.mean(0))
            self.ready = True
        return self.linear(x + self.shift)


class NoneBuffer(Base):
    def init(self):
        self.register_buffer("mean", None)

    def forward(self, x):
        seen, self.mean = self.mean, x.mean(0)
        return self.linear(x if seen is None else x - seen)


class NewBuffer(Base):
    def forward(self, x):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.mean(0), persistent=False)
        self.mean.mul_(0.9)
        return self.linear(x - self.mean)


class Resized(Base):
    def init(self):
        self.register_buffer("mean", torch.tensor([]))

    def forward(self, x):
        if not self.mean.numel():
            self.mean.resize_(6).copy_(x.mean(0))
        self.mean.add_(0.1)
        return self.linear(x - self.mean)


class OtherDtype(Base):
    def init(self):
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        self.mean.data = self.mean.float() + x.mean(0)
        return self.linear(x - self.mean)


class MomentumEncoder(Base):
    """A frozen copy that follows the trained layer; here in place."""

    def init(self):
        self.target = copy.deepcopy(self.linear).requires_grad_(False)

    def follow(self):
        for p, t in zip(self.linear.parameters(), self.encoder().parameters(), strict=True):
            self.move(t, p)

    def encoder(self):
        return self.target

    @torch.no_grad()
    def move(self, t, p):
        t.mul_(0.9).add_(p, alpha=0.1)

    def forward(self, x):
        self.follow()
        return self.linear(x) - self.encoder()(x + 1)


class ByData(MomentumEncoder):
    def move(self, t, p):
        t.data.mul_(0.9).add_(p.data, alpha=0.1)


class OtherData(MomentumEncoder):
    def move(self, t, p):
        t.data = t.data * 0.9 + p.data * 0.1


class Hidden(MomentumEncoder):
    """In a list, so that it has no part in the state dict."""

    def init(self):
        self.targets = [copy.deepcopy(self.linear).requires_grad_(False)]

    def encoder(self):
        return self.targets[0]


class Unfrozen(MomentumEncoder):
    """Requires gradients, but the optimizer has never heard of it."""

    def init(self):
        self.target = copy.deepcopy(self.linear)
        self.outside = list(self.target.parameters())

    def forward(self, x):
        self.follow()
        with torch.no_grad():
            right = self.target(x + 1)
        return self.linear(x) - right


class NewParameter(MomentumEncoder):
    def follow(self):
        weight = 0.9 * self.target.weight + 0.1 * self.linear.weight.detach()
        self.target.weight = nn.Parameter(weight, requires_grad=False)


class Codebook(Base):
    """Large, so that it is not copied on every step unless it moves; no version is counted."""

    def init(self):
        self.register_buffer("book", torch.zeros(contents.SMALL // 4 + 1, 1))

    def forward(self, x):
        self.book.data[:6, 0] += x.mean(0)
        return self.linear(x - self.book[:6, 0])


class Stateful(Base):
    def init(self):
        self.rnn, self.state = nn.LSTM(6, 6, batch_first=True), None

    def forward(self, x):
        out, state = self.rnn(x[:, None], self.state)
        self.state = tuple(each.detach() for each in state)
        return self.linear(out[:, -1])


class Attributes(Base):
    """All that is kept outside of PyTorch's dictionaries."""

    def init(self):
        self.count, self.temperature = 0, 1.0
        self.mean, self.table = torch.zeros(6), np.zeros(6)
        self.history, self.window, self.named, self.met = [], deque(maxlen=2), {"n": 0}, set()
        self.data = types.SimpleNamespace(total=0.0, last=[])
        self.generator, self.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.legacy, self.python = np.random.RandomState(0), random.Random(0)

    def forward(self, x):
        self.count += 1
        self.temperature *= 1.1
        self.mean.mul_(0.5).add_(x.mean(0))
        self.table += 1
        self.history.append(self.count)
        self.window.append(self.temperature)
        self.named["n"] += 1
        self.named[self.count] = x.mean()
        self.met.add(self.count)
        self.data.total += 1
        self.data.last.append(self.count)
        noise = torch.randn(6, generator=self.generator) + self.numpy.standard_normal()
        noise = noise + self.legacy.standard_normal() + self.python.random()
        past = len(self.history) + sum(self.window) + self.named["n"] + len(self.named) + len(self.met)
        past += self.data.total + len(self.data.last) + float(self.table.sum())
        return self.linear(x - self.mean + 0.1 * noise) / (self.temperature + 0.01 * past)


class Inner(Base):
    """The same deep inside."""

    def init(self):
        self.layers = nn.ModuleDict({"a": nn.Sequential(Attributes(), Cache())})

    def forward(self, x):
        return self.linear(x) + self.layers["a"][0](x) + self.layers["a"][1](x)


class NewModule(Base):
    def forward(self, x):
        if not hasattr(self, "extra"):
            self.extra = nn.Dropout(0.5)
        return self.linear(self.extra(x))


MODELS = [
    *(Cache, ActNorm, NoneBuffer, NewBuffer, Resized, OtherDtype, MomentumEncoder, ByData, OtherData, Hidden),
    *(Unfrozen, NewParameter, Codebook, Stateful, Attributes, Inner, NewModule),
]
each_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def build(kind, perturbation=None, **settings):
    model = kind()
    outside = {id(p) for p in getattr(model, "outside", ())}
    base = torch.optim.SGD([p for p in model.parameters() if id(p) not in outside], lr=0.1, momentum=0.9)
    if perturbation is None:
        return model, base
    return model, SharpnessAwareOptimizer(base, perturbation, model=model, **settings)


def step(model, optimizer, i, fail=None):
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X[i]), Y[i])
        loss.backward()
        if fail == calls:
            raise KeyboardInterrupt
        return None if fail == -calls else loss

    return optimizer.step(closure)


def state_of(model):
    """Everything that a forward of these models may change, as plain data."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(module, nn.RNNBase) and key.startswith("_flat"):
                continue
            if key in ("_buffers", "_parameters") or key not in vars(nn.Module()):
                found[name, key] = _plain(value)
    return found


def _plain(value):
    if isinstance(value, (torch.Generator, random.Random)):
        return value.get_state() if isinstance(value, torch.Generator) else value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()[1].tolist()
    if isinstance(value, types.SimpleNamespace):
        return _plain(vars(value))
    if isinstance(value, nn.Module):
        return state_of(value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple, deque)) else copy.copy(value)


@contextlib.contextmanager
def without_warnings():
    """Turn warnings into errors. Garbage of earlier tests, whose finalizers warn, is left for later."""
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        gc.enable()


@each_model
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_at_radius_zero_it_trains_as_without(kind, partial):
    with without_warnings():
        found = []
        for perturbation in (None, SAMPerturbation(0.0)):
            settings = {} if perturbation is None else {"partial_ascent": partial}
            model, optimizer = build(kind, perturbation, **settings)
            torch.manual_seed(5)
            for i in range(4):
                step(model, optimizer, i)
            found.append(state_of(model))
        assert_same(*found)


@each_model
@pytest.mark.parametrize("fail", [1, 2, -1, -2])
def test_a_step_that_fails_in_any_pass_leaves_nothing(kind, fail):
    """Both in the first step, before anything is known of the model, and in a later one."""
    if kind is ActNorm and fail > 0:
        pytest.skip("what a forward writes into trained parameters, the retry writes again")
    model, optimizer = build(kind, SAMPerturbation(0.1))
    for i in range(2):
        before = state_of(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the closure returned None
                assert step(model, optimizer, i, fail) is None
        except KeyboardInterrupt:
            pass
        if kind is not ActNorm:
            assert_same(before, state_of(model))
        step(model, optimizer, i)


# What requires a gradient counts as trained where no optimizer is known.
@pytest.mark.parametrize("kind", [k for k in MODELS if k is not Unfrozen], ids=lambda kind: kind.__name__)
def test_a_measurement_leaves_nothing_from_one_evaluation_to_the_next(kind):
    model = kind()
    model.loss = lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1])
    forward, model.forward = model.forward, lambda batch: forward(batch[0])
    model.forward((X[0], Y[0]))  # fills the caches
    before = state_of(model)
    with undisturbed(model):
        objective = objective_of(model, [((X[0], Y[0]), 16), ((X[1], Y[1]), 16)])
        assert objective.loss() == objective.loss()
        objective.product(objective.gradient())
    assert_same(before, state_of(model))


class Slotted:
    __slots__ = ("n", "new")

    def __init__(self):
        self.n = 0


class Refusing(OrderedDict):
    """Such as the outputs of transformers: only written to by key."""

    def update(self, *_, **__):
        raise TypeError

    copy = update


class Entries(list):
    n = 0


class Holder:
    def __init__(self, part):
        self.part, self.kind = part, Phase.LATER


class Phase(enum.Enum):
    LATER = 1


class Script(nn.Module):
    n: int

    def __init__(self):
        super().__init__()
        self.n, self.norm = 0, nn.BatchNorm1d(6)
        self.register_buffer("sum", torch.zeros(()))

    def forward(self, x):
        self.n += 1
        self.sum = self.sum + x.sum()
        return self.norm(x)


def add_attribute(value):
    value.n += 1


def add_new(value):
    value.new = getattr(value, "new", 0) + 1


def add_entry(key):
    def add(value):
        value[key] += 1

    return add


def add_late(value):
    value[0] += 1
    if value[0] > 2:
        value[1][0] += 1


def nested():
    inner = []
    for _ in range(2000):
        inner = [inner]
    return [*inner, 0]


OBJECTS = {
    "slots": (Slotted, add_attribute, lambda value: value.n),
    "a slot that was empty": (Slotted, add_new, lambda value: value.new),
    "an object in an object": (
        lambda: Holder(Slotted()),
        lambda v: add_attribute(v.part),
        lambda v: v.part.n,
    ),
    "a module in an object": (
        lambda: Holder(nn.BatchNorm1d(2)),
        lambda value: value.part(torch.ones(3, 2)),
        lambda value: value.part.num_batches_tracked.item(),
    ),
    "a dictionary that refuses": (lambda: Refusing(n=0), add_entry("n"), lambda value: value["n"]),
    "an attribute of a list": (Entries, add_attribute, lambda value: value.n),
    "bytes": (lambda: bytearray(1), add_entry(0), bytes),
    "an array of Python's": (lambda: array.array("i", [0]), add_entry(0), list),
    "a large array": (lambda: np.zeros(contents.SMALL), add_entry(0), lambda value: value[0]),
    "a large array that changes late": (
        lambda: [0, np.zeros(contents.SMALL)],
        add_late,
        lambda value: (value[0], value[1][0]),
    ),
    "lists in lists": (nested, add_entry(1), lambda value: value[1]),
    "compiled code": (
        lambda: torch.jit.script(Script()),
        lambda value: value(X[0]),
        lambda value: (value.n, value.sum.item(), value.norm.num_batches_tracked.item()),
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_whatever_an_attribute_holds_changes_once_a_step(name):
    make, change, read = OBJECTS[name]

    class Holding(Base):
        def init(self):
            self.held = make()

        def forward(self, x):
            change(self.held)
            return self.linear(x)

    with without_warnings():
        found = []
        for perturbation in (None, SAMPerturbation(0.1)):
            model, optimizer = build(Holding, perturbation)
            for i in range(3):
                step(model, optimizer, i)
            found.append(read(model.held))
            if perturbation is not None:
                with pytest.raises(KeyboardInterrupt):
                    step(model, optimizer, 3, fail=2)
                found.append(read(model.held))
        assert found[0] == found[1] == found[2]


def test_of_outputs_that_a_model_keeps_only_the_latest_is_alive():
    outputs = []

    class Keeping(Base):
        def forward(self, x):
            self.latest = self.linear(x)
            outputs.append(weakref.ref(self.latest))
            return self.latest

    model, optimizer = build(Keeping, SAMPerturbation(0.1))
    for i in range(4):
        step(model, optimizer, i)
        gc.collect()
        assert [output() for output in outputs if output() is not None] == [model.latest]


def test_a_tensor_of_a_class_of_its_own_is_named():
    class Own(torch.Tensor):
        pass

    class Counting(Base):
        def init(self):
            self.count = torch.zeros(1).as_subclass(Own)

        def forward(self, x):
            self.count += 1
            return self.linear(x)

    model, optimizer = build(Counting, SAMPerturbation(0.1))
    with pytest.warns(UserWarning, match=r"model\.count is .* of a class that cannot be copied"):
        step(model, optimizer, 0)


class Busy(nn.Module):
    """Counts its forwards in every way there is, in a network with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(17)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.2), nn.Flatten()
        )
        self.head = nn.Linear(36, CLASSES)
        self.register_buffer("buffer", torch.zeros(()))
        self.register_buffer("none", None)
        self.register_buffer("large", torch.zeros(contents.SMALL))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.target = copy.deepcopy(self.head).requires_grad_(False)
        self.count, self.history, self.tensor = 0, [], torch.zeros(1)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        if self.training:
            self.count += 1
            self.history.append(self.count)
            self.none = torch.ones(()) if self.none is None else self.none + 1
            with torch.no_grad():
                self.buffer += 1
                self.frozen += 1
                self.tensor += 1
                self.large.data += 1
                for p, t in zip(self.head.parameters(), self.target.parameters(), strict=True):
                    t.data.mul_(0.9).add_(p.data, alpha=0.1)
        h = self.net(x) + 0.1 * torch.randn(36, generator=self.generator)
        return self.head(h) - 0.1 * self.target(h) + 1e-3 * self.count

    def counts(self):
        return [int(each) for each in (self.none, self.buffer, self.frozen, self.tensor, self.large[0])]


@pytest.mark.parametrize("method", rows(METHODS), ids=str)
def test_each_step_of_a_trainer_counts_once(method):
    model = ComposerClassifier(Busy(), num_classes=CLASSES)
    run = method_trainer(method, model=model, dataset=images(), max_duration="5ba")
    run.fit()
    busy = model.module
    assert (busy.count, busy.history, busy.counts()) == (5, [1, 2, 3, 4, 5], [5] * 5)
    run.close()


def test_a_large_tensor_that_begins_to_move_late_is_named_and_its_module_left_alone():
    class Late(Base):
        def init(self):
            self.register_buffer("book", torch.zeros(contents.SMALL))
            self.count = 0

        def forward(self, x):
            self.count += 1
            if self.count > 3:
                self.book += 1
            return self.linear(x)

    model, optimizer = build(Late, SAMPerturbation(0.1))
    for i in range(3):
        step(model, optimizer, i)
    assert model.count == 3
    with pytest.warns(UserWarning, match=r"model\.book is a large tensor that no forward had changed before"):
        step(model, optimizer, 3)
    assert model.book[0] == model.count - 3  # both or neither
    left = model.count
    step(model, optimizer, 4)
    assert model.book[0] == left - 2 and model.count == left + 1


def test_what_cannot_be_put_back_is_named_once():
    class Meter:
        def __init__(self):
            self.n, self.log = 0, object()

        def add(self):
            self.n += 1

    class Counting(Base):
        def init(self):
            self.meter, self.batches = Meter(), iter(range(100))

        def forward(self, x):
            self.meter.add()
            next(self.batches)
            return self.linear(x)

    model, optimizer = build(Counting, SAMPerturbation(0.1))
    with pytest.warns(UserWarning) as caught:
        step(model, optimizer, 0)
    found = sorted(str(each.message) for each in caught)
    assert "model.batches is a range_iterator, whose position" in found[0]
    assert "model.meter is a Meter that a forward changes" in found[1] and len(found) == 2
    with without_warnings():
        step(model, optimizer, 1)


def test_constant_tensors_are_copied_once_and_trained_ones_never(monkeypatch):
    monkeypatch.setattr(contents, "ALLOWANCE", 4 * contents.SMALL)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, CLASSES))
    model.register_buffer("mask", torch.ones(contents.SMALL))
    model.register_buffer("mean", torch.zeros(6))
    model.huge, model.fixed = (
        np.ones(contents.SMALL),
        np.broadcast_to(np.ones(1), 3),
    )  # the second is read-only
    effects, trained = SideEffects(model), list(model.parameters())
    first = effects.take(trained, start=True)
    assert [c.where for c in first.contents if c.copy is not None] == ["mask", "mean"]
    assert not first.generators  # nor are the arrays copied
    effects.restore(first)
    second = effects.take(trained, start=True)
    assert [c.where for c in second.contents if c.copy is not None] == ["mean"]


def test_a_large_frozen_backbone_is_never_copied(monkeypatch):
    monkeypatch.setattr(contents, "ALLOWANCE", 4 * contents.SMALL)
    backbone = nn.Parameter(torch.ones(2 * contents.SMALL), requires_grad=False)
    model = nn.Linear(6, CLASSES)
    model.backbone = backbone
    seen = SideEffects(model).take(start=True)
    assert [c.copy for c in seen.contents if c.tensor is backbone] == [None]
