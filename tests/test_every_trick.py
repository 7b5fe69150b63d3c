"""What every trick must be able to do; the tricks are found, not listed.

A trick is a public name that is defined in the tricks' room. Its own test file has an ``EXAMPLE``: a function that returns what a user would add,
as ``{"callbacks": [...]}``, ``{"criterion": ...}`` or ``{"trainer": {...}}``. A ``"module"`` in it makes the LightningModule that is used instead
of `Classifier`, with the same argument and attributes.

Most tricks put everything back after a run. Those whose changes to the module stay (`LastingTrick`) are asked another contract in its place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import pickle
import random
import re
from collections import Counter

import pytest
import torch
from found import PACKAGE, ROOM, TESTS, TRICKS, own_tests, source
from patches import patched
from torch import nn

from lightning_speedups import MuonCallback
from lightning_speedups.attach.lasting import LastingTrick
from lightning_speedups.attach.packages import MisconfigurationException, package_of
from lightning_speedups.attach.steps import OptimizerTrick
from zoo import (
    LIGHTNING,
    Callback,
    Classifier,
    Interrupted,
    LightningModule,
    ReplayLoader,
    Wrapper,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    trainer,
    weights,
)

README, DOCS, CHANGELOG = (TESTS.parent / name for name in ("README.md", "docs/tricks.md", "CHANGELOG.md"))


class Smooth(LastingTrick):
    """A trick whose changes stay, as small as they come: a SiLU in the place of each ReLU."""

    def change(self, pl_module):
        found = {name: part for name, part in pl_module.named_modules() if isinstance(part, nn.ReLU)}
        for name in found:
            pl_module.set_submodule(name, nn.SiLU())
        return dict.fromkeys(found, "ReLU → SiLU")

    def is_changed(self, pl_module):
        return any(isinstance(part, nn.SiLU) for part in pl_module.modules())


OWN_EXAMPLES = {"Smooth": lambda: {"callbacks": [Smooth()]}}


def maker_of(name):
    """The function that makes a trick's example."""
    return OWN_EXAMPLES[name] if name in OWN_EXAMPLES else own_tests(name).EXAMPLE


class Setup:
    """A module, callbacks and Trainer arguments, made from the examples of one or more tricks."""

    def __init__(self, *names):
        examples = [maker_of(name)() for name in names]
        torch.manual_seed(0)
        make = next((e["module"] for e in examples if "module" in e), Classifier)
        self.module = make(next((e["criterion"] for e in examples if "criterion" in e), None))
        self.callbacks = [callback for e in examples for callback in e.get("callbacks", [])]
        self.arguments = {key: value for e in examples for key, value in e.get("trainer", {}).items()}

    def trainer(self, *more, **arguments):
        return trainer(callbacks=[*self.callbacks, *more], **(self.arguments | arguments))


EVERY = TRICKS | {"Smooth": Smooth}
LASTING = [name for name, trick in EVERY.items() if getattr(trick, "stays", False)]
public_trick = pytest.mark.parametrize("name", TRICKS)
every_trick = pytest.mark.parametrize("name", EVERY)
passing_trick = pytest.mark.parametrize("name", [name for name in EVERY if name not in LASTING])
lasting_trick = pytest.mark.parametrize("name", LASTING)


def test_there_are_tricks_and_none_is_left_out():
    files = {source(trick) for trick in TRICKS.values()}
    found = {path.relative_to(PACKAGE) for path in (PACKAGE / ROOM).rglob("*.py")}
    others = {path for path in found if path.name in ("__init__.py", "base.py")}
    parts = {path for path in found - others if path.parent.name in {file.stem for file in files}}  # of a larger trick
    assert files == found - others - (parts - files)
    assert len(TRICKS) >= 6


@public_trick
def test_it_has_a_row_in_both_tables_and_a_changelog_line(name):
    for page, columns in ((README, 3), (DOCS, 6)):
        lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
        rows = [line for line in lines if f"`{name}`" in line.split("|")[1]]
        assert len(rows) == 1, f"{page.name} has {len(rows)} rows"
        cells = rows[0].split("|")[1:-1]
        assert len(cells) == columns
        assert all(map(str.strip, cells))
    assert f"`{name}`" in CHANGELOG.read_text()


