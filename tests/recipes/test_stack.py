"""Recipes by their names: what they give, and their files for LightningCLI."""

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import lightning_speedups
from lightning_speedups import InMemoryLoader, LRCurve, MuonCallback
from lightning_speedups.recipes import RECIPES, Stack, config_file, recipe
from zoo import LIGHTNING, Convolutions, Trainer, WritesText, made_of, photos, some_text, weights

ROOT = Path(lightning_speedups.__file__).parents[1]
KINDS = {
    "vision-fast": (photos, Convolutions, "net.9.weight"),
    "text-fast": (lambda: some_text(10_000), WritesText, "head.weight"),
}


@pytest.fixture(params=RECIPES)
def name(request):
    return request.param


def data(name):
    return KINDS[name][0]()


def test_a_recipe_is_what_a_trainer_and_its_fit_take(name):
    stack = recipe(name, data(name))
    assert isinstance(stack, Stack)
    assert isinstance(stack.loader, InMemoryLoader)
    assert isinstance(stack.loss, nn.Module)
    Trainer(**stack.trainer, logger=False, enable_checkpointing=False)


def test_options_are_the_recipes_own(name):
    given = recipe(name, data(name), epochs=3, seed=5)
    itself = RECIPES[name](data(name), epochs=3, seed=5)
    assert made_of(given.trainer["callbacks"]) == made_of(itself.trainer["callbacks"])
    assert given.trainer["max_epochs"] == itself.trainer["max_epochs"] == 3
    with pytest.raises(TypeError, match="epoch_count"):
        recipe(name, data(name), epoch_count=3)


def test_two_stacks_share_no_callback(name):
    one, other = (recipe(name, data(name)).trainer["callbacks"] for _ in range(2))
    assert not set(map(id, one)) & set(map(id, other))


@pytest.mark.parametrize("get", [lambda name: recipe(name, photos()), config_file])
def test_an_unknown_recipe_is_refused_by_its_name(get):
    with pytest.raises(ValueError, match=r"Expected `name` to be 'vision-fast' or 'text-fast'.*but got 'vision-fats'"):
        get("vision-fats")


def test_the_comparison_of_callbacks_sees_any_setting():
    assert made_of(LRCurve("linear")) == made_of(LRCurve("linear"))
    assert made_of(LRCurve("linear")) != made_of(LRCurve("cosine"))
    assert made_of(MuonCallback(0.1)) != made_of(MuonCallback(0.2))


# ---- as a file


@pytest.fixture
def command_line(name, monkeypatch):
    def call(*arguments):
        file = str(config_file(name))
        monkeypatch.setattr("sys.argv", ["train.py", "--config", file, "--trainer.accelerator", "cpu", *arguments])
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
        }
        cli = importlib.import_module(f"{LIGHTNING.__name__}.cli")
        return cli.LightningCLI(KINDS[name][1], run=False, seed_everything_default=False, trainer_defaults=quiet)

    return call


def of_this_package(callbacks):
    return [callback for callback in callbacks if type(callback).__module__.startswith("lightning_speedups.")]


def test_the_file_has_the_settings_of_the_function(name, command_line):
    command, stack = command_line(), recipe(name, data(name))
    assert made_of(of_this_package(command.trainer.callbacks)) == made_of(stack.trainer["callbacks"])
    assert command.trainer.max_epochs == stack.trainer["max_epochs"]
    assert command.trainer.precision == "bf16-mixed"


def test_every_callback_of_a_file_has_its_public_name(name):
    for callback in yaml.safe_load(config_file(name).read_text())["trainer"]["callbacks"]:
        package, public = callback["class_path"].split(".")
        assert package == "lightning_speedups"
        assert public in lightning_speedups.__all__


def test_a_file_trains_an_unmodified_module(name, command_line):
    command = command_line("--trainer.max_steps", "2", "--model.optimizer", "adamw")
    before = weights(command.model)
    command.trainer.fit(command.model, recipe(name, data(name)).loader)
    assert command.trainer.global_step == 2
    assert [type(one).__name__ for one in command.trainer.optimizers] == ["Muon"]
    head = KINDS[name][2]
    assert not torch.equal(weights(command.model)[head], before[head])


def test_the_files_come_with_the_package(name):
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert config_file(name).relative_to(ROOT).parts[0] in files["wheel"]["only-include"]
    assert config_file(name).relative_to(ROOT).parts[0] in files["sdist"]["include"]
