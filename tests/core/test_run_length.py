"""Totals against a plain count of a run's steps, one batch after the other."""

import itertools

import pytest

from lightning_speedups.core.run_length import RunLength


def count(max_epochs, max_steps, batches, accumulation):
    """Run it."""
    done, steps = 0, 0
    for epoch in itertools.count():
        if epoch == max_epochs:
            return done, steps
        for batch in range(batches[epoch % len(batches)]):
            if steps == max_steps:
                return done, steps
            done += 1
            size = accumulation[epoch % len(accumulation)]
            if (batch + 1) % size == 0 or batch + 1 == batches[epoch % len(batches)]:
                steps += 1
        if steps == max_steps:
            return done, steps


@pytest.mark.parametrize("max_epochs", [None, 0, 1, 3])
@pytest.mark.parametrize("max_steps", [None, 1, 4, 7])
@pytest.mark.parametrize("batches", [(4,), (5, 2), (1, 7, 3)])
@pytest.mark.parametrize("accumulation", [(1,), (3,), (2, 4)])
def test_the_totals_are_those_of_a_run(max_epochs, max_steps, batches, accumulation):
    run = RunLength(
        max_epochs, max_steps, lambda e: batches[e % len(batches)], lambda e: accumulation[e % len(accumulation)]
    )
    if max_epochs is None and max_steps is None:
        assert run.batches is None
        assert run.steps is None
        return
    done, steps = count(max_epochs, max_steps, batches, accumulation)
    assert run.batches == done
    assert run.steps == steps


def test_without_the_length_of_an_epoch_only_steps_tell():
    endless = RunLength(3, None, lambda epoch: None, lambda epoch: 2)
    assert (endless.steps, endless.batches, endless.steps_in_epochs(1.0)) == (None, None, None)
    limited = RunLength(3, 5, lambda epoch: None, lambda epoch: 2)
    assert (limited.steps, limited.batches, limited.steps_in_epochs(0)) == (5, 10, 0)
