"""Translation, small: a transformer turns padded sequences of digits around, with smoothed labels."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_speedups import (
    LabelSmoothingLoss,
    MixupCallback,
    OneCycleMomentum,
    SmoothingSchedule,
    SubsetTraining,
    WarmupLRScaler,
)
from zoo import assert_same_weights, trainer, weights

PAD, BEGIN, END, DIGITS = 0, 1, 2, 5
VOCABULARY = 3 + DIGITS


def pairs(count, longest=4):
    generator = torch.Generator().manual_seed(7)
    for length in torch.randint(1, longest + 1, (count,), generator=generator).tolist():
        digits = torch.randint(3, VOCABULARY, (length,), generator=generator)
        yield digits, torch.cat([torch.tensor([BEGIN]), digits.flip(0), torch.tensor([END])])


def collate(samples):
    return tuple(pad_sequence(side, batch_first=True, padding_value=PAD) for side in zip(*samples, strict=True))


def data(count=768):
    return DataLoader(list(pairs(count)), batch_size=32, shuffle=True, collate_fn=collate)


class Translator(LightningModule):
    """A transformer as torch's tutorial has it; the loss is that of flattened tokens, as most projects write it."""

    def __init__(self, criterion):
        super().__init__()
        torch.manual_seed(3)
        self.tokens, self.places = nn.Embedding(VOCABULARY, 32, padding_idx=PAD), nn.Embedding(8, 32)
        self.transformer = nn.Transformer(32, 2, 1, 1, 64, dropout=0.0, batch_first=True)
        self.transformer.encoder.enable_nested_tensor = False
        self.head, self.criterion, self.losses, self.smoothed = nn.Linear(32, VOCABULARY), criterion, [], []

    def embed(self, tokens):
        return self.tokens(tokens) + self.places.weight[: tokens.shape[1]]

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).bool()
        made = self.transformer(
            self.embed(source), self.embed(target), tgt_mask=mask, src_key_padding_mask=source == PAD,
            tgt_key_padding_mask=target == PAD, memory_key_padding_mask=source == PAD,
        )  # fmt: skip
        return self.head(made)

    def training_step(self, batch, batch_idx):
        source, target = batch
        scores, labels = self(source, target[:, :-1]), target[:, 1:]
        loss = self.criterion(scores.reshape(-1, VOCABULARY), labels.reshape(-1))
        self.losses.append(loss.item())
        if isinstance(self.criterion, LabelSmoothingLoss):
            self.smoothed.append(float(self.criterion.epsilon(scores)))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)

    @torch.no_grad()
    def right(self, batch):
        """The share of tokens that are right."""
        source, target = batch
        found, wanted = self(source, target[:, :-1]).argmax(2), target[:, 1:]
        return float((found == wanted)[wanted != PAD].float().mean())


def test_a_translator_learns_with_smoothed_labels_of_padded_batches():
    module = Translator(LabelSmoothingLoss(0.1, ignore_index=PAD))
    callbacks = [OneCycleMomentum(0.01), SmoothingSchedule(end_factor=0.0)]
    trainer(callbacks=callbacks, max_epochs=5).fit(module, data())
    assert module.smoothed == pytest.approx([0.1 * (1 - t / 120) for t in range(120)])
    assert module.right(collate(list(pairs(900))[768:])) > 0.95


def test_its_loss_is_torchs_of_whole_and_of_flattened_sequences():
    torch.manual_seed(1)
    module, (source, target) = Translator(None), collate(list(pairs(16)))
    scores, labels = module(source, target[:, :-1]), target[:, 1:]
    assert (labels == PAD).any()
    want = F.cross_entropy(scores.transpose(1, 2), labels, ignore_index=PAD, label_smoothing=0.1)
    slopes = torch.autograd.grad(want, list(module.parameters()), retain_graph=True)
    loss = LabelSmoothingLoss(0.1, ignore_index=PAD)
    for got in (loss(scores.transpose(1, 2), labels), loss(scores.reshape(-1, VOCABULARY), labels.reshape(-1))):
        torch.testing.assert_close(got, want)
        for mine, theirs in zip(
            torch.autograd.grad(got, list(module.parameters()), retain_graph=True), slopes, strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_a_run_with_it_is_that_with_torchs_loss():
    modules = [
        Translator(loss)
        for loss in (
            LabelSmoothingLoss(0.1, ignore_index=PAD),
            nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=PAD),
        )
    ]
    for module in modules:
        torch.manual_seed(5)
        trainer(callbacks=[OneCycleMomentum(0.01)], max_epochs=1).fit(module, data(256))
    assert modules[0].losses == pytest.approx(modules[1].losses, rel=1e-3)


def test_each_pairs_loss_is_the_mean_over_its_own_tokens():
    module, subset = Translator(LabelSmoothingLoss(0.1, ignore_index=PAD)), SubsetTraining(0.5, seed=1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    start = weights(module)
    trainer(callbacks=[subset, WarmupLRScaler(scale=2.0, warmup_epochs=1)], max_epochs=1).fit(module, data(64))
    assert_same_weights(start, weights(module))
    own = []
    for pair in pairs(64):
        source, target = collate([pair])
        scores = module(source, target[:, :-1]).detach()
        own.append(F.cross_entropy(scores[0], target[0, 1:], label_smoothing=0.1))
    torch.testing.assert_close(subset.saved.losses, torch.stack(own), rtol=1e-4, atol=1e-5)


def test_token_ids_are_not_blended():
    module = Translator(LabelSmoothingLoss(0.1, ignore_index=PAD))
    with pytest.raises(MisconfigurationException, match=r"found torch\.int64\. .*token ids.*LabelSmoothingLoss"):
        trainer(callbacks=[MixupCallback()], max_epochs=1).fit(module, data(64))
