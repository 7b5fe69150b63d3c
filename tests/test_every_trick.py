"""What every trick must be able to do; the tricks are found, not listed.

A trick is a public name that is defined in a trick room. Its own test file has an ``EXAMPLE``: a function that returns what a user would add,
as ``{"callbacks": [...]}``, ``{"criterion": ...}`` or ``{"trainer": {...}}``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_speedups
from zoo import Classifier, ReplayLoader, assert_same_weights, fit_interrupted, loader, resume, trainer, weights

TESTS, PACKAGE = Path(__file__).parent, Path(lightning_speedups.__file__).parent
README, CHANGELOG = (TESTS.parent / name for name in ("README.md", "CHANGELOG.md"))
ROOMS = ("callbacks", "mixins", "strategies", "losses", "data", "defaults")


def source(trick):
    return Path(inspect.getsourcefile(trick)).relative_to(PACKAGE)


TRICKS = {
    name: trick
    for name in lightning_speedups.__all__
    if source(trick := getattr(lightning_speedups, name)).with_suffix("").parts[0] in ROOMS
}


def example(name):
    path = TESTS / source(TRICKS[name]).with_name(f"test_{source(TRICKS[name]).name}")
    spec = importlib.util.spec_from_file_location(f"example_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXAMPLE()


class Setup:
    """A module, callbacks and Trainer arguments, made from the examples of one or more tricks."""

    def __init__(self, *names):
        examples = [example(name) for name in names]
        torch.manual_seed(0)
        self.module = Classifier(next((e["criterion"] for e in examples if "criterion" in e), None))
        self.callbacks = [callback for e in examples for callback in e.get("callbacks", [])]
        self.arguments = {key: value for e in examples for key, value in e.get("trainer", {}).items()}

    def trainer(self, **arguments):
        return trainer(callbacks=list(self.callbacks), **(self.arguments | arguments))


every_trick = pytest.mark.parametrize("name", TRICKS)


def test_there_are_tricks_and_none_is_left_out():
    files = {source(trick) for trick in TRICKS.values()}
    found = {
        path.relative_to(PACKAGE)
        for room in ROOMS
        for path in (PACKAGE / room).glob("*.py")
        if path.name != "__init__.py"
    }
    assert {path for path in files if len(path.parts) > 1} == found
    assert len(TRICKS) >= 6


@every_trick
def test_it_has_a_readme_row_and_a_changelog_line(name):
    rows = [
        line for line in README.read_text().splitlines() if line.startswith("| ") and f"`{name}`" in line.split("|")[1]
    ]
    assert len(rows) == 1
    assert all(cell.strip() for cell in rows[0].split("|")[1:-1])
    assert f"`{name}`" in CHANGELOG.read_text()


@every_trick
def test_its_docstring_says_what_when_not_which_arguments_and_shows_an_example(name):
    text = inspect.getdoc(TRICKS[name])
    assert "When not to use it" in text
    assert "Example:" in text
    assert ">>> " in text
    assert "Raises:" in text
    module = inspect.getmodule(TRICKS[name]).__doc__
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", module + text), "no source"
    arguments = text.split("Args:")[1]
    for parameter in inspect.signature(TRICKS[name]).parameters:
        assert re.search(rf"^\s*\**{parameter}: ", arguments, re.M), f"`{parameter}` is not described"


@every_trick
def test_two_steps_train(name):
    setup = Setup(name)
    start = weights(setup.module)
    setup.trainer(max_steps=2).fit(setup.module, ReplayLoader())
    assert torch.isfinite(torch.tensor(setup.module.losses)).all()
    assert len(setup.module.losses) == 2
    assert not torch.equal(start["head.weight"], setup.module.head.weight)


@pytest.mark.parametrize("stop", [1, 4, 6, 8])
@every_trick
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(name, stop):
    whole, parted = Setup(name), Setup(name)
    whole.trainer().fit(whole.module, ReplayLoader())
    fit_interrupted(parted.module, ReplayLoader(), stop, parted.callbacks, **parted.arguments)
    resume(parted.module, ReplayLoader(), Setup(name).callbacks, **parted.arguments)
    assert_same_weights(weights(whole.module), weights(parted.module))


def switches(module, run):
    """Everything that a trick might leave changed."""
    loops = (run.strategy, run.fit_loop, run.fit_loop.epoch_loop, run.precision_plugin)
    return {
        "instances": [sorted(k for k, v in vars(owner).items() if callable(v)) for owner in loops],
        "classes": [vars(cls).copy() for cls in (torch.optim.Optimizer, torch.Tensor, type(run.strategy))],
        "modules": [
            (sorted(k for k, v in vars(m).items() if callable(v) or (k.endswith("hooks") and v)), m.training)
            for m in module.modules()
        ],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "autotuning": torch.backends.cudnn.benchmark,
        "matmul": torch.get_float32_matmul_precision(),
        "optimizers": [len(o._optimizer_step_post_hooks) + len(o._optimizer_step_pre_hooks) for o in run.optimizers],
        "rates": [group["lr"] for o in run.optimizers for group in o.param_groups],
    }


@pytest.mark.parametrize("failing", [False, True])
@every_trick
def test_everything_is_put_back_also_after_an_exception(name, failing):
    def run(setup):
        one = setup.trainer()
        before = {k: v for k, v in switches(setup.module, one).items() if k not in ("optimizers", "rates", "instances")}
        if failing:
            setup.module.on_train_batch_end = lambda outputs, batch, batch_idx: 1 / 0 if batch_idx == 2 else None
            with pytest.raises(ZeroDivisionError):
                one.fit(setup.module, ReplayLoader())
            del setup.module.on_train_batch_end
        else:
            one.fit(setup.module, ReplayLoader())
        after = switches(setup.module, one)
        assert {k: after[k] for k in before} == before
        return after

    with_trick, plain = run(Setup(name)), run(Setup())
    assert with_trick["instances"] == plain["instances"]
    assert set(with_trick["optimizers"]) == set(plain["optimizers"])
    assert set(with_trick["rates"]) == set(plain["rates"])


@every_trick
def test_a_second_fit_with_the_same_object_does_the_same(name):
    setup = Setup(name)
    start = weights(setup.module)
    setup.trainer().fit(setup.module, ReplayLoader())
    first = weights(setup.module)
    setup.module.load_state_dict(start)
    setup.trainer().fit(setup.module, ReplayLoader())
    assert_same_weights(first, weights(setup.module))


@every_trick
def test_it_pickles_before_and_after_a_fit(name):
    setup = Setup(name)
    things = [*setup.callbacks, setup.module.criterion, setup.arguments]
    twins = pickle.loads(pickle.dumps(things))
    assert [type(twin) for twin in twins] == [type(thing) for thing in things]
    setup.trainer().fit(setup.module, ReplayLoader())
    again, pickled = Setup(name), pickle.dumps(setup.callbacks)
    assert b"Classifier" not in pickled  # the module would come along, with all its weights
    again.callbacks = pickle.loads(pickled)
    again.trainer().fit(again.module, ReplayLoader())
    assert_same_weights(weights(setup.module), weights(again.module))


@every_trick
def test_it_leaves_validation_and_prediction_alone(name):
    setup, plain = Setup(name), Setup()
    for one in (setup, plain):
        module = one.module
        module.predict_step = lambda batch, batch_idx, module=module: module.head(module.backbone(batch[0]))
    ours, theirs = setup.trainer(precision="32-true"), plain.trainer()
    assert ours.validate(setup.module, loader(), verbose=False) == theirs.validate(
        plain.module, loader(), verbose=False
    )
    predictions = zip(ours.predict(setup.module, loader()), theirs.predict(plain.module, loader()), strict=True)
    assert all(torch.equal(one, other) for one, other in predictions)


@pytest.mark.parametrize("pair", list(itertools.combinations(TRICKS, 2)), ids=" + ".join)
def test_any_two_run_side_by_side_or_say_at_fit_start_why_not(pair):
    for names in (pair, pair[::-1]):
        setup = Setup(*names)
        start = weights(setup.module)
        try:
            setup.trainer(max_epochs=2).fit(setup.module, ReplayLoader())
        except MisconfigurationException as error:
            assert not setup.module.losses
            assert all(name in str(error) for name in names)
        else:
            assert torch.isfinite(torch.tensor(setup.module.losses)).all()
            assert len(setup.module.losses) == 8
            assert not torch.equal(start["head.weight"], setup.module.head.weight)


@functools.cache
def refused(one, other):
    setup = Setup(one, other)
    try:
        setup.trainer().fit(setup.module, ReplayLoader())
    except MisconfigurationException:
        return True
    return False


def most_with(name):
    """The trick, and as many others as go together."""
    together = [name]
    for other in TRICKS:
        if other != name and not any(refused(one, other) for one in together):
            together.append(other)
    return together


@every_trick
def test_all_that_go_together_resume_to_the_same_bits(name):
    names = most_with(name)
    assert len(names) >= 6
    whole, parted = Setup(*names), Setup(*names)
    whole.trainer().fit(whole.module, ReplayLoader())
    fit_interrupted(parted.module, ReplayLoader(), 6, parted.callbacks, **parted.arguments)
    resume(parted.module, ReplayLoader(), Setup(*names).callbacks, **parted.arguments)
    assert_same_weights(weights(whole.module), weights(parted.module))
