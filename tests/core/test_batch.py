"""Every kind of batch is read and changed without being written into."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lightning_speedups.core.batch import (
    check_place,
    check_places,
    count_by_loader,
    count_samples,
    get_part,
    is_map_of,
    left_behind,
    loader_paths,
    path_of,
    places_of_tensors,
    replace_part,
    say_places,
    seems_channels_last,
    tensors_in,
)


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


class Keeps:
    """Keeps its attributes in a dict of its own, as detectron2's Instances."""

    def __init__(self, **parts):
        self.__dict__["_kept"] = parts

    def __getattr__(self, name):
        if name.startswith("__") or name not in self.__dict__.get("_kept", ()):
            raise AttributeError(name)
        return self._kept[name]

    def __setattr__(self, name, part):
        self._kept[name] = part


class Indexed(Keeps):
    """Hands them out as items too, and copies itself, as torch_geometric's Data."""

    def __getitem__(self, name):
        return self._kept[name]

    def __copy__(self):
        return type(self)(**self._kept)


class OwnDict(dict):
    """The recipe by which a dict's items become attributes."""

    def __init__(self, **parts):
        super().__init__(parts)
        self.__dict__ = self


class Output(OrderedDict):
    """Holds each part twice, as transformers' ModelOutput."""

    def __init__(self, **parts):
        super().__init__(parts)
        vars(self).update(parts)

    def __setitem__(self, name, part):
        super().__setitem__(name, part)
        vars(self)[name] = part


class Encoding(UserDict):
    def __init__(self, **parts):
        super().__init__(parts)

    def __getattr__(self, name):
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class OneByOne(tuple):
    """A tuple that takes its parts one by one, and has an attribute of its own."""

    def __new__(cls, image, label):
        made = super().__new__(cls, (image, label))
        made.origin = "kept"
        return made


class Strict:
    """Lets nobody set anything, in words of its own, as pydantic."""

    def __init__(self, **parts):
        vars(self).update(parts)

    def __setattr__(self, name, part):
        raise ValueError("frozen")


class Derives(SimpleNamespace):
    @cached_property
    def half(self):
        return self.label / 2


def item(name):
    return lambda batch: batch[name]


def attribute(name):
    return lambda batch: getattr(batch, name)


BY_NAME = [attribute("label")]
BOTH = [attribute("label"), item("label")]
HANDS_OUT = [
    (lambda x, y: Indexed(image=x, label=y), "label", BOTH),
    (lambda x, y: OwnDict(image=x, label=y), "label", BOTH),
    (lambda x, y: Output(image=x, label=y), "label", BOTH),
    (lambda x, y: Encoding(image=x, label=y), "label", BOTH),
    (OneByOne, 1, [item(1)]),
    (lambda x, y: Strict(image=x, label=y), "label", BY_NAME),
    (lambda x, y: [Indexed(image=x, label=y)], (0, "label"), [lambda batch: batch[0].label]),
    (lambda x, y: Indexed(image=x, parts={"label": y}), ("parts", "label"), [lambda batch: batch.parts["label"]]),
    (namedtuple("Named", ["image", "label"]), 1, [item(1), attribute("label")]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "place", "ways"), HANDS_OUT)
def test_the_new_part_is_handed_out_in_every_way_and_the_old_one_by_the_batch_itself(make, place, ways):
    image, label, new = torch.zeros(2, 3), torch.zeros(2), torch.ones(2)
    batch = make(image, label)
    changed = replace_part(batch, place, new)
    again = replace_part(changed, place, label)  # a copy of a copy is no worse
    assert type(changed) is type(batch)
    for way in ways:
        assert way(changed) is new
        assert way(batch) is way(again) is label
    assert any(one is image for one in tensors_in(changed))


def test_what_a_tuple_carries_is_kept_and_what_was_made_of_the_old_part_is_made_anew():
    assert replace_part(OneByOne(1, 2), 0, 3).origin == "kept"
    batch = Derives(label=torch.ones(2))
    assert batch.half.tolist() == [0.5, 0.5]
    assert replace_part(batch, "label", torch.zeros(2)).half.tolist() == [0, 0]
    assert batch.half.tolist() == [0.5, 0.5]


class ReadOnly:
    def __init__(self, label):
        self._label = label

    label = property(lambda self: self._label)


class Inside:
    """What is behind it, a copy shares."""

    def __init__(self, label):
        self.__dict__["_behind"] = SimpleNamespace(label=label)

    label = property(lambda self: self._behind.label, lambda self, part: setattr(self._behind, "label", part))


class Single(SimpleNamespace):
    def __copy__(self):
        return self


class Fresh:
    def __init__(self, label):
        self._label = label

    label = property(lambda self: self._label.clone(), lambda self, part: setattr(self, "_label", part))


class Casts(ReadOnly):
    label = property(lambda self: self._label, lambda self, part: setattr(self, "_label", part.double()))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ReadOnly, "does not hand out what it was given"),
        (lambda label: Keeps(label=label), "its copy shares its parts with it"),
        (Inside, "its copy shares its parts with it"),
        (lambda label: Single(label=label), "its copy shares its parts with it"),
        (Fresh, "does not hand out what it was given"),
        (Casts, "does not hand out what it was given"),
        (lambda label: MappingProxyType({"label": label}), "mappingproxy"),
    ],
)
def test_what_cannot_be_copied_or_changed_is_refused_by_name_and_stays_as_it_is(make, reason):
    label = torch.arange(3)
    batch = make(label)
    with pytest.raises(
        ValueError, match=rf"another part 'label', but got {type(batch).__name__} .*{reason}.* Let `coll"
    ):
        replace_part([batch], (0, "label"), torch.zeros(3))
    assert get_part(batch, "label").tolist() == [0, 1, 2]
    assert isinstance(batch, Fresh) or get_part(batch, "label") is label


