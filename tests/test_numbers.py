"""numpy's and torch's numbers are taken wherever Python's are, and none of them is kept or comes into a checkpoint.

Tricks and arguments are found, not listed: what a constructor takes as Python's number it must take as any other kind.
"""

from __future__ import annotations

import functools
import inspect
import json
import pickle
from dataclasses import is_dataclass

import numpy as np
import pytest
import torch
from found import TRICKS
from lightning.pytorch.callbacks import Callback
from test_every_trick import Setup, maker_of
from torch.utils.data import DataLoader

from lightning_speedups import LRRangeTest, Plateau, TransferClassifier, trainer_defaults
from lightning_speedups.core.arguments import check_number, plain
from lightning_speedups.core.durations import Duration
from lightning_speedups.measure import Settings
from zoo import ReplayLoader, assert_same_weights, loader, trainer, weights

INTS = {"int64": np.int64, "int32": np.int32, "array": np.array, "tensor": torch.tensor}
FLOATS = {"float64": np.float64, "float32": np.float32, "array": np.array, "tensor": torch.tensor}
KINDS = list(zip(INTS.values(), FLOATS.values(), strict=True))
kinds = pytest.mark.parametrize(("int_", "float_"), KINDS, ids=[*INTS])
CANDIDATES = (1, 2, 3, 0, 0.5, 1.0, 0.25, 0.0, 12)  # values that some argument or other takes


def other_kind(value, int_, float_):
    """The same value with numbers of another kind, within containers too."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return (int_ if isinstance(value, int) else float_)(value)
    if type(value) in (list, tuple):
        return type(value)(other_kind(one, int_, float_) for one in value)
    if type(value) is dict:
        keys = {key: other_kind(key, np.int64, np.float64) for key in value}  # arrays and tensors are no keys
        return {keys[key]: other_kind(one, int_, float_) for key, one in value.items()}
    return value


def foreign(value, seen=None):
    """Numbers of other kinds in an object, however deep."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from foreign(key, seen)
            yield from foreign(one, seen)
    elif isinstance(value, (list, tuple, set)):
        for one in value:
            yield from foreign(one, seen)
    elif isinstance(value, functools.partial):
        yield from foreign([value.args, value.keywords], seen)
    elif is_dataclass(value) or type(value).__module__.startswith("lightning_speedups"):
        yield from foreign(vars(value), seen)


def arguments_of(name):
    """What a trick's example hands to it."""
    trick, seen, made = TRICKS[name], [], []
    if inspect.isfunction(trick):
        return {"max_epochs": 3, "devices": 1, "gradient_clip_val": 0.5, "accelerator": "cpu"}
    init = trick.__init__
    with pytest.MonkeyPatch.context() as patch:

        def noted(self, *args, **kwargs):
            if type(self) is trick and id(self) not in made:
                made.append(id(self))
                bound = inspect.signature(init).bind(self, *args, **kwargs)
                seen.append({key: value for key, value in bound.arguments.items() if key != "self"})
            init(self, *args, **kwargs)

        patch.setattr(trick, "__init__", noted)
        maker_of(name)()
    (first, *_) = seen or [{}]
    for parameter in inspect.signature(init).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            first |= first.pop(parameter.name, {})
        if parameter.kind is parameter.VAR_POSITIONAL:
            first.pop(parameter.name, None)
    return first


def numeric(name):
    """The arguments that may be numbers, by their annotations."""
    for parameter in inspect.signature(TRICKS[name]).parameters.values():
        if "int" in str(parameter.annotation) or "float" in str(parameter.annotation):
            yield parameter.name


def made(name, arguments):
    """What the trick makes of arguments; None where it refuses them."""
    try:
        return TRICKS[name](**arguments)
    except (ValueError, TypeError):
        return None


@kinds
@pytest.mark.parametrize("name", TRICKS)
def test_every_argument_that_takes_a_number_takes_all_kinds_and_keeps_pythons(name, int_, float_):
    example, taken = arguments_of(name), 0
    for argument in numeric(name):
        for value in CANDIDATES:
            if made(name, example | {argument: value}) is None:
                continue
            given = example | {argument: other_kind(value, int_, float_)}
            trick = TRICKS[name](**given)  # raises where this kind is not taken
            assert not list(foreign(trick)), f"{argument} is kept as {list(foreign(trick))}"
            taken += 1
    assert taken or name in ("InMemoryLoader", "trainer_defaults") or not list(numeric(name))


