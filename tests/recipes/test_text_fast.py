"""The recipe through a real Trainer, on an ordinary language model: what it does to a run, and what it leaves."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from patches import patched
from torch.utils.data import Subset, TensorDataset

from lightning_speedups import FastStart, LRCurve, Muon, MuonCallback, SequenceLengthWarmup
from lightning_speedups.modules.parameter_roles import Role, parameter_roles
from lightning_speedups.recipes.text_fast import batch_size_for, text_fast, tokens_and_next, windows
from zoo import NotesGroups, WritesText, assert_same_weights, some_text, trainer, weights


class Notes(NotesGroups):
    """What each step sees and has."""

    def __init__(self):
        super().__init__()
        self.batches, self.ends = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(tuple(batch))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        layer = pl_module.blocks.layers[-1]
        self.ends.append([layer.self_attn.out_proj.weight.clone(), layer.linear2.weight.clone()])


def fitted(module, data=None, **options):
    stack = text_fast(some_text() if data is None else data, **({"batch_size": 8, "context": 32, "seed": 0} | options))
    notes = Notes()
    run = trainer(**stack.trainer | {"callbacks": [*stack.trainer["callbacks"], notes], "precision": "32-true"})
    run.fit(module, stack.loader)
    return run, notes


def of(stack, kind):
    return next((callback for callback in stack.trainer["callbacks"] if type(callback) is kind), None)


# ---- what a run with it is


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"optimizer": "sgd", "scheduled": True}])
def test_it_learns_with_muon_whatever_the_module_configures(options):
    module = WritesText(**options)
    run, notes = fitted(module, epochs=3)
    assert {kind for kind, _ in notes.steps} == {Muon}
    assert run.global_step == len(notes.steps) == 45
    early, late = torch.tensor(module.losses[:4]).mean(), torch.tensor(module.losses[-4:]).mean()
    assert late < 0.5 * early


@pytest.mark.parametrize("tied", [False, True])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest_on_one_line_down(tied):
    module = WritesText(tied=tied)
    _, notes = fitted(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for step, (_, groups) in enumerate(notes.steps):
        for group in groups:
            assert group["rule"] == ("muon" if group["name"] == "muon" else "adamw")
            peak = 0.02 if group["name"] == "muon" else 0.012
            assert group["lr"] == pytest.approx(peak * (1 - step / 15))
            assert group["weight_decay"] == 0
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in notes.steps[0][1]}
    assert groups["muon"] == {
        f"blocks.layers.{i}.{name}"
        for i in (0, 1)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    }
    assert groups["embeddings"] == {"embed.weight", "place"}
    assert groups.get("head", set()) == (set() if tied else {"head.weight"})


def test_a_tied_head_is_an_embedding_wherever_it_stands():
    module = WritesText(tied=True)
    assert parameter_roles(module)["embed.weight"] is Role.EMBEDDING
    module.head = torch.nn.Linear(32, 32, bias=False)
    assert parameter_roles(module)["head.weight"] is Role.HEAD


def test_branches_begin_at_zero_and_leave_it():
    module = WritesText()
    _, notes = fitted(module)
    first, last = notes.ends[0], notes.ends[-1]
    assert not any(one.any() for one in first)
    assert all(one.abs().max() > 0.01 for one in last)


def test_sequences_grow_to_their_full_length():
    _, notes = fitted(WritesText(), start=8, full_from=0.5)
    lengths = [inputs.shape[1] for inputs, _ in notes.batches]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (8, 32)
    assert 0.4 < sum(length < 32 for length in lengths) / len(lengths) < 0.6
    for inputs, targets in notes.batches:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_order_follows_the_seed_alone():
    module = WritesText()
    again, other = WritesText(), WritesText()
    again.load_state_dict(module.state_dict())
    other.load_state_dict(module.state_dict())
    for one, seed, start in ((module, 1, 10), (again, 1, 20), (other, 2, 10)):
        torch.manual_seed(start)
        fitted(one, seed=seed, epochs=0.5)
    assert_same_weights(weights(module), weights(again))
    assert not torch.equal(weights(module)["head.weight"], weights(other)["head.weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    module = WritesText(scheduled=True)
    own = set(vars(module))
    stack = text_fast(some_text(), batch_size=8, context=32, epochs=0.5, seed=0)

    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if fails and trainer.global_step == 2:
                raise RuntimeError("on purpose")

    run = trainer(**stack.trainer | {"callbacks": [*stack.trainer["callbacks"], Fails()]})
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            run.fit(module, stack.loader)
    else:
        run.fit(module, stack.loader)
    assert patched(run) == set()
    assert {name for name in set(vars(module)) - own if not name.startswith("_")} == set()


# ---- what it is made of


@pytest.mark.parametrize(
    ("epochs", "steps", "whole"), [(1, 15, 1), (0.3, 4, 1), (0.01, 1, 1), (2, 30, 2), (1.5, 22, 2)]
)
def test_a_run_is_as_long_as_that_part_of_the_text(epochs, steps, whole):
    stack = text_fast(some_text(), epochs=epochs, batch_size=8, context=32)
    assert len(stack.loader) == 15
    assert (stack.trainer["max_steps"], stack.trainer["max_epochs"]) == (steps, whole)
    run, notes = fitted(WritesText(), epochs=epochs)
    assert run.global_step == len(notes.steps) == steps


def test_options_reach_their_parts():
    stack = text_fast(some_text(), batch_size=5, context=64, start=24, full_from=0.6, lr=0.01, rest_lr=0.002, seed=9)
    assert (stack.loader.batch_size, stack.loader.drop_last, stack.loader.seed) == (5, True, 9)
    assert (of(stack, MuonCallback).lr, of(stack, MuonCallback).rest_lr) == (0.01, 0.002)
    growth = of(stack, SequenceLengthWarmup).growth
    assert (growth.length(0, 64), growth.length(0.5, 64) < 64, growth.length(0.71, 64)) == (24, True, 64)
    kinds = [type(callback) for callback in text_fast(some_text(), context=16, start=16).trainer["callbacks"]]
    assert kinds == [MuonCallback, LRCurve, FastStart]


def test_the_loss_is_torchs():
    logits, targets = torch.randn(8, 4), torch.arange(8) % 4
    assert torch.equal(text_fast(some_text()).loss(logits, targets), torch.nn.functional.cross_entropy(logits, targets))


@pytest.mark.parametrize("windows", [1, 400, 6400, 8640, 20_000, 400_000, 10**7])
def test_a_run_has_some_eight_hundred_steps_within_bounds(windows):
    size = batch_size_for(windows)
    assert 8 <= size <= 512
    if 6400 <= windows <= 400_000:
        assert 750 <= windows / size <= 850


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_longer_run_has_larger_batches(epochs):
    stack = text_fast(some_text(80_000), context=8, epochs=epochs)
    assert stack.loader.batch_size == pytest.approx(12.5 * epochs, abs=0.5)
    assert stack.trainer["max_steps"] == pytest.approx(800, rel=0.05)


# ---- data


@pytest.mark.parametrize("context", [1, 7, 32, 3999])
def test_windows_follow_each_other_and_targets_are_one_later(context):
    text = some_text()
    inputs, targets = windows(text, context)
    assert torch.equal(inputs.flatten(), text[: inputs.numel()])
    assert torch.equal(targets.flatten(), text[1 : inputs.numel() + 1])
    assert inputs.shape == targets.shape == (3999 // context, context)
    assert len(text) - 1 - inputs.numel() < context


def test_bytes_a_pair_and_a_dataset_give_the_same_batches():
    text, firsts = some_text(), []
    pair = windows(text, 32)
    for data in (text, text.to(torch.uint8), pair, [*pair], TensorDataset(*pair)):
        assert all(map(torch.equal, tokens_and_next(data, 32), pair))
        firsts.append(next(iter(text_fast(data, context=32, batch_size=6, seed=1).loader)))
        assert [(one.shape, one.dtype) for one in firsts[-1]] == 2 * [((6, 32), torch.int64)]
    assert all(torch.equal(a, b) for first in firsts for a, b in zip(first, firsts[0], strict=True))


def test_a_batch_is_no_larger_than_the_text_and_windows_keep_their_length():
    pair = windows(some_text(200), 16)
    stack = text_fast(pair, batch_size=32, start=8)
    assert [tuple(one.shape) for one in next(iter(stack.loader))] == [(12, 16), (12, 16)]
    assert len(stack.loader) == 1


PAIR = windows(some_text(400), 16)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (some_text(128), r"got Tensor of shapes \[\(128,\)\]"),
        (some_text().float(), r"\(4000,\)"),
        (PAIR[0], r"\(24, 16\)"),
        ((PAIR[0], PAIR[1][:, :8]), r"\(24, 16\), \(24, 8\)"),
        ((PAIR[0], PAIR[1][:, 0]), r"\(24,\)"),
        ((PAIR[0][:0], PAIR[1][:0]), r"\(0, 16\)"),
        ((PAIR[0],), "got tuple"),
        ({"tokens": PAIR[0]}, "got dict"),
        ("a text", "got str"),
        (Subset(TensorDataset(*PAIR), [0]), "got Subset"),
    ],
)
def test_what_is_no_text_is_refused(data, shown):
    with pytest.raises(
        ValueError, match=f"Expected `data` to be the whole numbers of a text of more than 128.*{shown}"
    ):
        text_fast(data)


@pytest.mark.parametrize(
    "options",
    [
        *({"epochs": value} for value in (0, -1, None)),
        *({"batch_size": value} for value in (0, 2.5)),
        *({"context": value} for value in (0, 1.5)),
        *({"start": value} for value in (0, 1.5)),
        *({"full_from": value} for value in (0, 1.5)),
        *({"lr": value} for value in (-1, "1")),
        {"rest_lr": -1},
        {"seed": 0.5},
    ],
)
def test_what_is_out_of_range_is_refused_by_its_name(options):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(options))}` to be"):
        text_fast(PAIR, **options)


def test_the_line_goes_down_in_equal_steps():
    _, notes = fitted(WritesText(), epochs=0.5)
    rates = [groups[0]["lr"] for _, groups in notes.steps]
    assert [a - b for a, b in itertools.pairwise(rates)] == pytest.approx([0.02 / 8] * 7)
