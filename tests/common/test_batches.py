"""Batches of any type: copies, changes, the number of samples, and parts."""

import threading
from collections import UserDict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from composer_sassha.common.batches import (
    UNCHANGED,
    Indivisible,
    Samples,
    Version,
    changed,
    changes,
    copied,
    select,
    shared,
    size_of,
)
from tests.helpers import assert_same

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any


def rows(count, *shape):
    return torch.arange(count * max(1, torch.Size(shape).numel())).reshape(count, *shape)


def parts_of(batch):
    """Return what a container holds, as a dictionary."""
    if isinstance(batch, MutableMapping):
        return dict(batch)
    if isinstance(batch, (list, tuple)):
        return dict(enumerate(batch))
    names = batch.__slots__ if hasattr(batch, "__slots__") else vars(batch)
    return {name: getattr(batch, name) for name in names}


class Stored(MutableMapping):
    """Keeps its entries in a dictionary, which `copy.copy` shares."""

    def __init__(self, **entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __delitem__(self, key):
        del self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


CONTAINERS = {
    "dict": lambda x, y: {"x": x, "y": y},
    "userdict": lambda x, y: UserDict(x=x, y=y),
    "mapping": lambda x, y: Stored(x=x, y=y),
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "namedtuple": Pair,
    "frozen": Frozen,
    "slotted": Slotted,
    "namespace": lambda x, y: SimpleNamespace(x=x, y=y),
}
each_container = pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)


@each_container
def test_a_copy_has_containers_and_tensors_of_its_own(build):
    x, y, names = rows(4, 2), rows(4), ["a", "b", "c", "d"]
    batch = build({"x": [x, names]}, y)
    for of in (None, shared):
        again = copied(batch) if of is None else copied(batch, of)
        assert type(again) is type(batch)
        first, second = parts_of(again).values()
        assert_same([first["x"][0], second], [x, y])
        assert first["x"][1] == names and first["x"][1] is not names
        assert (second is y) == (of is shared)
        first["x"].append("edited")
        first["z"] = 0
    assert parts_of(batch).popitem()[1] is y
    assert next(iter(parts_of(batch).values())) == {"x": [x, names]}


def test_a_copy_of_a_view_does_not_copy_what_it_is_a_view_of():
    part = torch.zeros(1000, 10).split(10)[3]
    assert copied([part])[0].untyped_storage().nbytes() == 10 * 10 * 4


class Uncopied:
    """Refuses copies, as an object does that finds its attributes by `__getattr__`."""

    def __init__(self, **parts):
        self.parts = parts

    def __getattr__(self, name):
        return self.parts[name]


