"""The arms on text: what each adds, and a comparison from end to end."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from lightning_speedups import cli
from lightning_speedups.measure import TASKS, Arm, CompareError, Ingredients, Settings, compare
from lightning_speedups.measure.arms import Situation, choose_arms
from lightning_speedups.measure.text import TextData, library_text
from lightning_speedups.measure.text_arms import TEXT_ARMS
from lightning_speedups.recipes import recipe
from zoo import made_of

TINY = {"task": "text", "samples": 80, "test_samples": 10, "batch_size": 8, "width": 8, "accelerator": "cpu"}


def tiny(arms, **options):
    return compare(arms=arms, progress=False, **(TINY | options))


def situation(**options):
    given = {"epochs": 0.5, "lr": 0.002, "accelerator": "cpu", "backbone": None, "seed": 3}
    return Situation(**(given | {"data": library_text(40, 10)} | options))


def test_the_table_is_consistent():
    for name, arm in TEXT_ARMS.items():
        assert arm.name == name
        assert arm.description
        assert "\n" not in arm.description
        assert arm.baseline is None or TEXT_ARMS[arm.baseline].baseline is None
        assert not arm.pretrained
        assert not (arm.single and arm.on_request)


@pytest.mark.parametrize("arm", TEXT_ARMS.values(), ids=TEXT_ARMS)
def test_ingredients_are_fresh_for_every_run(arm):
    at = situation()
    first, again = arm.build(at), arm.build(at)
    assert not set(map(id, first.callbacks)) & set(map(id, again.callbacks))
    assert arm.baseline is None or first.callbacks or first.trainer


def test_fast_is_the_recipe_for_this_text():
    at = situation()
    ingredients = TEXT_ARMS["fast"].build(at)
    stack = recipe("text-fast", (at.data.x_train, at.data.y_train), epochs=0.5, seed=3)
    assert made_of(list(ingredients.callbacks)) == made_of(stack.trainer["callbacks"])
    assert type(ingredients.criterion) is type(stack.loss)
    batches = zip(ingredients.loader, stack.loader, strict=True)
    assert all(torch.equal(a, b) for one, other in batches for a, b in zip(one, other, strict=True))
    assert "max_steps" not in ingredients.trainer


def test_arms_are_chosen_from_the_tables_of_the_task():
    assert [arm.name for arm in choose_arms(["muon", "fast"], TEXT_ARMS)] == ["plain", "fast", "muon"]
    with pytest.raises(CompareError, match=r"unknown arm 'mixup'.*the arms are plain, tuned, fast"):
        tiny(["mixup"])


@pytest.mark.parametrize(
    ("epochs", "batches", "steps", "every"),
    [(1, 900, 900, 90), (0.3, 900, 270, 27), (2, 10, 20, 1), (0.01, 10, 1, 1), (1, 115, 110, 11)],
)
def test_a_run_is_looked_at_ten_times_and_at_its_end(epochs, batches, steps, every):
    pace = TASKS["text"].pace(epochs, batches)
    assert (pace["max_steps"], pace["val_check_interval"]) == (steps, every)
    assert steps % every == 0
    assert TASKS["images"].pace(3, batches) == {"max_epochs": 3}


@pytest.mark.parametrize(("epochs", "samples"), [(1, 80), (2, 80), (3, 72)])
def test_looks_go_on_over_several_epochs(epochs, samples):
    result = tiny(["plain"], seeds=1, epochs=epochs, samples=samples)
    batches = samples // 8
    assert [point.samples for point in result.runs[0].points][-1] == epochs * batches * 8 * 128
    assert len(result.runs[0].points) >= 9


def test_a_comparison_from_end_to_end(tmp_path):
    result = tiny(["fast", "lengths"], seeds=2, out=tmp_path)
    assert {(run.arm, run.seed, run.complete) for run in result.runs} == {
        (arm, seed, True) for arm in ("plain", "fast", "lengths") for seed in (0, 1)
    }
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document == json.loads(result.to_json())
    assert document["metric"] == "test_loss"
    asked = document["settings"]
    assert (asked["task"], asked["model"], asked["context"], asked["epochs"]) == ("text", "transformer", 128, 1)
    assert (asked["lr"], asked["batch_size"], asked["samples"]) == (0.001, 8, 80)
    assert asked["bytes"] == library_text(10, 10).size
    assert "standard library of Python" in asked["data"]
    assert "image" not in asked
    ends = [run.points[-1].test_loss for run in result.complete("plain")]
    assert result.target_of("fast") == max(ends)
    assert [run.points[-1].samples for run in result.complete("plain")] == [80 * 128] * 2
    assert all(run.points[-1].samples < 80 * 128 for run in result.complete("lengths"))  # cut ones count as they are
    fast = result.complete("fast")[0].points[-1]
    assert 0 < fast.samples <= 3 * 8 * 128
    assert result.table().row_count == 3
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_own_windows_are_taken_as_they_are():
    tokens = torch.arange(330).view(11, 30) % 7
    result = compare(
        TextData("sevens", tokens, (tokens + 1) % 7, tokens, (tokens + 1) % 7, size=330),
        ["plain"],
        progress=False,
        **(TINY | {"samples": None, "test_samples": None, "epochs": 30, "lr": 0.01, "seeds": 1}),
    )
    assert (result.settings["data"], result.settings["context"], result.settings["samples"]) == ("sevens", 30, 11)
    assert result.runs[0].points[-1].accuracy > 0.4  # of seven


def test_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(monkeypatch):
    seen = {}

    class Spy(Callback):
        def __init__(self, name):
            self.name = name

        def on_train_start(self, trainer, module):
            if trainer.limit_train_batches == 1.0:
                seen[self.name, "start"] = [value.clone() for value in module.model.state_dict().values()]
                seen[self.name, "batches"] = []

        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.limit_train_batches == 1.0:
                seen[self.name, "batches"].append(batch[0].clone())

    for name in ("one", "two"):
        monkeypatch.setitem(TEXT_ARMS, name, Arm(name, "notes", lambda at, name=name: Ingredients([Spy(name)])))
    result = tiny(["one", "two"], seeds=1)
    for what in ("start", "batches"):
        assert all(map(torch.equal, seen["one", what], seen["two", what]))
    assert len(seen["one", "batches"]) == 10
    ends = {run.arm: run.points[-1].test_loss for run in result.runs}
    assert ends["one"] == ends["two"] == ends["plain"]


@pytest.mark.slow
def test_every_arm_trains():
    result = tiny(list(TEXT_ARMS), seeds=1, samples=160)
    assert {run.arm for run in result.runs if run.complete} == set(TEXT_ARMS)
    assert result.table().row_count == len(TEXT_ARMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "photos"}, "`data` is for images; the task text has a text of its own"),
        ({"width": 6}, "`width` of the transformer must be a multiple of its 4 heads, got 6"),
        ({"batch_size": 100}, "`batch_size` 100 is more than the 80 training windows"),
        ({"model": "resnet18"}, "`model` is for images, not for text"),
        ({"weights": "w.pt"}, "`weights` is for images"),
        ({"image_size": 32}, "`image_size` is for images"),
        ({"pretrain_epochs": 2}, "`pretrain_epochs` is for images"),
        ({"target": 101.0}, r"`target` to be a number in \(0, 100\]"),
        ({"task": "sound"}, r"`task` to be 'images', 'text' or 'lines', but got 'sound'"),
    ],
)
def test_what_can_not_be_is_refused(options, message):
    with pytest.raises(CompareError, match=message):
        tiny(["plain"], **options)


def test_settings_of_a_text_are_its_own_and_those_asked_for_win():
    text, images = Settings(task="text"), Settings()
    assert (text.run_epochs, text.run_batch_size, text.run_lr, text.embedded) == (1, 32, 0.001, (28800, 500))
    assert (images.run_epochs, images.run_batch_size, images.run_lr) == (8, 64, 0.02)
    asked = Settings(task="text", epochs=3, batch_size=4, lr=0.5, samples=20, test_samples=30, target=1.5, quick=True)
    assert (asked.run_epochs, asked.run_batch_size, asked.run_lr, asked.embedded) == (3, 4, 0.5, (20, 30))
    assert asked.target == 1.5
    assert Settings(task="text", quick=True).embedded == (3200, 200)


def test_the_command_knows_the_task(capsys):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert cli.main(["compare", *arguments, "--seeds=1", "--arms=plain"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "transformer on the standard library of Python" in shown
    assert "tokens, M loss tokens/s" in shown
    assert "the highest that a run of plain ended with" in shown
    assert cli.main(["compare", "--task=text", "--list-arms"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TEXT_ARMS)
