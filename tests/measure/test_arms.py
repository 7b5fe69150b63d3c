import pytest
import torch

from lightning_speedups.measure.arms import ARMS, Situation, choose_arms, looks
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import ImageData
from lightning_speedups.recipes import recipe
from lightning_speedups.tricks.hardware.trainer_defaults import trainer_defaults
from zoo import made_of


def situation(data=None, **options):
    given = {"epochs": 4, "lr": 0.02, "accelerator": "cpu", "backbone": "model.backbone", "seed": 3}
    return Situation(**(given | {"data": data or digit_collages(40, 20)} | options))


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
    at = situation()
    first, again = arm.build(at), arm.build(at)
    assert first.criterion is not again.criterion
    assert not set(map(id, first.callbacks)) & set(map(id, again.callbacks))
    if arm.baseline is not None:
        plain = ARMS["plain"].build(at)
        assert first.callbacks or first.trainer or type(first.criterion) is not type(plain.criterion)


def test_who_runs_without_being_named():
    named = {name: (arm.single, arm.on_request) for name, arm in ARMS.items()}
    assert [name for name, (single, on_request) in named.items() if not (single or on_request)] == [
        "plain", "tuned", "fast",
    ]  # fmt: skip
    assert [name for name, (single, _) in named.items() if single] == ["onecycle"]
    assert not any(single and on_request for single, on_request in named.values())


def test_tuned_has_nothing_of_this_package():
    at = situation(lr=0.03)
    ingredients = ARMS["tuned"].build(at)
    assert ingredients.callbacks == ()
    assert ingredients.loader is None
    assert ingredients.one_cycle == pytest.approx(0.15)
    assert type(ingredients.criterion) is torch.nn.CrossEntropyLoss
    assert ingredients.criterion.label_smoothing == 0.1
    assert ingredients.trainer.keys() == {"precision"}


def test_fast_is_the_recipe_for_these_images_and_digits_are_not_mirrored():
    digits = digit_collages(40, 20)
    photos = ImageData("p", digits.x_train.repeat(1, 3, 1, 1), digits.y_train, digits.x_test, digits.y_test, 10)
    for data, flip in ((digits, None), (photos, "alternating")):
        ingredients = ARMS["fast"].build(situation(data))
        stack = recipe("vision-fast", (data.x_train, data.y_train), epochs=4, flip=flip, start=1.0, seed=3)
        assert made_of(list(ingredients.callbacks)) == made_of(stack.trainer["callbacks"])
        assert type(ingredients.criterion) is type(stack.loss)
        batches = zip(ingredients.loader, stack.loader, strict=True)
        assert all(torch.equal(a, b) for one, other in batches for a, b in zip(one, other, strict=True))
        assert ingredients.trainer["val_check_interval"] == looks(len(stack.loader))
    assert ARMS["fast"].epochs(8) == 2


@pytest.mark.parametrize("batches", range(1, 200))
def test_an_epoch_is_looked_at_some_times_and_at_its_end(batches):
    every = looks(batches)
    assert batches % every == 0
    assert every == batches or 3 <= batches // every < 10 or batches < 10


@pytest.mark.parametrize("arm", ["fast", "tuned", "precision"])
@pytest.mark.parametrize("accelerator", ["cpu", "mps"])
def test_precision_is_chosen_for_the_accelerator_that_was_asked_for(arm, accelerator):
    chosen = trainer_defaults(precision="auto", accelerator=accelerator)
    trainer = ARMS[arm].build(situation(accelerator=accelerator)).trainer
    assert trainer["precision"] == chosen["precision"]
    assert trainer.get("accelerator", accelerator) == accelerator
    assert "max_epochs" not in trainer


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