def test_what_cannot_be_copied_is_shared():
    lock, x, read_only = threading.Lock(), rows(4), MappingProxyType({"x": rows(4)})
    batch = {"x": [x], "same": x, "lock": lock, "read_only": read_only, "object": Frozen(x, lock)}
    batch["whole"] = batch
    batch["uncopied"] = Uncopied(x=x, lock=lock)
    again = copied(batch)
    again["x"][0].zero_()
    assert again["same"] is again["x"][0] is again["object"].x and again["lock"] is lock
    assert again["object"].y is lock and type(again["read_only"]) is MappingProxyType
    again["read_only"]["x"].zero_()
    assert_same([batch["x"][0], read_only["x"], again["uncopied"].x], [rows(4)] * 3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_lack_of_memory_for_a_copy_is_raised(error):
    def of(tensor):
        raise error

    with pytest.raises(error):
        copied({"x": [rows(4)]}, of)


class Inherited(Slotted):
    __slots__ = "weight"  # one name


def test_inherited_slots_are_counted_and_cut():
    batch = Inherited(rows(4), rows(4))
    batch.weight = rows(4)
    part = select(batch, slice(1), size_of(batch))
    assert [len(part.x), len(part.y), len(part.weight)] == [1, 1, 1]


def test_the_first_of_a_list_of_samples_take_their_own_changes():
    samples = [{"x": rows(3), "y": i} for i in range(4)]
    before = copied(samples, Version.of)
    for sample in samples:
        sample["y"] += 10
    left = [{"x": rows(3), "y": i} for i in range(2)]
    again = changed(left, changes(before, samples), lambda part: part[:2])
    assert [sample["y"] for sample in again] == [10, 11] and [len(sample["x"]) for sample in again] == [3, 3]


def test_a_copy_keeps_a_tensor_that_requires_a_gradient():
    leaf = torch.ones(3, requires_grad=True)
    assert copied({"x": leaf})["x"] is leaf


@each_container
def test_what_has_changed_is_changed_again_and_nothing_else(build):
    x, y, smooth = rows(4, 2), rows(4), rows(4, 3).float()
    batch = build(x, y)
    before = copied(batch, Version.of)
    assert changes(before, batch) is UNCHANGED
    by = changes(before, build(x, smooth))
    other = build(x + 1, y)
    assert changed(other, UNCHANGED) is other
    again = changed(other, by, lambda part: part[:2])
    assert type(again) is type(batch)
    assert_same(list(parts_of(again).values()), [x + 1, smooth[:2]])
    assert_same(list(parts_of(other).values()), [x + 1, y])


def test_a_write_in_place_is_a_change_and_so_is_a_new_entry():
    batch = {"x": rows(4), "y": {"labels": rows(4)}}
    before = copied(batch, Version.of)
    batch["y"]["labels"].add_(1)
    batch["weight"] = 2.0
    by = changes(before, batch)
    assert by["x"] is UNCHANGED
    again = changed({"x": 5, "y": {"labels": 6, "more": 7}}, by)
    assert again["x"] == 5 and again["y"]["more"] == 7 and again["weight"] == 2.0
    assert_same(again["y"]["labels"], rows(4) + 1)


IMAGES = [torch.zeros(3, 4 + i, 5) for i in range(4)]
SELECTED = {
    "tensor": (rows(4), lambda i: rows(4)[i]),
    "columns": ((rows(4, 2), rows(4)), lambda i: (rows(4, 2)[i], rows(4)[i])),
    "nested": (
        {"a": {"b": rows(4)}, "c": (rows(4, 1),)},
        lambda i: {"a": {"b": rows(4)[i]}, "c": (rows(4, 1)[i],)},
    ),
    "texts": (
        {"t": list("abcd"), "y": rows(4)},
        lambda i: {"t": [list("abcd")[k] for k in i], "y": rows(4)[i]},
    ),
    "list of texts": (list("abcd"), lambda i: [list("abcd")[k] for k in i]),
    "texts beside labels": ((rows(4), list("abcd")), lambda i: (rows(4)[i], [list("abcd")[k] for k in i])),
    "images of several sizes": (IMAGES, lambda i: [IMAGES[k] for k in i]),
    "images in a dictionary": (
        {"x": IMAGES, "y": rows(4)},
        lambda i: {"x": [IMAGES[k] for k in i], "y": rows(4)[i]},
    ),
    "optional texts": (
        {"t": ["a", None, "b", None], "y": rows(4)},
        lambda i: {"t": [["a", None, "b", None][k] for k in i], "y": rows(4)[i]},
    ),
    "samples": ([{"x": rows(4)[k]} for k in range(4)], lambda i: [{"x": rows(4)[k]} for k in i]),
    "images with labels": ([(image, 1) for image in IMAGES], lambda i: [(IMAGES[k], 1) for k in i]),
    "none and values": ((rows(4), None, 2.0, "name"), lambda i: (rows(4)[i], None, 2.0, "name")),
    "no dimension": ([rows(4), torch.tensor(1.5)], lambda i: [rows(4)[i], torch.tensor(1.5)]),
    "array": ({"x": rows(4), "n": np.arange(4)}, lambda i: {"x": rows(4)[i], "n": np.arange(4)[i]}),
}


@pytest.mark.parametrize(("batch", "expected"), SELECTED.values(), ids=SELECTED)
def test_samples_are_selected_from_batches_of_any_shape(batch, expected):
    for index, which in ((slice(2), [0, 1]), (slice(1, 4), [1, 2, 3]), (torch.tensor([3, 0]), [3, 0])):
        assert_same(select(batch, index, 4), expected(which))


PACKED = torch.nn.utils.rnn.pack_sequence([torch.zeros(length) for length in (3, 2, 1, 1)])
REFUSED = {
    "rows and columns": (rows(4), rows(2, 4)),
    "graphs": {"nodes": rows(9, 2), "edges": rows(2, 12), "y": rows(4)},
    "as many parts as graphs": (rows(9, 2).float(), rows(2, 12), rows(9), rows(4)),
    "names of classes": {"y": rows(4), "classes": list("abc")},
    "texts": list("abc"),
    "images": IMAGES[:3],
    "frozen": Frozen(rows(4), rows(5)),
    "slotted": Slotted(rows(4), rows(5)),
    "packed sequences": PACKED,
}


@pytest.mark.parametrize("batch", REFUSED.values(), ids=REFUSED)
def test_what_has_no_entry_for_each_sample_is_not_cut(batch):
    with pytest.raises(Indivisible, match=r"for each of 4 samples"):
        select(batch, slice(2), 4)


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches_are_cut(count):
    batch = (rows(count, 3), {"y": rows(count), "names": ["a"] * count})
    assert size_of(batch) == count
    assert_same(select(batch, slice(2), count), batch)


def test_samples_are_counted_where_all_tensors_agree():
    assert size_of({"x": rows(4, 2), "y": [rows(4), None], "texts": list("abcd"), "n": torch.tensor(3)}) == 4
    for batch, found in (((rows(4), rows(3)), r"dimensions \[3, 4\]"), ({"a": None, "b": 3.0}, "no tensor")):
        with pytest.raises(Indivisible, match=found):
            size_of(batch)


def test_a_loaders_own_split_makes_the_parts():
    """Of batches that are columns of another order: the samples are in the second dimension."""
    asked = []

    def split(batch, size):
        asked.append(size)
        return batch.split(size, dim=1)

    samples, batch = Samples(lambda batch: batch.shape[1], split), rows(2, 7)
    assert_same(samples.first(batch, 3, 7), batch[:, :3])
    assert samples.first(batch, 9, 7) is batch and asked == [3]
    assert_same(samples.parts(batch, 2, 6, 7), [(batch[:, 2:4], 2), (batch[:, 4:6], 2)])
    assert_same(samples.parts(batch, 3, 7, 7), [(batch[:, i : i + 1], 1) for i in range(3, 7)])
    with pytest.raises(Indivisible, match="a str without tensors and lists cannot be cut"):
        Samples(len).first("words", 3, 5)
    stubborn = Samples(lambda batch: batch.shape[1], lambda batch, size: [batch])
    with pytest.raises(Indivisible, match=r"parts of \[7\] samples where 3"):
        stubborn.first(batch, 3, 7)
