"""A module that lets packed sequences see each other is refused; all else trains as without the check."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_speedups import AutoMicroBatch, PackingCheck, block_mask, pack
from zoo import Batches, assert_same_weights, trainer, weights


def EXAMPLE():
    return {"callbacks": [PackingCheck()]}


def texts(batches=4):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (batches * 8,), generator=generator).tolist()
    sequences = [torch.randint(0, 20, (length,), generator=generator) for length in lengths]
    return DataLoader(sequences, batch_size=8, collate_fn=pack(12))


class Model(LightningModule):
    """A layer of attention, which may forget to mask; hides tokens at random, as BERT does, and has a norm over batches."""

    def __init__(self, masks=True, zero=False, causal=True):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(21, 8), nn.Embedding(12, 8), nn.Linear(8, 21)
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.masks, self.causal, self.modes = masks, causal, []
        if zero:
            nn.init.zeros_(self.out.weight)

    def training_step(self, batch, batch_idx):
        self.modes.append(self.training)
        tokens = torch.where(torch.rand(batch["labels"].shape) < 0.1, 20, batch["input_ids"])
        q, k, v = self.qkv(self.tokens(tokens) + self.positions(batch["position_ids"])).chunk(3, -1)
        segments = batch["segment_ids"] if self.masks else torch.ones_like(batch["segment_ids"])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=block_mask(segments, self.causal)[:, 0])
        logits = self.head(F.dropout(self.norm((self.tokens(tokens) + self.out(mixed)).mT).mT, 0.2, self.training))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_a_module_that_keeps_them_apart_trains_to_the_same_bits(causal):
    plain, checked = Model(causal=causal), Model(causal=causal)
    checked.load_state_dict(plain.state_dict())
    for module, callbacks in ((plain, []), (checked, [PackingCheck()])):
        torch.manual_seed(3)
        trainer(max_epochs=3, callbacks=callbacks).fit(module, texts())
    assert_same_weights(weights(plain), weights(checked))
    assert checked.modes == [True] * 12


@pytest.mark.parametrize("causal", [True, False])
def test_one_that_does_not_is_refused_before_its_first_step(causal):
    module = Model(masks=False, causal=causal)
    before = weights(module)
    with pytest.raises(
        MisconfigurationException, match=r"Model.training_step lets packed .* Give attention `block_mask"
    ):
        trainer(callbacks=[PackingCheck()]).fit(module, texts())
    assert_same_weights(before, weights(module))
    assert module.training


@pytest.mark.parametrize("masks", [True, False])
def test_batches_that_run_in_parts_are_checked_as_a_whole(masks):
    module, callbacks = Model(masks), [AutoMicroBatch(start=2), PackingCheck()]
    if masks:
        trainer(max_epochs=1, callbacks=callbacks).fit(module, texts())
        assert len(module.modes) > 4
        return
    with pytest.raises(MisconfigurationException, match="lets packed sequences see each other"):
        trainer(callbacks=callbacks).fit(module, texts())
    assert module.modes == []


def test_attention_that_does_nothing_at_first_is_refused_ten_batches_later():
    module = Model(masks=False, zero=True)
    with pytest.raises(MisconfigurationException, match="lets packed sequences see each other"):
        trainer(callbacks=[PackingCheck()]).fit(module, texts())
    assert len(module.modes) == 10


def test_what_is_not_packed_or_cannot_be_checked_is_told(caplog):
    class Unpacked(Model):
        def training_step(self, batch, batch_idx):
            return self.head.weight.sum()

    with caplog.at_level("INFO"):
        trainer(max_epochs=1, callbacks=[PackingCheck()]).fit(Unpacked(), Batches(torch.ones(2)))
    assert "PackingCheck does nothing: the first batch is not packed." in caplog.text

    alone = DataLoader([torch.arange(12)] * 4, batch_size=2, collate_fn=pack(12))  # each has a row
    trainer(max_epochs=1, callbacks=[PackingCheck()]).fit(Model(masks=False), alone)

    class Manual(Model):
        automatic_optimization = False

    with pytest.warns(UserWarning, match=r"cannot check whether packed sequences are kept apart: Manual optimizes man"):
        trainer(max_steps=1, callbacks=[PackingCheck()]).fit(Manual(masks=False), texts(1))
