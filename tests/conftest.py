"""What all tests share: one thread, so that two test processes on two cores do not slow each other down."""

import signal

import pytest
import torch
from hypothesis import settings
from lightning.pytorch import seed_everything

# The same examples in every run, and no verdict by the clock of a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
# A job in the background of a shell begins with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_start(tmp_path, monkeypatch):
    """Give each test fixed seeds and an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    seed_everything(7, verbose=False)
