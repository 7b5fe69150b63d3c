import pytest

from lightning_speedups.measure.arms import ARMS, Situation, choose_arms
from lightning_speedups.measure.errors import CompareError


def test_the_table_is_consistent():
    for name, arm in ARMS.items():
        assert arm.name == name
        assert arm.description
        assert "\n" not in arm.description
        if arm.baseline is not None:
            assert ARMS[arm.baseline].baseline is None
            # a ratio between different starting weights would not measure the trick
            assert ARMS[arm.baseline].pretrained == arm.pretrained


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_ingredients_are_fresh_for_every_run(arm):
    at = Situation(epochs=4, lr=0.02, accelerator="cpu", backbone="model.backbone", seed=0)
    first, again = arm.build(at), arm.build(at)
    assert first.criterion is not again.criterion
    assert not set(map(id, first.callbacks)) & set(map(id, again.callbacks))
    if arm.baseline is not None:
        plain = ARMS["plain"].build(at)
        assert first.callbacks or first.trainer or type(first.criterion) is not type(plain.criterion)


def test_choosing_adds_the_baseline_and_keeps_the_order_of_the_table():
    assert [arm.name for arm in choose_arms(["smoothing", "onecycle"])] == ["plain", "onecycle", "smoothing"]
    assert [arm.name for arm in choose_arms(["freeze"])] == ["finetune", "freeze"]
    assert [arm.name for arm in choose_arms(["finetune", "finetune"])] == ["finetune"]
    assert [arm.name for arm in choose_arms(None)] == [name for name, arm in ARMS.items() if not arm.on_request]
    assert [arm.name for arm in choose_arms(["cyclic"])] == ["plain", "cyclic"]


def test_a_short_arm_rounds_and_trains_at_least_one_epoch():
    assert [ARMS["short"].epochs(epochs) for epochs in (1, 2, 4, 8, 10)] == [1, 2, 3, 6, 8]
    assert ARMS["all"].epochs(7) == 7


def test_unknown_and_no_arms():
    with pytest.raises(CompareError, match=r"unknown arm 'mixip': did you mean 'mixup'.*plain"):
        choose_arms(["plain", "mixip"])
    with pytest.raises(CompareError, match="unknown arm 'zzz': the arms are plain"):
        choose_arms(["zzz"])
    with pytest.raises(CompareError, match="no arm"):
        choose_arms([])
