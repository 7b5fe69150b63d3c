"""Packed rows hold each sequence once, in few rows, and a model that keeps them apart learns from them the same."""

import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_speedups import block_mask, pack
from lightning_speedups.core.packing import first_fit_decreasing, with_other_neighbours


def fewest_rows(lengths, size):
    """By trying all ways to put each sequence into a row so far or a new one."""

    def tried(left, rooms):
        if not left:
            return len(rooms)
        first, *rest = left
        ways = [[*rooms, size - first]]
        ways += [[*rooms[:i], room - first, *rooms[i + 1 :]] for i, room in enumerate(rooms) if room >= first]
        return min(tried(rest, way) for way in ways)

    return tried(lengths, [])


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_each_sequence_is_in_one_row_and_no_row_is_too_long(lengths, size):
    rows = first_fit_decreasing(lengths, size)
    assert sorted(number for row in rows for number in row) == [*range(len(lengths))]
    assert all(row for row in rows)
    used = [sum(lengths[number] for number in row) for row in rows]
    assert all(length <= size for length in used)
    for row, later in ((one, other) for one in range(len(rows)) for other in range(one + 1, len(rows))):
        assert used[row] + min(lengths[number] for number in rows[later]) > size


@given(st.lists(st.integers(1, 10), max_size=7))
def test_rows_are_nearly_as_few_as_can_be(lengths):
    assert len(first_fit_decreasing(lengths, 10)) <= 11 / 9 * fewest_rows(lengths, 10) + 6 / 9


def test_known_cases_and_what_does_not_fit():
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    worst = [51] * 6 + [27] * 6 + [26] * 6 + [23] * 12  # 9 rows would do (Johnson, 1973)
    assert len(first_fit_decreasing(worst, 100)) == 11
    for lengths in ([3, 11], [0]):
        with pytest.raises(ValueError, match=rf"sequences of 1 to 10 tokens, but got one of {lengths[-1]}\. Cut it"):
            first_fit_decreasing(lengths, 10)


def texts(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 17, (count,), generator=generator).tolist()
    return [torch.randint(1, 30, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("shift", [True, False])
def test_a_batch_holds_every_sequence_with_its_labels_positions_and_borders(shift):
    samples = [{"input_ids": one.tolist(), "labels": one + 100, "kind": one % 2} for one in texts()]
    collate = pickle.loads(pickle.dumps(pack(20, pad=7, shift=shift, varlen=True)))
    batch, found = collate(samples), []
    flat = {name: part.flatten() for name, part in batch.items() if name not in ("cu_seqlens", "max_seqlen")}
    assert {len(part) for part in flat.values()} == {20 * len(batch["input_ids"])}
    assert len(batch["input_ids"]) < len(samples)
    borders = batch["cu_seqlens"].tolist()
    assert batch["cu_seqlens"].dtype == torch.int32
    assert (borders[0], borders[-1]) == (0, len(flat["labels"]))
    for begin, end in pairwise(borders):
        part = {name: one[begin:end].tolist() for name, one in flat.items()}
        assert begin // 20 == (end - 1) // 20
        assert len({*part["segment_ids"]}) == 1
        if part["segment_ids"][0] == 0:
            assert {*part["input_ids"]} == {7}
            assert {*part["labels"]} == {-100}
            assert end % 20 == 0
        else:
            assert part["position_ids"] == [*range(end - begin)]
            labels = [one + 100 for one in part["input_ids"]]
            assert part["labels"] == ([-100, *labels[1:]] if shift else labels)
            assert part["kind"] == [one % 2 for one in part["input_ids"]]
            found.append(part["input_ids"])
    assert sorted(found) == sorted(one["input_ids"] for one in samples)
    assert batch["max_seqlen"] == max(end - begin for begin, end in pairwise(borders))
    without = pack(20, pad=7, shift=shift)(samples)
    assert batch.keys() - without.keys() == {"cu_seqlens", "max_seqlen"}
    assert all(torch.equal(part, batch[name]) for name, part in without.items())


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_is_true_within_a_sequence_only(causal):
    segments = pack(20)(texts())["segment_ids"]
    mask = block_mask(segments, causal)
    assert mask.shape == (len(segments), 1, 20, 20)
    for row, ids in enumerate(segments.tolist()):
        for i in range(20):
            assert mask[row, 0, i].tolist() == [ids[i] == ids[j] and (j <= i or not causal) for j in range(20)]


class Transformer(nn.Module):
    """Two layers with learned positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(30, 16), nn.Embedding(20, 16), nn.Linear(16, 30)
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16)}) for _ in "12")

    def forward(self, tokens, positions, mask=None):
        hidden = self.tokens(tokens) + self.positions(positions)
        for layer in self.layers:
            q, k, v = layer["qkv"](F.layer_norm(hidden, (16,))).unflatten(-1, (3, 2, 8)).movedim((2, 3), (0, 2))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            hidden = hidden + layer["out"](mixed.transpose(1, 2).flatten(2))
        return self.head(hidden)


@pytest.mark.parametrize("shift", [True, False])
def test_loss_and_gradients_are_those_of_the_sequences_one_by_one(shift):
    torch.manual_seed(0)
    model, sequences = Transformer(), texts(20)
    batch = pack(20, shift=shift)(sequences)
    logits = model(batch["input_ids"], batch["position_ids"], block_mask(batch["segment_ids"]))
    labels = batch["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(loss, [*model.parameters()])

    total, count = 0, 0
    for one in sequences:
        scores = model(one[None], torch.arange(len(one))[None])[0]
        scores, targets = (scores[:-1], one[1:]) if shift else (scores, one)
        total, count = total + F.cross_entropy(scores, targets, reduction="sum"), count + len(targets)
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(total / count, [*model.parameters()]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_not_one_value_a_token_is_refused():
    with pytest.raises(
        ValueError, match=r"`image` of a sample to have one value .* \(2, 4\) beside tokens \(2,\)\. Le"
    ):
        pack(8)([{"input_ids": [1, 2], "image": torch.rand(2, 4)}])
    with pytest.raises(ValueError, match="Expected `max_length` to be a whole number of 1 or more"):
        pack(0)


def test_other_neighbours_leave_one_sequence_and_give_all_others_new_tokens():
    batch = pack(20)(texts())
    one, *others = with_other_neighbours(batch)
    assert torch.equal(one["input_ids"], batch["input_ids"])
    (row,) = (one["labels"] != -100).any(1).nonzero().flatten().tolist()
    own = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    own[row] = batch["segment_ids"][row] == batch["segment_ids"][row].max()
    assert torch.equal(one["labels"] != -100, own & (batch["labels"] != -100))
    assert len(others) == 3
    for other in others:
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(one["input_ids"] == other["input_ids"], own)
        assert other["input_ids"].max() < 30
    assert with_other_neighbours(pack(4)([[1, 2, 3], [4, 5, 6]])) == []
    assert with_other_neighbours(pack(2)([[1], [2]])) == []  # without labels