@public_trick
def test_its_docstring_says_what_when_not_which_arguments_and_shows_an_example(name):
    text = inspect.getdoc(TRICKS[name])
    assert "When not to use it" in text
    assert "Example:" in text
    assert ">>> " in text
    assert "Raises:" in text
    module = inspect.getmodule(TRICKS[name]).__doc__
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", module + text), "no source"
    _, _, arguments = text.partition("Args:")
    for parameter in inspect.signature(TRICKS[name]).parameters:
        assert re.search(rf"^\s*\**{parameter}: ", arguments, re.M), f"`{parameter}` is not described"


@every_trick
def test_two_steps_train(name):
    setup = Setup(name)
    start = weights(setup.module)
    run = setup.trainer(max_steps=2)
    run.fit(setup.module, ReplayLoader())
    assert package_of(run) == package_of(setup.module) == LIGHTNING.__name__
    assert torch.isfinite(torch.tensor(setup.module.losses)).all()
    assert len(setup.module.losses) == 2
    assert not torch.equal(start["head.weight"], setup.module.head.weight)


class WithoutRate(torch.optim.Optimizer):
    """Has no learning rate, or None in its place."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.sub_(parameter.grad.sign(), alpha=0.01)
        return loss


def change_optimizer(module, change):
    """Let a module configure what becomes of its optimizer."""
    own = module.configure_optimizers
    module.configure_optimizers = lambda: change(own())


@every_trick
def test_an_optimizer_that_runs_none_of_torchs_hooks_trains_to_the_same_bits(name):
    plain, wrapped = Setup(name), Setup(name)
    plain.trainer().fit(plain.module, ReplayLoader())
    change_optimizer(wrapped.module, Wrapper)
    wrapped.trainer().fit(wrapped.module, ReplayLoader())
    assert_same_weights(weights(plain.module), weights(wrapped.module))


@every_trick
def test_one_tensor_as_the_rate_of_all_groups_trains_as_numbers_do(name):
    def share(optimizer):
        rate = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return optimizer

    plain, shared = Setup(name), Setup(name)
    plain.trainer().fit(plain.module, ReplayLoader())
    change_optimizer(shared.module, share)
    run = shared.trainer()
    run.fit(shared.module, ReplayLoader())
    for key, value in weights(plain.module).items():
        torch.testing.assert_close(weights(shared.module)[key], value, rtol=1e-4, atol=1e-6)
    (rate,) = {group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups}
    assert rate.item() == plain.module.lr


@pytest.mark.parametrize("without", [{}, {"lr": None}])
@every_trick
def test_an_optimizer_without_a_rate_trains_or_is_refused_at_the_start(name, without):
    setup = Setup(name)
    change_optimizer(setup.module, lambda _: WithoutRate(setup.module.parameters(), **without))
    sets_rates = [one for one in setup.callbacks if isinstance(one, OptimizerTrick) and "lr" in one.keys]
    sets_rates += [one for one in setup.callbacks if isinstance(one, MuonCallback)]  # which replaces few optimizers
    with pytest.raises(MisconfigurationException, match="`lr`") if sets_rates else contextlib.nullcontext():
        setup.trainer().fit(setup.module, ReplayLoader())
    assert bool(setup.module.losses) != bool(sets_rates)


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


def of_no_run(found, names):
    """Those of the switches that no fit may change, of Lightning's or with these tricks."""
    runs_own = {"instances", "optimizers", "rates"}
    modules_own = {"modules", "requires_grad"} if set(names) & set(LASTING) else set()
    return {key: value for key, value in found.items() if key not in runs_own | modules_own}


@pytest.mark.parametrize("failing", [False, True])
@every_trick
def test_everything_is_put_back_also_after_an_exception(name, failing):
    def run(setup):
        one = setup.trainer()
        before = of_no_run(switches(setup.module, one), [name])
        if failing:
            setup.module.on_train_batch_end = lambda outputs, batch, batch_idx: 1 / 0 if batch_idx == 2 else None
            with pytest.raises(ZeroDivisionError):
                one.fit(setup.module, ReplayLoader())
            del setup.module.on_train_batch_end
        else:
            one.fit(setup.module, ReplayLoader())
        after = switches(setup.module, one)
        assert of_no_run(after, [name]) == before
        assert patched(one) == set()
        return after

    with_trick, plain = run(Setup(name)), run(Setup())
    assert with_trick["instances"] == plain["instances"]
    assert set(with_trick["optimizers"]) == set(plain["optimizers"])
    assert set(with_trick["rates"]) == set(plain["rates"])


