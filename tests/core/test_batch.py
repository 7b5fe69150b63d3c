"""Every kind of batch is read and changed without being written into."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lightning_speedups.core.batch import check_place, check_places, count_samples, get_part, path_of, replace_part


class Pair(NamedTuple):
    image: int
    label: int


@dataclass(frozen=True)
class Frozen:
    image: int
    label: int


class OnlyReading(dict):
    def __init__(self, **parts):
        super().__init__(parts)
        self.origin = "kept"


BATCHES = [
    ([1, 2], 1),
    ((1, 2), 1),
    (Pair(1, 2), 1),
    (Pair(1, 2), "label"),
    ({"image": 1, "label": 2}, "label"),
    (OnlyReading(image=1, label=2), "label"),
    (Frozen(1, 2), "label"),
    (SimpleNamespace(image=1, label=2), "label"),
    ([1, 2], -1),
    ({"views": [1, 2], "label": 3}, ("views", 1)),
    ([(0, {"x": 2})], (0, 1, "x")),
    ((Frozen([1], Pair(1, 2)), 5), (0, "label", "label")),
    ([1, 2], (1,)),
]


@pytest.mark.parametrize(("batch", "place"), BATCHES)
def test_one_part_is_replaced_in_a_copy_of_the_same_type(batch, place):
    before = repr(batch)
    changed = replace_part(batch, place, "new")
    assert get_part(changed, place) == "new"
    assert get_part(batch, place) == 2
    assert repr(batch) == before
    assert type(changed) is type(batch)


def test_only_the_containers_on_the_path_are_copied():
    batch = {"views": [1, [2]], "other": [3]}
    changed = replace_part(batch, ("views", 0), "new")
    assert changed == {"views": ["new", [2]], "other": [3]}
    assert changed["other"] is batch["other"]
    assert changed["views"][1] is batch["views"][1]
    assert batch == {"views": [1, [2]], "other": [3]}


def test_a_path_of_no_step_is_the_batch_itself():
    assert get_part([1], ()) == [1]
    assert replace_part([1], (), 2) == 2


def test_what_else_an_object_carries_is_kept():
    assert replace_part(OnlyReading(image=1, label=2), "label", 3).origin == "kept"


@pytest.mark.parametrize(
    ("batch", "place", "told"),
    [
        ({"image": 1}, "label", r"no part 'label' in a batch of type dict with the keys \['image'\]"),
        ((1,), 1, "no part 1 in a batch of type tuple with 1 parts"),
        (Pair(1, 2), "x", r"named \['image', 'label'\]"),
        (SimpleNamespace(image=1), "label", r"with the attributes \['image'\]"),
        ((1, 2), "label", "no part 'label'"),
        ({"views": [1, 2]}, ("views", 2), r"no part 2 in the batch's part \('views',\) of type list with 2 parts"),
        ({"views": {"a": 1}}, ("views", "b", 0), r"no part 'b' .* \('views',\) .* keys \['a'\]"),
        ({"views": [1, 2]}, ("image", 0), r"no part 'image' in a batch of type dict with the keys \['views'\]"),
        ([[[5]]], (0, 0, 0, 0), r"no part 0 in the batch's part \(0, 0, 0\) of type int$"),
    ],
)
def test_a_missing_part_is_an_error_that_says_what_there_is(batch, place, told):
    with pytest.raises(LookupError, match=told):
        get_part(batch, place)
    with pytest.raises(LookupError, match=told):
        replace_part(batch, place, 0)


class Slots:
    __slots__ = ("images",)

    def __init__(self):
        self.images = torch.zeros(5, 3)


@dataclass
class Images:
    path: str
    pixels: torch.Tensor


class NamedImages(NamedTuple):
    path: str
    pixels: torch.Tensor


FIVE = torch.zeros(5, 3, 2, 2)


@pytest.mark.parametrize(
    "batch",
    [
        FIVE,
        torch.zeros(5),
        [FIVE, torch.zeros(7)],
        (FIVE, torch.zeros(7)),
        {"image": FIVE, "label": torch.zeros(7)},
        {"id": ["a", "b"], "parts": {"image": (FIVE,)}},
        [["a", "b"], "c", 3, None, FIVE],
        Images("a.png", FIVE),
        NamedImages("a.png", FIVE),
        SimpleNamespace(name="a", inner=SimpleNamespace(image=FIVE)),
        torch.nested.nested_tensor([torch.zeros(i + 1) for i in range(5)], layout=torch.jagged),
        torch.zeros(5, 3).to_sparse(),
        [{}, [], (), FIVE],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_the_samples_are_the_length_of_the_first_tensor_wherever_it_is(batch):
    assert count_samples(batch) == 5


def test_a_tensor_of_no_dimension_is_one_sample_and_an_empty_one_none():
    assert count_samples(torch.tensor(3.0)) == 1
    assert count_samples([torch.zeros(0, 3), torch.zeros(5)]) == 0


@pytest.mark.parametrize(
    "batch", [None, 5, "text", [], {}, {"a": [1, "b"]}, SimpleNamespace(), Slots(), object(), FIVE.shape]
)
def test_without_a_tensor_nobody_knows_the_samples(batch):
    assert count_samples(batch) is None


def test_a_batch_that_holds_itself_is_counted():
    batch = SimpleNamespace()
    batch.itself, batch.image = batch, FIVE
    assert count_samples(batch) == 5


@pytest.mark.parametrize("place", [0, -1, "x", (0,), ("views", 0), ("a", "b", -1)])
def test_places_are_indices_names_and_paths(place):
    check_place("inputs", place)
    assert get_part(replace_part({"views": [0]}, ("views", 0), place), path_of(("views", 0))) == place


@pytest.mark.parametrize("place", [None, True, 1.5, (), ("views", None), (True,), [0], (("a",),), torch.tensor(0)])
def test_what_is_no_place_is_refused_by_name(place):
    with pytest.raises(ValueError, match=r"`inputs` to be an index, a key, an attribute name or a path .*, but got "):
        check_place("inputs", place)


def test_one_place_or_several_are_taken_as_several():
    assert check_places("inputs", 0) == (0,)
    assert check_places("inputs", [0, "x", (1, "y")], labels=2, maps=(1, "z")) == (0, "x", (1, "y"))
    assert check_places("inputs", ("views", 0)) == (("views", 0),)


@pytest.mark.parametrize(
    ("places", "apart", "told"),
    [
        ([], {}, r"Expected `inputs` to name at least one place in the batch, but got \[\]"),
        (None, {}, "Expected `inputs` to be an index"),
        ([0, None], {}, "Expected `inputs` to be an index.* but got None"),
        (0, {"labels": [1]}, r"Expected `labels` to be an index.* but got \[1\]"),
        ([0, 0], {}, r"Expected `inputs` to be different places in the batch, but got \[0, 0\]"),
        ([0, 1], {"labels": 1}, r"Expected `labels` and `inputs` to be different places .* got 1 and \[0, 1\]"),
        (0, {"labels": "x", "maps": ("x",)}, r"`labels` and `maps` and `inputs` .* got 'x' and \('x',\) and 0"),
    ],
)
def test_places_that_cannot_be_or_are_the_same_are_refused(places, apart, told):
    with pytest.raises(ValueError, match=told):
        check_places("inputs", places, **apart)
