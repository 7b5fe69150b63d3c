"""Steps take no new pages from the kernel while a fit lasts; results are the same to the bit, and the setting goes."""

import ctypes
import itertools
import logging
import re
import resource
import sys

import pytest
import torch
from torch import nn

from lightning_speedups import AllocatorTuning
from lightning_speedups.tricks.hardware import allocator_tuning
from lightning_speedups.tricks.hardware.allocator_tuning import KEEP, USUAL, reason_against
from zoo import Classifier, ReplayLoader, assert_same_weights, trainer, weights

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
needs_glibc = pytest.mark.skipif(not GLIBC, reason="there is no glibc")


def EXAMPLE():
    return {"callbacks": [AllocatorTuning()]}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in (
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_TOP_PAD_",
        "MALLOC_MMAP_THRESHOLD_",
        "GLIBC_TUNABLES",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(monkeypatch):
    """What the allocator was set to, in order."""
    done, real = [], allocator_tuning.set_allocator
    monkeypatch.setattr(allocator_tuning, "set_allocator", lambda values: (done.append(values), real(values)))
    return done


class Large(Classifier):
    """Each step uses blocks of 160 MiB; notes the page faults of each."""

    def __init__(self):
        super().__init__()
        self.faults = []

    def training_step(self, batch, batch_idx):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(2):
            torch.ones(40 * 2**20).mul_(2.0)
        self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return super().training_step(batch, batch_idx)


@needs_glibc
def test_later_steps_take_no_pages_while_it_lasts_and_do_so_afterwards():
    module = Large()
    trainer(callbacks=[AllocatorTuning()], max_steps=8).fit(module, ReplayLoader())
    tuned, module.faults = module.faults, []
    trainer(max_steps=4).fit(module, ReplayLoader())
    *rest, _ = sorted(tuned[2:])  # what others put into a gap between blocks may make the heap grow once more
    assert max(rest) < min(module.faults) / 10
    assert not AllocatorTuning.users


@needs_glibc
def test_the_weights_are_those_of_plain_training_to_the_bit():
    torch.manual_seed(1)
    plain, module = Classifier(), Classifier()
    module.load_state_dict(plain.state_dict())
    trainer().fit(plain, ReplayLoader())
    trainer(callbacks=[AllocatorTuning()]).fit(module, ReplayLoader())
    assert_same_weights(weights(plain), weights(module))


@needs_glibc
@pytest.mark.parametrize("failing", [False, True])
def test_it_is_set_at_the_start_and_put_back_once_also_after_an_exception(settings, failing):
    module, seen = Classifier(), []

    def note(outputs, batch, batch_idx):
        seen.append([*settings])
        if failing:
            raise ZeroDivisionError

    module.on_train_batch_end = note
    run = trainer(callbacks=[AllocatorTuning()], max_steps=1)
    if failing:
        with pytest.raises(ZeroDivisionError):
            run.fit(module, ReplayLoader())
    else:
        run.fit(module, ReplayLoader())
    run.callbacks[0].undo(run, module)
    assert seen == [[KEEP]]
    assert settings == [KEEP, USUAL]


@needs_glibc
@pytest.mark.parametrize("order", [*itertools.permutations(range(2))])
def test_the_last_of_several_trainers_puts_it_back(settings, order):
    tricks, module, run = [AllocatorTuning(), AllocatorTuning()], nn.Module(), trainer()
    for trick in tricks:
        trick.setup(run, module, "fit")
    tricks[order[0]].undo(run, module)
    assert settings == [KEEP, KEEP]
    tricks[order[1]].undo(run, module)
    assert settings == [KEEP, KEEP, USUAL]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_only_a_fit_sets_it(settings, stage):
    trick, run = AllocatorTuning(), trainer()
    trick.setup(run, nn.Module(), stage)
    trick.undo(run, nn.Module())
    assert settings == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"device": "mps"}, "not in the memory of a CPU, but of mps"),
        ({"libc": ""}, "glibc on Linux"),
        ({"libraries": "7f r-xp /usr/lib/libjemalloc.so.2\n"}, "jemalloc is loaded"),
        ({"libraries": "/lib/libtcmalloc_minimal.so.4"}, "tcmalloc is loaded"),
        ({"environment": {"MALLOC_TRIM_THRESHOLD_": "1"}}, r"own settings stand \(MALLOC_TRIM_THRESHOLD_\)"),
        ({"environment": {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"}}, r"own settings stand \(GLIBC_TUNABLES\)"),
        ({"environment": {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.pthread.rseq=0"}}, "^$"),
    ],
)
def test_where_it_is_off_it_says_why(given, reason):
    usual = {"device": "cpu", "libc": "glibc", "environment": {}, "libraries": "libc.so.6"}
    assert re.search(reason, reason_against(**(usual | given)))


@needs_glibc
def test_settings_of_the_environment_stand_and_that_is_said_in_one_line(settings, monkeypatch, caplog):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "4")
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[AllocatorTuning()], max_steps=1).fit(Classifier(), ReplayLoader())
    assert settings == []
    lines = [line for line in caplog.messages if "AllocatorTuning" in line]
    assert lines == ["AllocatorTuning does nothing: the environment's own settings stand (MALLOC_MMAP_MAX_)."]