@every_trick
def test_a_second_fit_with_the_same_object_does_the_same(name):
    setup = Setup(name)
    setup.trainer().validate(setup.module, loader(), verbose=False)  # a change that stays is made here
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


def predicting(setup):
    """The module of a setup, which can test and predict."""
    module = setup.module
    module.test_step = module.validation_step
    module.predict_step = lambda batch, batch_idx: module.head(module.backbone(batch[0]))
    return module


@passing_trick
def test_it_leaves_validation_and_prediction_alone(name):
    setup, plain = Setup(name), Setup()
    ours, theirs = setup.trainer(precision="32-true"), plain.trainer()
    one, other = predicting(setup), predicting(plain)
    assert ours.validate(one, loader(), verbose=False) == theirs.validate(other, loader(), verbose=False)
    predictions = zip(ours.predict(one, loader()), theirs.predict(other, loader()), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in predictions)


# ---- changes that stay


def described(module):
    """What a module is made of."""
    parts = [(name, type(part)) for name, part in module.named_modules()]
    return parts, {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}


@lasting_trick
def test_a_change_that_stays_is_made_once_and_kept(name):
    setup, plain = Setup(name), Setup(name)
    setup.trainer().fit(setup.module, ReplayLoader())
    plain.callbacks = []
    plain.trainer().fit(plain.module, ReplayLoader())
    made, after = described(setup.module), weights(setup.module)
    assert made != described(plain.module) or any(
        not torch.equal(value, after[key]) for key, value in weights(plain.module).items()
    )
    for again in (setup, Setup(name)):
        again.trainer().validate(setup.module, loader(), verbose=False)
        assert described(setup.module) == made
        assert_same_weights(weights(setup.module), after)
    setup.trainer().fit(setup.module, ReplayLoader())
    assert described(setup.module) == made


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@lasting_trick
def test_a_change_that_stays_is_made_in_every_stage_and_said(name, stage, caplog):
    fitted, setup = Setup(name), Setup(name)
    fitted.trainer(max_steps=1).fit(fitted.module, ReplayLoader())
    module = predicting(setup)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        getattr(setup.trainer(max_steps=1), stage)(module, loader())
    assert described(module) == described(fitted.module)
    assert name in caplog.text


@lasting_trick
def test_weights_after_a_change_that_stays_load_where_the_same_was_made(name):
    setup, fresh = Setup(name), Setup(name)
    setup.trainer().fit(setup.module, ReplayLoader())
    torch.save(setup.module.state_dict(), "weights.pt")
    fresh.trainer().validate(fresh.module, loader(), verbose=False)
    fresh.module.load_state_dict(torch.load("weights.pt", weights_only=True))
    one, other = (torch.cat(one.trainer().predict(predicting(one), loader())) for one in (setup, fresh))
    assert torch.equal(one, other)


class Empty(LightningModule):
    """There is nothing in it that could be changed."""

    def validation_step(self, batch, batch_idx):
        pass


@lasting_trick
def test_a_change_that_stays_and_matches_nothing_is_warned_of(name):
    with pytest.warns(UserWarning, match=name):
        Setup(name).trainer().validate(Empty(), loader(), verbose=False)


# ---- several tricks


class Stops(Callback):
    """Ends a fit before its first step."""

    def on_train_batch_start(self, *_):
        raise Interrupted


@functools.cache
def refusal(*names):
    """What a fit with these tricks is refused with, before its first step; None if it is not."""
    setup = Setup(*names)
    try:
        setup.trainer(Stops()).fit(setup.module, ReplayLoader())
    except MisconfigurationException as error:
        return str(error)
    except Interrupted:
        return None
    raise AssertionError("The fit went on.")


