"""What training_step receives while sequences grow: their beginnings, or all of their tokens in shorter rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import SequenceLengthWarmup
from zoo import (
    Batches,
    OrderOfEpoch,
    ReplayLoader,
    Seer,
    assert_same_weights,
    endless,
    fit_interrupted,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [SequenceLengthWarmup(start=6, full_from=0.7, multiple=1, dim=2)]}  # fewer rows of the images


TOKENS = torch.randint(0, 20, (40, 33), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()


def stream():
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4)


def fit(data, *tricks, val=None, **arguments):
    module = Seer()
    trainer(callbacks=[*tricks], **{"max_epochs": 1, **arguments}).fit(module, data, val)
    return module


class Tokens(ReplayLoader):
    """The stream in an order that depends on the epoch; goes on where a checkpoint stood."""

    def __init__(self):
        DataLoader.__init__(self, TensorDataset(INPUTS, TARGETS), batch_size=4, sampler=OrderOfEpoch(40))
        self.position = 0


class LanguageModel(LightningModule):
    """Embeddings of tokens and positions, and causal attention."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 20)
        self.lengths = []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        self.lengths.append(inputs.shape[1])
        hidden = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        mask = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).triu(1)
        hidden = hidden + self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0]
        return F.cross_entropy(self.head(hidden).view(-1, 20), targets.view(-1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def test_sequences_and_their_targets_begin_short_and_grow_on_a_line():
    module = fit(stream(), SequenceLengthWarmup(start=8, full_from=0.5), max_epochs=2)  # of 20 steps
    assert [inputs.shape[1] for inputs, _ in module.seen] == [8, 8, 16, 16, 16, 24, 24, 24, 24, 32] + [32] * 10
    for batch, (inputs, targets) in enumerate(module.seen):
        begin, length = 4 * (batch % 10), inputs.shape[1]
        assert inputs.tolist() == [row[:length] for row in INPUTS[begin : begin + 4].tolist()]
        assert targets.tolist() == [row[:length] for row in TARGETS[begin : begin + 4].tolist()]


def test_parted_sequences_keep_all_tokens_and_their_order():
    module = fit(stream(), SequenceLengthWarmup(start=8, full_from=0.5, mode="reshape"))
    assert [tuple(inputs.shape) for inputs, _ in module.seen][:5] == [(16, 8), *[(8, 16)] * 4]
    for batch, (inputs, targets) in enumerate(module.seen):
        assert torch.equal(inputs.flatten(), INPUTS[4 * batch :][:4].flatten())
        assert torch.equal(targets.flatten(), TARGETS[4 * batch :][:4].flatten())
    assert {tuple(inputs.shape) for inputs, _ in module.seen[5:]} == {(4, 32)}


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
@pytest.mark.parametrize(("stop", "epoch_end"), [(3, False), (10, True), (17, False)])
def test_a_resumed_run_ends_with_the_same_bits(mode, stop, epoch_end):
    def tricks():
        return [SequenceLengthWarmup(full_from=0.8, mode=mode)]

    whole, parted = LanguageModel(), LanguageModel()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=tricks(), max_epochs=2).fit(whole, Tokens())
    fit_interrupted(parted, Tokens(), stop, tricks(), epoch_end, max_epochs=2)
    resume(parted, Tokens(), tricks(), max_epochs=2)
    assert parted.lengths == whole.lengths
    assert len(set(whole.lengths)) > 2
    assert_same_weights(weights(whole), weights(parted))


def test_a_language_model_learns_as_by_a_loop_that_cuts_by_hand():
    module, by_hand = LanguageModel(), LanguageModel()
    by_hand.load_state_dict(module.state_dict())
    trainer(callbacks=[SequenceLengthWarmup(start=16, full_from=1.0, multiple=16)], max_epochs=1).fit(module, stream())
    optimizer = by_hand.configure_optimizers()
    for batch, (inputs, targets) in enumerate(stream()):
        length = 16 if batch < 5 else 32  # halfway from 16 to 32 the nearest multiple changes
        optimizer.zero_grad()
        by_hand.training_step((inputs[:, :length].clone(), targets[:, :length].clone()), 0).backward()
        optimizer.step()
    assert module.lengths == by_hand.lengths
    assert_same_weights(weights(module), weights(by_hand))


def test_all_of_the_sequences_length_is_cut_and_nothing_else():
    batch = {
        "ids": INPUTS[:4], "more": [INPUTS[:4].float().unsqueeze(-1), "text"], "mask": INPUTS[:4] > 3,
        "label": torch.arange(4), "features": torch.rand(4, 5), "scale": torch.tensor(2.0), "twice": INPUTS[:4],
    }  # fmt: skip
    (seen,) = fit(Batches(batch), SequenceLengthWarmup()).seen
    for name, part in batch.items():
        if name in ("ids", "mask", "twice"):
            assert torch.equal(seen[name], part[:, :8])
        elif name != "more":
            assert torch.equal(seen[name], part)
    assert torch.equal(seen["more"][0], batch["more"][0][:, :8])
    assert batch["ids"].shape == (4, 32)


def test_tokens_go_before_a_tensor_that_stands_first():
    batch = {"features": torch.rand(4, 40), "inner": {"input_ids": INPUTS[:4], "mask": INPUTS[:4] > 3}}
    (seen,) = fit(Batches(batch), SequenceLengthWarmup()).seen
    assert torch.equal(seen["features"], batch["features"])
    assert torch.equal(seen["inner"]["input_ids"], INPUTS[:4, :8])
    assert torch.equal(seen["inner"]["mask"], INPUTS[:4, :8] > 3)


def test_named_places_are_cut_alone_in_whatever_dimension():
    batch = {"sound": torch.rand(4, 2, 32), "targets": torch.rand(4, 32, 32)}
    (seen,) = fit(Batches(batch), SequenceLengthWarmup(dim=2, inputs=["sound"])).seen
    assert torch.equal(seen["sound"], batch["sound"][:, :, :8])
    assert torch.equal(seen["targets"], batch["targets"])


def test_batches_of_other_lengths_grow_to_their_own_and_validation_sees_all():
    data = Batches(*[(INPUTS[:4, :length],) for length in (32, 24, 6, 32)] * 5)
    module = fit(data, SequenceLengthWarmup(full_from=0.4), val=stream())
    assert [len(inputs[0]) for (inputs,) in module.seen] == [8, 8, 6, 16, 24, 16, 6, 32] + [32, 24, 6, 32] * 3
    assert {inputs.shape[1] for inputs, _ in module.validated} == {32}


def test_what_cannot_work_is_refused_and_what_does_nothing_is_warned_of():
    with pytest.raises(ValueError, match=r"Expected `full_from` to be a number in \(0, 1\], but got 0\."):
        SequenceLengthWarmup(full_from=0)
    with pytest.raises(ValueError, match="Expected `mode` to be 'truncate' or 'reshape', but got 'pad'"):
        SequenceLengthWarmup(mode="pad")
    labelled = Batches((INPUTS[:4], torch.arange(4)))
    with pytest.raises(MisconfigurationException, match=r"what is at 1 belongs to whole ones\. Use `mode='truncate'`"):
        fit(labelled, SequenceLengthWarmup(mode="reshape"))
    packed = Batches({"input_ids": INPUTS[:4], "cu_seqlens": torch.tensor([0, 40, 128])})
    with pytest.raises(MisconfigurationException, match=r"what is at 'cu_seqlens' counts whole ones\. Take"):
        fit(packed, SequenceLengthWarmup())
    with pytest.raises(MisconfigurationException, match=r"sequences of one length in dimension 1 .* found none"):
        fit(Batches(torch.rand(4)), SequenceLengthWarmup())
    with pytest.raises(MisconfigurationException, match=r"one length in dimension 1 .* \(4, 32\) and \(4, 31\)\. Name"):
        fit(Batches((INPUTS[:4], INPUTS[:4, 1:])), SequenceLengthWarmup(inputs=[0, 1]))
    with pytest.raises(MisconfigurationException, match=r"whose length is unknown here\. Give `max_steps`, or"):
        fit(endless(), SequenceLengthWarmup(dim=2))
    with pytest.warns(UserWarning, match="nothing to do in the first batch: sequences of length 32 are full"):
        fit(Batches((INPUTS[:4],)), SequenceLengthWarmup(start=32))
