"""What all tests share: one thread, so that two test processes on two cores do not slow each other down."""

import pytest
import torch
from lightning.pytorch import seed_everything


@pytest.fixture(autouse=True)
def _same_start(tmp_path, monkeypatch):
    """Give each test fixed seeds and an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    seed_everything(7, verbose=False)
