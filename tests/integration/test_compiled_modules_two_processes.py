"""CompiledModules in two processes: both learn the same, and what they learn without it."""

import pytest
from two_processes import Notes, Regressor, farthest, two

from lightning_speedups import CompiledModules
from zoo import assert_same_weights

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def fit(folder, *tricks):
    notes = Notes(folder)
    two([*tricks, notes], max_epochs=2).fit(Regressor())
    return notes.read()


def test_both_processes_learn_what_they_learn_without():
    plain = fit("plain")
    one, other = fit("compiled", CompiledModules(backend="aot_eager", plain_batches=2))
    for epoch in range(2):
        assert_same_weights(one["weights"][epoch], other["weights"][epoch])
        assert farthest(one["weights"][epoch], plain[0]["weights"][epoch]) < 1e-6


def test_they_stay_equal_where_only_one_of_them_can_compile():
    def fails_in_one(graph, inputs):
        import torch.distributed

        if torch.distributed.get_rank() == 1:
            raise RuntimeError("no compiler here")
        return graph.forward

    plain = fit("plain")
    one, other = fit("compiled", CompiledModules(backend=fails_in_one, plain_batches=2))
    assert_same_weights(one["weights"][1], other["weights"][1])
    assert farthest(one["weights"][1], plain[0]["weights"][1]) < 1e-6
