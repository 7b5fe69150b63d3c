"""The arms of a comparison on text and on its lines: tables with one row a trick."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_speedups.measure.arms import Arm, Ingredients, Situation, plain, precision
from lightning_speedups.recipes import recipe
from lightning_speedups.tricks.optimizers.muon.muon_callback import MuonCallback
from lightning_speedups.tricks.rates.lr_curve import LRCurve
from lightning_speedups.tricks.rates.one_cycle_momentum import OneCycleMomentum
from lightning_speedups.tricks.sequences.length_batches import LengthBatches
from lightning_speedups.tricks.sequences.sequence_length_warmup import SequenceLengthWarmup


def _tuned(at: Situation) -> Ingredients:
    return Ingredients(trainer={"precision": precision(at).trainer["precision"]}, one_cycle=3 * at.lr)


def _fast(at: Situation) -> Ingredients:
    windows = at.data.x_train, at.data.y_train
    stack = recipe("text-fast", windows, epochs=at.epochs, seed=at.seed)
    return Ingredients(stack.trainer["callbacks"], precision(at).trainer, stack.loss, loader=stack.loader)


def _lengths(at: Situation) -> Ingredients:
    return Ingredients([SequenceLengthWarmup(start=16, full_from=0.4)])


def _one_cycle(at: Situation) -> Ingredients:
    return Ingredients([OneCycleMomentum(max_lr=3 * at.lr)])


def _curve(at: Situation) -> Ingredients:
    return Ingredients([LRCurve("linear")])


def _muon(at: Situation) -> Ingredients:
    return Ingredients([MuonCallback(lr=20 * at.lr, rest_lr=at.lr, rest="adamw")])


def _buckets(at: Situation) -> Ingredients:
    return Ingredients([LengthBatches(seed=at.seed)])


# Choices, the same for every arm unless its trick defines the value: AdamW with torch's own betas and weight decay, at
# a constant rate. The recipe's batches are its own.
TEXT_ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("plain", "AdamW at a constant learning rate, float32", plain, baseline=None),
        Arm("tuned", "by hand: torch's one-cycle up to three times the rate, in half of the steps", _tuned, length=0.5),
        Arm("fast", "the recipe text-fast, with three tenths of the windows", _fast, length=0.3),
        Arm("lengths", "SequenceLengthWarmup: from 16 to all bytes over the first 40 %", _lengths, single=True),
        Arm("muon", "MuonCallback in the place of AdamW for matrices, at twenty times its rate", _muon, single=True),
        Arm(
            "onecycle",
            "OneCycleMomentum: up to three times the rate and down to almost nothing, in half of the steps",
            _one_cycle,
            length=0.5,
            single=True,
        ),
        Arm("curve", "LRCurve: the same rate, on a line down to 0", _curve, on_request=True),
        Arm(
            "precision",
            "trainer_defaults(precision='auto'): what the hardware is fast at",
            precision,
            on_request=True,
        ),
    )
}
LINE_ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("plain", "AdamW at a constant learning rate, float32, random batches padded to their longest", plain, None),
        Arm("buckets", "LengthBatches: as many lines in a batch, of about one length", _buckets),
    )
}
