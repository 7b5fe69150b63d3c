"""Muon under DDP: the ranks stay equal, and end where a single process ends."""

from typing import ClassVar

import pytest
from two_processes import Notes, Regressor, farthest, two

from lightning_speedups import MuonCallback, MuonMixin
from zoo import trainer


class MuonRegressor(MuonMixin, Regressor):
    muon_options: ClassVar = {"lr": 0.05, "rest_lr": 0.1}


@pytest.mark.parametrize("how", ["mixin", "callback"])
def test_both_processes_end_with_the_same_weights_which_are_those_of_one(how):
    ends = []
    for name in ("two", "one"):
        notes = Notes(name)
        module = MuonRegressor() if how == "mixin" else Regressor()
        callbacks = [notes] if how == "mixin" else [MuonCallback(lr=0.05), notes]
        (two(callbacks) if name == "two" else trainer(callbacks=callbacks)).fit(module)
        ends.append([rank["weights"][-1] for rank in notes.read(2 if name == "two" else 1)])
    (first, second), (alone,) = ends
    assert farthest(first, second) == 0
    assert farthest(alone, first) < 1e-4
