"""What all tests share: one thread, since torch's spinning threads collapse where other processes want the cores too."""

import gc
import multiprocessing
import os
import signal

# Read when torch is imported, and inherited by the processes and kernels that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from lightning.pytorch import seed_everything

# The same examples in every run, and no verdict by the clock of a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
# A job in the background of a shell begins with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config):
    """Give the whole suite a process for each core; for a few files it would take longer to start them."""
    return None if config.args_source is config.ArgsSource.TESTPATHS else 0


@pytest.fixture(autouse=True)
def _same_start(tmp_path, monkeypatch):
    """Give each test fixed seeds and an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    seed_everything(7, verbose=False)


@pytest.fixture
def no_process_is_left():
    """Let a test fail that leaves worker processes behind."""
    yield
    gc.collect()
    for worker in multiprocessing.active_children():  # torch 2.11 ends one that raised, and does not wait for its end
        worker.join(2)
    assert not multiprocessing.active_children()
