"""Stages against a walk through the epochs, and what a schedule may not say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.modules.layers import Layer
from lightning_speedups.modules.unfreezing import Stage, all_names, check_schedule, gradually, one_by_one, stages

NAMES = ["stem", "blocks.0", "blocks.1", "neck"]
LAYERS = [Layer(name, ()) for name in NAMES]


@pytest.mark.parametrize(
    "schedule", [None, {}, {0: "head"}, {2: ["layer4", "layer3"], 0: ("head",)}, {10**6: "all"}], ids=str
)
def test_what_maps_epochs_to_names_is_taken(schedule):
    check_schedule("schedule", schedule)


@pytest.mark.parametrize(
    "schedule",
    [
        [(0, "head")], "head", {"0": "head"}, {-1: "head"}, {0.0: "head"}, {True: "head"}, {0: ""}, {0: []}, {0: None},
        {0: [""]}, {0: [1]}, {0: {"head"}}, {0: "head", 1: 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_is_refused(schedule):
    with pytest.raises(ValueError, match=r"Expected `refreeze` to map epochs.*but got") as caught:
        check_schedule("refreeze", schedule)
    assert str(caught.value).endswith(f"{schedule!r}.")


@given(st.integers(0, 9), st.integers(1, 5))
def test_layers_thaw_one_by_one_from_the_last(first, every):
    schedule = gradually(LAYERS, first, every)
    check_schedule("schedule", schedule)
    assert list(schedule.values()) == NAMES[::-1]
    assert list(schedule) == list(range(first, first + 4 * every, every))
    assert gradually([], first, every) == {}


def walk(thaw, freeze, epochs):
    """What trains in each epoch, by hand."""
    training, seen = set(), []
    for epoch in range(epochs):
        training = (training | set(thaw.get(epoch, ()))) - set(freeze.get(epoch, ()))
        seen.append(frozenset(training))
    return seen


def in_epochs(found, epochs):
    return [[stage.training for stage in found if stage.epoch <= epoch][-1] for epoch in range(epochs)]


@given(st.data())
def test_each_epoch_trains_what_a_walk_through_the_epochs_says(data):
    epochs = st.integers(0, 6)
    thaw = data.draw(st.dictionaries(epochs, st.lists(st.sampled_from(NAMES), min_size=1)))
    freeze, training = {}, set()
    for epoch in range(7):
        trained_before = sorted(training - set(thaw.get(epoch, ())))
        leaving = data.draw(st.sets(st.sampled_from(trained_before))) if trained_before else set()
        if leaving:
            freeze[epoch] = sorted(leaving)
        training = (training | set(thaw.get(epoch, ()))) - leaving
    found = stages(LAYERS, thaw, freeze)
    assert in_epochs(found, 8) == walk(thaw, freeze, 8)
    assert found[0].epoch == 0
    assert all(one.epoch < other.epoch and one.training != other.training for one, other in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("thaw", "freeze", "expected"),
    [
        ({}, {}, [(0, "")]),
        ({0: "all"}, {}, [(0, "stem blocks.0 blocks.1 neck")]),
        ({0: "head"}, {}, [(0, "")]),
        ({0: ["head", "neck"], 3: "blocks"}, {}, [(0, "neck"), (3, "neck blocks.0 blocks.1")]),
        ({0: "head", 2: "neck", 4: ["neck"]}, {}, [(0, ""), (2, "neck")]),
        ({1: "blocks"}, {2: "blocks.0"}, [(0, ""), (1, "blocks.0 blocks.1"), (2, "blocks.1")]),
        ({1: "neck", 5: "neck"}, {3: "neck"}, [(0, ""), (1, "neck"), (3, ""), (5, "neck")]),
        ({4: "stem", 0: "neck"}, {}, [(0, "neck"), (4, "neck stem")]),
    ],
    ids=str,
)
def test_stages_by_hand(thaw, freeze, expected):
    assert stages(LAYERS, thaw, freeze) == [Stage(epoch, frozenset(names.split())) for epoch, names in expected]


@pytest.mark.parametrize(
    ("thaw", "freeze", "every", "expected"),
    [
        ({1: "blocks.*"}, {}, 1, [(0, ""), (1, "blocks.1"), (2, "blocks.1 blocks.0")]),
        ({0: "blocks.*"}, {}, 2, [(0, "blocks.1"), (2, "blocks.1 blocks.0")]),
        ({0: ["neck", "blocks.*"], 5: "all"}, {}, 1, [(0, "neck blocks.1"), (1, "neck blocks.1 blocks.0"), (5, "all")]),
        ({0: "all"}, {2: "blocks.*"}, 3, [(0, "all"), (2, "stem blocks.1 neck"), (5, "stem neck")]),
        ({1: "*"}, {}, 1, [(0, ""), (1, "neck"), (2, "neck blocks.0 blocks.1"), (3, "all")]),
        ({1: "b?ocks"}, {}, 1, [(0, ""), (1, "blocks.0 blocks.1")]),
    ],
    ids=str,
)
def test_what_a_pattern_fits_comes_one_by_one_from_the_last_and_goes_from_the_first(thaw, freeze, every, expected):
    by_hand = [Stage(epoch, frozenset(NAMES if names == "all" else names.split())) for epoch, names in expected]
    assert stages(LAYERS, thaw, freeze, every) == by_hand


def test_names_without_wildcards_stay_where_they_are():
    schedule = {4: "neck", 0: ["head", "blocks"]}
    assert one_by_one(schedule, LAYERS, 3) == {4: ["neck"], 0: ["head", "blocks"]}
    assert all_names(schedule, None, {1: "stem"}) == ["neck", "head", "blocks", "stem"]
    with pytest.raises(LookupError, match="tails"):
        stages(LAYERS, {1: "tails.*"}, {})


def test_all_of_a_gradual_schedule():
    found = stages(LAYERS, gradually(LAYERS, 1, 2), {})
    assert [stage.epoch for stage in found] == [0, 1, 3, 5, 7]
    assert [len(stage.training) for stage in found] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("thaw", "freeze", "told"),
    [
        ({1: "head"}, {}, "the head trains from the start, but the schedule thaws it in epoch 1"),
        ({0: "neck"}, {0: "neck"}, r"epoch 0 must train before it, but \['neck'\] does not"),
        ({0: "neck"}, {1: "blocks"}, r"epoch 1 must train before it, but \['blocks.0', 'blocks.1'\] does not"),
        ({0: "neck", 2: "neck"}, {2: "neck"}, r"epoch 2 must train before it, but \['neck'\] does not"),
        ({0: "neck"}, {2: ["neck"], 3: ["neck"]}, r"epoch 3 must train before it, but \['neck'\] does not"),
        ({0: "all"}, {1: "head"}, "head"),
    ],
)
def test_contradictions_are_refused(thaw, freeze, told):
    with pytest.raises(ValueError, match=told):
        stages(LAYERS, thaw, freeze)


@pytest.mark.parametrize(("thaw", "freeze"), [({0: "tail"}, {}), ({0: "all"}, {2: ["stem", "tail"]})])
def test_a_layer_that_there_is_not_is_named(thaw, freeze):
    with pytest.raises(LookupError) as caught:
        stages(LAYERS, thaw, freeze)
    assert caught.value.args == ("tail",)