class Looks(Callback):
    """Notes which methods are stood in for."""

    def __init__(self):
        self.found = set()

    def on_train_batch_start(self, trainer, *_):
        self.found |= patched(trainer)


@functools.cache
def kind_of(name):
    """Where a user adds the trick, and which methods it stands in for in the course of a fit."""
    setup, looks = Setup(name), Looks()
    setup.trainer(looks).fit(setup.module, ReplayLoader())
    return frozenset(maker_of(name)().keys() | looks.found)


PARTNERS = 3


@functools.cache
def chosen_pairs():
    """The pairs that are run, in this order: one of every two kinds in either order, and enough for all to have partners.

    There are as many as pairs of kinds and ``PARTNERS`` for each trick, so that their number grows with that of the tricks.
    """
    pairs = list(itertools.permutations(EVERY, 2))
    random.Random(0).shuffle(pairs)
    kinds, partners, chosen = set(), Counter(), []
    for pair in pairs:
        both = tuple(map(kind_of, pair))
        if both not in kinds or min(partners[name] for name in pair) < PARTNERS:
            kinds.add(both)
            partners.update(pair)
            chosen.append(pair)
    return chosen


class Fails(Callback):
    """Fails in the middle of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 2:
            raise Interrupted


def fit_twice_and_fail(*names):
    """Two fits and one that fails, all with the same Trainer; nothing is left of any of them."""
    setup = Setup(*names)
    module, run = setup.module, setup.trainer(Fails(4))
    before = of_no_run(switches(module, run), names)
    for number in (1, 2, 3):
        start, done = weights(module), len(module.losses)
        run.fit_loop.max_epochs = 2 * number
        if number == 3:
            with pytest.raises(Interrupted):
                run.fit(module, ReplayLoader())
        else:
            run.fit(module, ReplayLoader())
            assert 4 < len(module.losses) - done <= 8  # a trick may shorten epochs but the first and the last
        assert torch.isfinite(torch.tensor(module.losses)).all()
        assert not torch.equal(start["head.weight"], module.head.weight)
        assert patched(run) == set()
        assert of_no_run(switches(module, run), names) == before


@every_trick
def test_it_runs_beside_every_kind_of_trick_or_both_say_at_fit_start_why_not(name):
    for pair in chosen_pairs():
        if pair[0] != name:
            continue
        try:
            if refusal(*pair):
                told = [refusal(*names) for names in (pair, pair[::-1])]
                assert all(one in message for message in told for one in pair)
            else:
                fit_twice_and_fail(*pair)
        except BaseException as error:
            error.add_note(f"The pair is {pair}.")
            raise


def test_the_pairs_are_few_and_of_every_two_kinds():
    kinds = {kind_of(name) for name in EVERY}
    assert 6 <= len(kinds) < len(EVERY)
    every = {tuple(map(kind_of, pair)) for pair in itertools.permutations(EVERY, 2)}
    assert {tuple(map(kind_of, pair)) for pair in chosen_pairs()} == every
    assert len(chosen_pairs()) <= len(every) + PARTNERS * len(EVERY)
    assert set(itertools.chain(*chosen_pairs())) == set(EVERY)


CLASHES = set()


def most_with(name):
    """The trick, and as many others as go together."""
    while True:
        together = [name]
        for other in EVERY:
            if other != name and not any(frozenset((one, other)) in CLASHES for one in together):
                together.append(other)
        message = refusal(*together)
        if message is None:
            return together
        told = [one for one in together if re.search(rf"\b{one}\b", message)]
        found = {frozenset(pair) for pair in itertools.combinations(told, 2) if refusal(*pair)}
        assert found, f"{together} are refused, but no two of them: {message}"
        CLASHES.update(found)


@every_trick
def test_all_that_go_together_resume_to_the_same_bits(name):
    names = most_with(name)
    assert len(names) >= 6
    whole, parted = Setup(*names), Setup(*names)
    whole.trainer().fit(whole.module, ReplayLoader())
    fit_interrupted(parted.module, ReplayLoader(), 6, parted.callbacks, **parted.arguments)
    resume(parted.module, ReplayLoader(), Setup(*names).callbacks, **parted.arguments)
    assert_same_weights(weights(whole.module), weights(parted.module))
