"""Batches that a model edits, and batches of graphs: each evaluation gets the right samples, unedited."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from composer.algorithms import LabelSmoothing
from composer.core import Algorithm, DataSpec, Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from composer_sassha import ESAM, SAM, SASSHA, LazyHessian, Sassha, SharpnessMonitor
from composer_sassha.common.validate import SettingError
from composer_sassha.curvature import hutchinson_diagonal
from composer_sassha.sharpness import Measures, objective_of, sam_sharpness, undisturbed
from tests.helpers import assert_same, copied, trainer


def sgd(params):
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)


def rule(params):
    """After one step, its `exp_hessian` is the estimate's absolute value."""
    return SASSHA(params, lr=0.05, betas=(0.9, 0.0))


@dataclass
class Record:
    """A batch that is neither mapping nor sequence: Composer gives every pass the same one."""

    x: Any
    y: Any


def put(batch, key, value):
    setattr(batch, key, value) if isinstance(batch, Record) else batch.__setitem__(key, value)


def get(batch, key):
    return getattr(batch, key) if isinstance(batch, Record) else batch[key]


class Editing(ComposerModel):
    """Standardises its inputs, and edits its batch on the way in one of several ways, or not at all."""

    def __init__(self, edit=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.edit = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), edit

    def forward(self, batch):
        x, y = (get(batch, key) for key in "xy")
        if self.edit == "in place":
            x.sub_(100).div_(50)
        else:
            x = (x - 100) / 50
        if self.edit == "assigns":
            put(batch, "x", x)
        elif self.edit == "pops":
            self.labels = batch.pop("y")
        elif self.edit == "for the loss":
            put(batch, "w", x.square().sum(dim=1))
        elif self.edit == "labels":  # rebuilt from what is there, so not twice
            put(batch, "y", 3 - y)
        return self.net(x)

    def loss(self, outputs, batch, reduction="mean"):
        y = self.labels if self.edit == "pops" else get(batch, "y")
        if self.edit == "loss pops":
            batch.pop("y")
        losses = F.cross_entropy(outputs, y, reduction="none")
        if self.edit in ("for the loss", "weights"):
            losses = losses * (get(batch, "w") if self.edit == "for the loss" else self.w(batch))
        return losses.mean() if reduction == "mean" else losses

    def w(self, batch):
        return ((get(batch, "x") - 100) / 50).square().sum(dim=1)


@cache
def samples(labels=False):
    generator = torch.Generator().manual_seed(1)
    x = 100 + 50 * torch.randn(16, 3, generator=generator)
    y = torch.randint(4, (16,), generator=generator)
    return [{"x": x[i], "y": 3 - y[i] if labels else y[i]} for i in range(16)]


def split_record(batch, size):
    return [Record(*parts) for parts in zip(batch.x.split(size), batch.y.split(size), strict=True)]


def spec(kind, labels=False):
    def collate(items):
        x, y = (torch.stack([item[key] for item in items]) for key in "xy")
        return Record(x, y) if kind == "record" else {"x": x, "y": y}

    data = DataLoader(samples(labels), 8, collate_fn=collate)
    if kind == "dict":
        return data
    return DataSpec(data, split_batch=split_record, get_num_samples_in_batch=lambda batch: len(batch.y))


QUICK = Measures(eigenvalues=1, trace_samples=2, m=(4,), directions=2)
KEYS = {"input_key": "x", "target_key": "y"}
# Everything that evaluates a batch more than once.
AGAIN = {
    "sam": (sgd, lambda: [SAM(0.1)], list),
    "partial": (sgd, lambda: [SAM(0.1, ascent_fraction=0.5)], list),
    "esam": (sgd, lambda: [ESAM(0.1, **KEYS)], list),
    "difference": (rule, lambda: [LazyHessian(1, "finite_difference", 2)], list),
    "lean": (rule, lambda: [Sassha(0.1, hessian_interval=1, batch_fraction=0.4)], list),
    "fisher": (rule, lambda: [LazyHessian(1, "empirical_fisher", batch_fraction=0.4)], list),
    "monitor": (sgd, list, lambda: [SharpnessMonitor("1ba", measures=QUICK)]),
}
# The edit, the model that does the same without one, and whether it needs other labels for that.
EDITS = {
    "assigns": None,
    "in place": None,
    "pops": None,
    "loss pops": None,
    "for the loss": "weights",
    "labels": None,
}


