"""LightningCLI, of either package: every trick by its short name, every setting in a file and back, and in a CLI that never imports the package."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path

import pytest
import torch
import yaml
from found import TRICKS
from torch import nn

from lightning_speedups.attach.packages import ROOTS, Callback
from lightning_speedups.recipes import RECIPES, config_file
from zoo import loader, made_of

CALLBACKS = [name for name, trick in TRICKS.items() if inspect.isclass(trick) and issubclass(trick, Callback)]
LOSSES = [name for name, trick in TRICKS.items() if inspect.isclass(trick) and issubclass(trick, nn.Module)]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def value_of(kind):
    """A value of a type, as an argument that has no default may be given it."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[0]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return value_of(typing.get_args(kind)[0])
    return {float: 0.5, int: 8, str: "val_loss"}[kind]


def required(trick):
    """Values of the arguments that a trick must be given."""
    hints = typing.get_type_hints(trick.__init__)
    without = [one for one in inspect.signature(trick).parameters.values() if one.default is one.empty]
    return {one.name: value_of(hints[one.name]) for one in without if one.kind is not one.VAR_KEYWORD}


@pytest.fixture(params=ROOTS)
def package(request, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])  # `args` beside arguments of the tests' own are warned of
    return request.param


@pytest.fixture
def command(package):
    """A user's LightningCLI, as a function of its arguments."""
    L = importlib.import_module(package)

    class Net(L.LightningModule):
        def __init__(self, criterion: nn.Module | None = None, lr: float = 0.1) -> None:
            super().__init__()
            self.layers, self.criterion, self.lr = nn.Sequential(nn.Flatten(), nn.Linear(128, 4)), criterion, lr

        def training_step(self, batch, batch_idx):
            return (self.criterion or nn.functional.cross_entropy)(self.layers(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

    def call(*arguments, run=False, **options):
        options = {"trainer_defaults": QUIET, "save_config_callback": None, "seed_everything_default": False, **options}
        return importlib.import_module(f"{package}.cli").LightningCLI(
            Net, Data, args=list(arguments), run=run, **options
        )

    return call


def ours(cli):
    return [one for one in cli.trainer.callbacks if type(one).__module__.startswith("lightning_speedups.")]


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trick_is_made_by_its_short_name_and_its_file_makes_it_again(name, command):
    given = required(TRICKS[name])
    expected = made_of([TRICKS[name](**given)])
    named = command(
        f"--trainer.callbacks={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in given.items())
    )
    assert made_of(ours(named)) == expected
    written = named.parser.dump(named.config)  # with all defaults
    assert f"class_path: lightning_speedups.{name}\n" in written
    Path("written.yaml").write_text(written)
    assert made_of(ours(command("--config", "written.yaml"))) == expected


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_an_argument_of_a_users_module(name, command):
    cli = command(f"--model.criterion={name}", "--model.criterion.smoothing=0.25")
    assert made_of(cli.model.criterion) == made_of(TRICKS[name](0.25))


def test_tricks_are_added_one_by_one_and_the_saved_file_trains_the_same_again(command, package):
    tricks = [*("--trainer.callbacks+=LRCurve", "--trainer.callbacks.warmup=10%"), "--trainer.callbacks+=ExactResume"]
    logger = f"--trainer.logger={package}.loggers.CSVLogger"
    saving = {"save_config_callback": importlib.import_module(f"{package}.cli").SaveConfigCallback, "run": True}
    first = command("fit", "--trainer.max_epochs=2", *tricks, logger, "--trainer.logger.save_dir=logs", **saving)
    assert [type(one).__name__ for one in ours(first)] == ["LRCurve", "ExactResume"]
    assert first.trainer.global_step == 8
    saved = Path(first.trainer.log_dir, "config.yaml")
    again = command("fit", "--config", str(saved), **saving)
    assert made_of(ours(again)) == made_of(ours(first))
    assert again.trainer.global_step == 8


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_file_goes_before_a_users_own(name, command):
    own = {"class_path": "StopAtTarget", "init_args": required(TRICKS["StopAtTarget"])}
    Path("own.yaml").write_text(yaml.dump({"trainer": {"max_epochs": 3, "callbacks+": [own]}}))
    cli = command("--config", str(config_file(name)), "--config", "own.yaml")
    listed = yaml.safe_load(config_file(name).read_text())["trainer"]["callbacks"]
    names = [one["class_path"].removeprefix("lightning_speedups.") for one in listed]
    assert [type(one).__name__ for one in ours(cli)] == [*names, "StopAtTarget"]
    assert cli.trainer.max_epochs == 3


@pytest.mark.slow
def test_a_script_that_never_imports_the_package_takes_its_full_names():
    package = "pytorch_lightning"
    Path("train.py").write_text(
        textwrap.dedent(f"""
        from {package}.cli import LightningCLI
        from {package}.demos.boring_classes import BoringDataModule, BoringModel

        if __name__ == "__main__":
            cli = LightningCLI(BoringModel, BoringDataModule)
            print(*(type(one).__name__ for one in cli.trainer.callbacks if "speedups" in type(one).__module__))
        """)
    )
    tricks = [
        "--trainer.callbacks+=lightning_speedups.WarmupLRScaler",
        "--trainer.callbacks+=lightning_speedups.ExactResume",
    ]
    quiet = ["--trainer.max_steps=2", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    run = [sys.executable, "train.py", "fit", *tricks, *quiet, "--trainer.accelerator=cpu"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "WarmupLRScaler ExactResume"