@kinds
@pytest.mark.parametrize("name", [name for name, trick in TRICKS.items() if isinstance(trick, type)])
def test_a_run_with_them_writes_a_checkpoint_that_is_read_as_data(name, int_, float_):
    setup, trick = Setup(name), TRICKS[name]
    given = other_kind(arguments_of(name), int_, float_)
    if issubclass(trick, Callback):
        setup.callbacks = [trick(**given) if type(one) is trick else one for one in setup.callbacks]
    elif type(setup.module.criterion) is trick:
        setup.module.criterion = trick(**given)
    run = setup.trainer(max_steps=6)
    run.fit(setup.module, ReplayLoader())
    run.save_checkpoint("at.ckpt")
    saved = torch.load("at.ckpt", weights_only=True)
    assert not list(foreign(saved["callbacks"]))
    pickle.dumps(setup.callbacks)


@kinds
def test_functions_settings_and_modules_take_them_too(int_, float_):
    settings = trainer_defaults(accelerator="cpu", devices=int_(1), max_epochs=int_(3), gradient_clip_val=float_(0.5))
    assert [(type(settings[key])) for key in ("devices", "max_epochs", "gradient_clip_val")] == [int, int, float]
    asked = Settings(epochs=int_(3), lr=float_(0.5), seeds=int_(2))
    assert (asked.epochs, asked.lr, asked.run_seeds) == (3, 0.5, range(2))
    json.dumps(vars(asked))
    assert not list(foreign(vars(Plateau("x", patience=int_(2), min_delta=float_(0.5)))))
    assert not list(foreign(vars(LRRangeTest(min_lr=float_(0.25), steps=int_(20)).sweep)))
    assert Duration.parse("warmup", int_(3)) == Duration(3, "steps")
    assert Duration.parse("warmup", float_(0.5)) == Duration(0.5, "fraction")
    assert type(Duration.parse("warmup", float_(0.5)).amount) is float
    module = TransferClassifier(
        "test_resnet", int_(3), weights=None, lr=float_(0.5), in_chans=int_(3), smoothing=float_(0.25)
    )
    run = trainer(max_epochs=1)
    run.strategy.connect(module)
    run.save_checkpoint("at.ckpt")
    assert not list(foreign(torch.load("at.ckpt", weights_only=True)["hyper_parameters"]))
    assert TransferClassifier.load_from_checkpoint("at.ckpt", weights_only=True).hparams["num_classes"] == 3


@pytest.mark.parametrize(
    "value", [True, np.True_, np.array(True), torch.tensor(True), np.array([1]), torch.ones(1), "1"]
)
def test_what_is_no_single_number_is_none_in_any_kind(value):
    for whole in (True, False):
        with pytest.raises(ValueError, match="Expected `n` to be a"):
            check_number("n", value, whole=whole)


@kinds
def test_a_number_out_of_range_is_refused_as_it_was_given(int_, float_):
    for value, whole in ((int_(7), True), (float_(7.5), False), (float_(1.0), True), (float_(float("nan")), False)):
        with pytest.raises(ValueError, match=r"in \[0, 5\], but got "):
            check_number("n", value, 0, 5, whole=whole)


def test_what_is_no_such_number_is_the_very_same_object_and_what_came_in_is_left_alone():
    for value in (torch.ones(2), np.ones(2), object(), print, {1}, "1", None):
        assert plain(value) is value
        assert plain([value, (value,), {1: value}])[2][1] is value
    given = {"rates": [np.float64(0.5)]}
    assert plain(given) == {"rates": [0.5]}
    assert type(given["rates"][0]) is np.float64


@pytest.mark.parametrize("name", ["SubsetTraining", "FeatureCache"])
def test_a_sampler_may_give_numpys_numbers(name):
    order = np.random.default_rng(0).permutation(32)
    ends = []
    for samples in (order.tolist(), order, torch.from_numpy(order)):
        setup = Setup(name)
        data = DataLoader(loader().dataset, batch_size=8, sampler=[*samples])
        setup.trainer(max_epochs=3).fit(setup.module, data)
        ends.append(weights(setup.module))
    assert_same_weights(ends[0], ends[1])
    assert_same_weights(ends[0], ends[2])