@cache
def result(name, kind, edit, labels=False, smoothed=False):
    """Weights, curvature and all that is logged after two batches in unequal microbatches."""
    optimizer, algorithms, callbacks = AGAIN[name]
    log, model = InMemoryLogger(), Editing(edit)
    run = trainer(
        optimizer,
        [*([LabelSmoothing(0.2, target_key="y")] if smoothed else []), *algorithms()],
        model=model,
        callbacks=callbacks(),
        loggers=[log],
        train_dataloader=spec(kind, labels),
        eval_dataloader=spec(kind, labels) if name == "monitor" else None,
        eval_interval=0,
        device_train_microbatch_size=5,
        max_duration="2ba",
    )
    run.fit()
    run.close()
    state = run.state.optimizers[0].state
    logged = {
        key: [value for _, value in values]
        for key, values in log.data.items()
        if key.startswith(("loss/", "sharpness/", "hessian/")) and "seconds" not in key
    }
    return copied([model.state_dict(), [state[p] for p in model.parameters()]]), logged


def edited():
    """Yield every evaluation with every edit; slow where another pair shows the same."""
    for name in AGAIN:
        for edit in EDITS:
            for kind in ("dict", "record"):
                if kind == "record" and "pops" in edit:
                    continue
                shown = name in ("sam", "difference") if kind == "record" else name != "partial"
                marks = [] if shown and not (name == "fisher" and edit != "pops") else pytest.mark.slow
                yield pytest.param(name, edit, kind, id=f"{name}-{edit}-{kind}", marks=marks)


@pytest.mark.parametrize(("name", "edit", "kind"), list(edited()))
def test_an_edited_batch_is_evaluated_again_as_it_was(name, edit, kind):
    expected = result(name, kind, EDITS[edit], labels=edit == "labels")
    assert_same(expected, result(name, kind, edit))


@pytest.mark.parametrize("edit", ["assigns", "for the loss"])
@pytest.mark.parametrize("name", ["esam", "difference", "lean"])
def test_edits_of_a_forward_and_of_an_algorithm_are_both_made_again(name, edit):
    expected = result(name, "dict", EDITS[edit], smoothed=True)
    assert_same(expected, result(name, "dict", edit, smoothed=True))
    assert_differ(expected, result(name, "dict", edit))


def assert_differ(first, second):
    with pytest.raises(AssertionError):
        assert_same(first, second)


class Mirrored(Algorithm):
    """Changes the labels for the loss, as MixUp does, or in place, as CutMix does to masks."""

    def __init__(self, in_place):
        self.in_place = in_place

    def match(self, event, state):
        return event == Event.BEFORE_LOSS

    def apply(self, event, state, logger):
        labels = 3 - state.batch["y"]
        if self.in_place:
            state.batch["y"].copy_(labels)
        else:
            state.batch["y"] = labels


@pytest.mark.parametrize("name", ["difference", "lean"])
def test_labels_that_an_algorithm_writes_in_place_are_kept(name):
    optimizer, algorithms, _ = AGAIN[name]
    ends = []
    for in_place in (False, True):
        run = trainer(
            optimizer,
            [Mirrored(in_place), *algorithms()],
            model=Editing(),
            train_dataloader=spec("dict"),
            max_duration="1ba",
        )
        run.fit()
        run.close()
        ends.append(copied([run.state.optimizers[0].state[p] for p in run.state.model.parameters()]))
    assert_same(*ends)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["sam", "difference"])
def test_microbatch_transforms_are_applied_once(name, in_place):
    """The same result as from a model that does what the transform does."""

    def transform(batch):
        if in_place:
            batch["x"].sub_(100).div_(50)
        else:
            batch["x"] = (batch["x"] - 100) / 50
        return batch

    class Standardised(Editing):
        def forward(self, batch):
            return self.net(batch["x"])

    optimizer, algorithms, _ = AGAIN[name]
    run = trainer(
        optimizer,
        algorithms(),
        model=Standardised(),
        train_dataloader=DataSpec(spec("dict"), microbatch_transforms=transform),
        device_train_microbatch_size=5,
        max_duration="2ba",
    )
    run.fit()
    run.close()
    (weights, _), _ = result(name, "dict", None)
    assert_same(weights, copied(run.state.model.state_dict()))