def test_a_path_into_none_is_none():
    assert get_part([{"b": None}], (0, "b", 1, "x")) is None
    with pytest.raises(LookupError, match="no part 'a'"):
        get_part({"b": None}, ("a", 0))


def test_the_places_of_tensors_are_spelled_as_they_can_be_named():
    one, batch = torch.zeros(2, 3), {}
    batch.update(a=[one, (one, "text")], b=SimpleNamespace(c=one), d=Indexed(e=one, f=3), g=None, h={4: one}, own=batch)
    places = [place for place, _ in places_of_tensors(batch)]
    assert places == [("a", 0), ("a", 1, 0), ("b", "c"), ("d", "e"), ("h", 4)]
    assert all(get_part(batch, place) is one for place in places)
    assert [place for place, _ in places_of_tensors([one])] == [0]
    assert say_places([[one] * 3], most=2).endswith("at (0, 0) of shape (2, 3), (0, 1) of shape (2, 3), …")
    assert say_places(["text"]) == say_places(one) == ""


@pytest.mark.parametrize(
    ("shape", "is_last"),
    [
        ((8, 28, 28, 1), True), ((8, 32, 32, 3), True), ((8, 224, 160, 4), True), ((8, 5, 64, 48, 3), True),
        ((8, 3, 4, 4), False), ((8, 3, 4, 3), False), ((8, 1, 28, 28), False), ((8, 3, 32, 32), False), ((8, 4, 4, 4), False),
        ((8, 3, 64, 4), False), ((8, 1, 64, 1), False), ((8, 2048, 8, 4), False), ((8, 12, 1000, 1), False), ((8, 5, 8, 8), False),
        ((8, 64, 64), False), ((8, 100, 3), False), ((224, 224, 3), True), ((8, 3), False), ((8,), False), ((), False),
    ],
)  # fmt: skip
def test_images_with_their_channels_last_are_told_from_narrow_ones(shape, is_last):
    assert seems_channels_last(shape) is is_last


def test_maps_have_the_proportions_of_their_images():
    assert is_map_of((8, 3, 32, 48), (8, 8, 12))
    assert is_map_of((8, 3, 225, 224), (8, 5, 57, 56))
    assert not is_map_of((8, 3, 32, 32), (8, 5, 10))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_goes_with_images_is_found_and_nothing_else_is():
    size = (16, 12)
    goes = {
        "image": torch.zeros(2, 3, *size),
        "mask": torch.zeros(2, *size),
        "targets": [{"masks": torch.zeros(4, *size)}],
    }
    goes |= {"gt_boxes": torch.zeros(2, 5, 4), "keypoints": torch.zeros(2, 17, 3), "deep": {"bbox": torch.zeros(2, 4)}}
    stays = {
        "label": torch.zeros(2),
        "metadata": torch.zeros(2, 4),
        "small": torch.zeros(2, 8, 6),
        "grid": torch.zeros(*size),
    }
    stays |= {
        "num_boxes": torch.zeros(2),
        "box_embedding": torch.zeros(2, 4),
        "keypoint": torch.zeros(2, 5, 64),
        "path": ["a"],
    }
    maps, points = left_behind(goes | stays, [goes["image"]], [size])
    assert [*maps] == ["mask", ("targets", 0, "masks")]
    assert [*points] == ["gt_boxes", "keypoints", ("deep", "bbox")]
    assert all(get_part(goes, place) is one for place, one in (maps | points).items())
    moved = [goes["image"], goes["mask"], goes["targets"][0]["masks"]]
    assert left_behind(goes, moved, [size])[0] == {}
    assert [*left_behind(goes, [], [size], [("targets",), ("deep",)])[0]] == [("targets", 0, "masks")]
    ragged = torch.nested.nested_tensor([torch.zeros(n, 4) for n in (2, 3)], layout=torch.strided)  # of no shape
    assert left_behind({"boxes": ragged}, [], [size]) == ({}, {})
    assert say_places([ragged, torch.zeros(2)]) == ": the batch has tensors at 1 of shape (2,)"
    several = {"mask": torch.zeros(2, *size), "full": torch.zeros(2, 32, 24)}
    assert [*left_behind(several, [], [size, (32, 24)])[0]] == ["mask", "full"]


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


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"a": [FIVE, torch.zeros(5)], "b": [[FIVE], {"x": torch.zeros(2)}]}, 12),
        ({"a": None, "b": [[FIVE], None]}, 5),
        ({"a": None, "b": None}, 0),
        ({"a": ["text"], "b": [FIVE, FIVE]}, None),
        ({"image": FIVE, "label": torch.zeros(5)}, 5),  # what a hook has made of it
        ([FIVE, torch.zeros(5)], 5),
        (FIVE, 5),
    ],
)
def test_the_samples_of_several_loaders_count_together_and_what_a_hook_made_of_them_as_one(batch, count):
    loaders = {"a": "loader", "b": ["loader", "loader"]}
    assert [*loader_paths(loaders)] == [("a",), ("b", 0), ("b", 1)]
    assert count_by_loader(loaders, batch) == count


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
