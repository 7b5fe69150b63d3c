"""The guide's example works as it stands, what the guide names is there, and the house is as it is drawn."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lightning_speedups

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = dict(re.findall(r"^\d\. `([^`]+)`.*?```\w+\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))
SOURCE, EXPORT, TEST, ROW, SHORT, LINE = PLACES


@pytest.fixture
def trick(monkeypatch):
    """The example's class, as if its file were there."""
    module = ModuleType(SOURCE.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(PLACES[SOURCE], SOURCE, "exec"), vars(module))
    exec(compile(PLACES[EXPORT], EXPORT, "exec"), names := {})
    monkeypatch.setattr(lightning_speedups, "GradientCentralization", names["GradientCentralization"], raising=False)
    return names["GradientCentralization"]


def test_the_examples_own_tests_pass(trick):
    exec(compile(PLACES[TEST], TEST, "exec"), names := {})
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) >= 4
    for test in tests:
        test()


def moved(callbacks):
    """What a step of plain SGD does to each of a classifier's parameters."""
    from zoo import Classifier, loader, trainer, weights

    torch.manual_seed(0)
    module = Classifier()
    before = weights(module)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    trainer(callbacks=callbacks, max_steps=1).fit(module, loader())
    parameters = dict(module.named_parameters())
    return {name: (after.detach() - before[name]).numpy() for name, after in parameters.items()}


def test_the_example_moves_weights_as_plain_sgd_does_less_the_mean_of_each_row(trick):
    plain, centralized = moved([]), moved([trick()])
    for name, expected in plain.items():
        if expected.ndim > 1:
            rows = expected.reshape(len(expected), -1)
            expected = (rows - rows.mean(1, keepdims=True)).reshape(expected.shape)
            assert not np.allclose(centralized[name], plain[name], atol=1e-5)
        np.testing.assert_allclose(centralized[name], expected, atol=1e-7)


def test_the_benchmark_measures_what_the_example_does(trick):
    path = ROOT / "benchmarks" / "gradient_centralization.py"
    spec = importlib.util.spec_from_file_location("gradient_centralization_benchmark", path)
    spec.loader.exec_module(benchmark := importlib.util.module_from_spec(spec))
    ours, theirs = moved([trick()]), moved(benchmark.ARMS["centralized"]())
    assert benchmark.ARMS["plain"]() == []
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[name], value)


def added(text, before, new):
    """A text with something put in behind a place that it has once or more."""
    assert before in text
    return text.replace(before, before + new, 1)


@pytest.mark.slow
def test_the_example_keeps_every_promise_of_a_trick_once_it_stands_in_its_places(tmp_path):
    for name in ("lightning_speedups", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "lightning_speedups_command.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (SOURCE, TEST):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(PLACES[name])
    (tmp_path / SOURCE).with_name("__init__.py").touch()
    texts = {name: (ROOT / name).read_text() for name in (EXPORT, ROW, SHORT, LINE)}
    exported = added(texts[EXPORT], "__all__ = [\n", '    "GradientCentralization",\n')
    (tmp_path / EXPORT).write_text(exported.replace("\n__version__", f"{PLACES[EXPORT]}\n__version__"))
    (tmp_path / ROW).parent.mkdir()
    (tmp_path / ROW).write_text(added(texts[ROW], "|---|---|---|---|---|---|\n", PLACES[ROW]))
    (tmp_path / SHORT).write_text(added(texts[SHORT], "|---|---|---|\n", PLACES[SHORT]))
    (tmp_path / LINE).write_text(added(texts[LINE], "### Added\n\n", PLACES[LINE]))
    files = ["tests/test_every_trick.py", "tests/test_architecture.py", TEST, SOURCE]
    chosen = "GradientCentralization or gradient_centralization or mirror"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`([\w./]+/[\w.]+\.(?:py|md|json))`", TEXT)) - {SOURCE, TEST}
    assert len(named) > 10
    package = ROOT / "lightning_speedups"
    places = (ROOT, package, package / "tricks")
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_the_house_is_as_it_is_drawn():
    drawn = re.findall(r"^(│  )?├─ (\w+)(?:/|\.py)? +(.*)|^└─ (cli)", TEXT, re.MULTILINE)
    package = ROOT / "lightning_speedups"
    rooms = {room or last: what for inner, room, what, last in drawn if not inner}
    wings = {wing: what for inner, wing, what, _ in drawn if inner}
    wings |= dict(re.findall(r"^│  └─ (\w+)/ +(.*)", TEXT, re.MULTILINE))
    for place, names in ((package, rooms), (package / "tricks", wings)):
        there = {path.stem for path in place.iterdir() if not path.name.startswith(("_", "py."))}
        assert there <= names.keys()
        assert {name for name, what in names.items() if not what.startswith("to come")} <= there
    for wing, what in wings.items():
        for trick in re.findall(r"\w+", what.partition("to come")[0]):
            assert list((package / "tricks" / wing).glob(f"{trick}*")), trick


def test_the_commands_are_those_of_the_readme():
    command = re.search(r"^pip install .*&& pytest", TEXT, re.MULTILINE)[0]
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()