class Graphs(ComposerModel):
    """The mean over each graph's nodes, then classes. Its batch has three different first dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nodes, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, batch):
        h, (source, target) = self.nodes(batch["x"]), batch["edges"]
        h = torch.tanh(torch.zeros_like(h).index_add(0, target, h[source]))
        sums = torch.zeros(len(batch["y"]), 4).index_add(0, batch["graph"], h)
        return self.head(sums)

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, batch["y"], reduction=reduction)


@cache
def graphs(count):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(3, 6, (count,), generator=generator).tolist()
    return [
        {
            "x": torch.randn(n, 4, generator=generator, dtype=torch.float64),
            "edges": torch.randint(n, (2, 2 * n), generator=generator),
            "y": torch.randint(2, (), generator=generator),
        }
        for n in sizes
    ]


def joined(items):
    starts = [sum(len(item["x"]) for item in items[:i]) for i in range(len(items))]
    return {
        "x": torch.cat([item["x"] for item in items]),
        "edges": torch.cat([item["edges"] + k for item, k in zip(items, starts, strict=True)], dim=1),
        "graph": torch.cat([torch.full((len(item["x"]),), i) for i, item in enumerate(items)]),
        "y": torch.stack([item["y"] for item in items]),
    }


def split_graphs(batch, size):
    """Return batches of `size` graphs each."""
    parts = []
    for start in range(0, len(batch["y"]), size):
        stop = min(start + size, len(batch["y"]))
        nodes = (batch["graph"] >= start) & (batch["graph"] < stop)
        first = int(nodes.nonzero()[0])
        edges = batch["edges"][:, nodes[batch["edges"][0]]] - first
        graph = batch["graph"][nodes] - start
        parts.append({"x": batch["x"][nodes], "edges": edges, "graph": graph, "y": batch["y"][start:stop]})
    return parts


def graph_data(split, count=16, size=8):
    return DataSpec(
        DataLoader(graphs(count), size, collate_fn=joined),
        get_num_samples_in_batch=lambda batch: len(batch["y"]),
        split_batch=split,
    )


def train_graphs(optimizer, algorithms, split=split_graphs, microbatch=8, **settings):
    """Train one batch of eight graphs."""
    run = trainer(
        optimizer,
        algorithms,
        model=Graphs(),
        train_dataloader=graph_data(split),
        device_train_microbatch_size=microbatch,
        max_duration="1ba",
        **settings,
    )
    run.fit()
    run.close()
    return run


def gradient(model, batch, **settings):
    return torch.autograd.grad(model.loss(model(batch), batch), list(model.parameters()), **settings)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def plain_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("fraction", "microbatch"), [(0.25, 8), (0.75, 8), (0.6, 4)])
def test_the_ascent_takes_the_first_graphs(fraction, microbatch):
    run = train_graphs(plain_sgd, [SAM(0.2, ascent_fraction=fraction)], microbatch=microbatch)
    model, parts, whole = Graphs(), [graphs(16)[:8][i : i + microbatch] for i in range(0, 8, microbatch)], 0
    count = -int(-fraction * microbatch // 1)
    ascent = sum(flat(gradient(model, joined(part[:count]))) for part in parts) / len(parts)
    with torch.no_grad():
        before = flat(model.parameters())
        nn.utils.vector_to_parameters(before + 0.2 * ascent / ascent.norm(), model.parameters())
    whole = flat(gradient(model, joined(graphs(16)[:8])))
    torch.testing.assert_close(
        flat(run.state.model.parameters()), before - 0.1 * whole, rtol=1e-10, atol=1e-12
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "fraction"), [("hutchinson", 0.25), ("empirical_fisher", 0.75), ("empirical_fisher", 1.0)]
)
def test_the_estimate_is_of_the_first_graphs(name, fraction):
    run = train_graphs(rule, [LazyHessian(1, name, batch_fraction=fraction)])
    model, count = Graphs(), round(8 * fraction)
    grads = gradient(model, joined(graphs(16)[:count]), create_graph=True)
    if name == "hutchinson":
        expected = hutchinson_diagonal(grads, list(model.parameters()), [(0, 0, 0, 0, 0)])
    else:
        expected = [count * g**2 for g in grads]
    state = run.state.optimizers[0].state
    found = flat([state[p]["exp_hessian"] for p in run.state.model.parameters()])
    torch.testing.assert_close(found, flat(expected).abs(), rtol=1e-10, atol=1e-13)


UNSPLIT = {"whole": lambda batch, size: [batch], "by rows": None}
WANTED = {
    "sam": (sgd, lambda: SAM(ascent_fraction=0.5), r"SAM: ascent_fraction=0.5 takes the first 4 samples"),
    "lean": (rule, lambda: Sassha.lean(), r"SAM: ascent_fraction=0.2 takes the first 2 samples"),
    "hessian": (rule, lambda: LazyHessian(batch_fraction=0.5), r"LazyHessian: a batch_fraction below 1"),
    "esam": (sgd, lambda: ESAM(input_key="y", target_key="y"), r"ESAM: gamma=0.5 selects samples"),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("split", UNSPLIT.values(), ids=UNSPLIT)
@pytest.mark.parametrize("name", WANTED)
def test_a_part_of_a_batch_that_cannot_be_cut_is_refused(name, split):
    optimizer, algorithm, message = WANTED[name]
    start = flat(Graphs().parameters())
    # Composer's own split would cut nodes and edges like graphs; nothing larger than the batch does not.
    with pytest.raises(SettingError, match=message) as error:
        train_graphs(optimizer, [algorithm()], split, microbatch=100)
    assert "\n" not in str(error.value) and torch.equal(start, flat(Graphs().parameters()))


@pytest.mark.usefixtures("float64")
def test_the_monitor_counts_graphs_and_groups_them():
    log = InMemoryLogger()
    measures = Measures(eigenvalues=0, trace_samples=0, m=(3,), directions=0)
    callback = SharpnessMonitor("1ba", graph_data(split_graphs, 9, 5), measures=measures)
    run = train_graphs(plain_sgd, [], loggers=[log], callbacks=[callback])
    model = run.state.model
    with undisturbed(model):
        every = joined(graphs(9))
        mean = model.loss(model(every), every).item()
        threes = [joined(graphs(9)[i : i + 3]) for i in (0, 3, 6)]
        expected = sum(sam_sharpness(objective_of(model, [(b, 3)]), 0.05, 1) for b in threes) / 3
    assert log.data["sharpness/loss"][-1][1] == pytest.approx(mean, rel=1e-12)
    assert log.data["sharpness/m3"][-1][1] == pytest.approx(expected, rel=1e-8)


@pytest.mark.usefixtures("float64")
def test_groups_of_what_cannot_be_cut_are_refused_at_the_start():
    callback = SharpnessMonitor("1ba", graph_data(None), measures=QUICK)
    with pytest.raises(
        SettingError, match=r"sharpness: m-sharpness divides batches, .*Measures\(m=\(\)\)"
    ) as error:
        train_graphs(plain_sgd, [], callbacks=[callback])
    assert "\n" not in str(error.value)


def test_a_batch_without_a_number_of_samples_is_not_measured():
    loader = DataLoader(graphs(16), 8, collate_fn=joined)
    with pytest.raises(SettingError, match=r"sharpness: .* the batch has the first dimensions") as error:
        trainer(sgd, callbacks=[SharpnessMonitor(dataloader=loader)]).fit()
    assert "\n" not in str(error.value)


class Collected(ComposerModel):
    """Takes images of several sizes and their texts, as lists; notes which texts come with a graph."""

    def __init__(self, note):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.note = nn.Linear(3, 2), note

    def forward(self, batch):
        assert [float(image[0, 0, 0]) for image in batch["x"]] == [float(text) for text in batch["texts"]]
        if torch.is_grad_enabled():
            self.note(batch["texts"])
        return self.net(torch.stack([image.mean(dim=(1, 2)) for image in batch["x"]]))

    def loss(self, outputs, batch, reduction="mean"):
        return F.cross_entropy(outputs, batch["y"], reduction=reduction)


LISTS = {
    "sam": (sgd, lambda: SAM(ascent_fraction=0.5), [[0, 1, 2], [0, 1, 2, 3, 4]]),
    "hessian": (rule, lambda: LazyHessian(1, batch_fraction=0.4), [[0, 1, 2, 3, 4], [0, 1]]),
    "esam": (sgd, lambda: ESAM(gamma=0.6, input_key="y", target_key="y"), [[0, 1, 2, 3, 4], [0, 1, 2]]),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_samples_are_cut_as_lists(name):
    def collate(items):
        images = [torch.full((3, 2 + i, 4), float(i)) for i in items]
        return {"x": images, "texts": [str(i) for i in items], "y": torch.tensor(items) % 2}

    optimizer, algorithm, expected = LISTS[name]
    found = []  # outside of the model, which forgets what a hidden pass has left in it
    model = Collected(found.append)
    run = trainer(
        optimizer,
        [algorithm()],
        model=model,
        train_dataloader=DataLoader(range(5), 5, collate_fn=collate),
        max_duration="1ba",
    )
    run.fit()
    run.close()
    assert [len(seen) for seen in found] == [len(seen) for seen in expected]
    if name != "esam":  # which selects by the rise of the loss
        assert [[int(text) for text in seen] for seen in found] == expected
