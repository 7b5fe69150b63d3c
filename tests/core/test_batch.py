"""Every kind of batch is read and changed without being written into."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from lightning_speedups.core.batch import get_part, replace_part


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
]


@pytest.mark.parametrize(("batch", "place"), BATCHES)
def test_one_part_is_replaced_in_a_copy_of_the_same_type(batch, place):
    before = repr(batch)
    changed = replace_part(batch, place, "new")
    assert get_part(changed, place) == "new"
    assert get_part(batch, place) == 2
    assert repr(batch) == before
    assert type(changed) is type(batch)


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
    ],
)
def test_a_missing_part_is_an_error_that_says_what_there_is(batch, place, told):
    with pytest.raises(LookupError, match=told):
        get_part(batch, place)
    with pytest.raises(LookupError, match=told):
        replace_part(batch, place, 0)
