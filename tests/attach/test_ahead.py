"""Batches come as they are and in their order, each after its copy; streams are simulated, as there may be no GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_speedups.attach import ahead as module
from lightning_speedups.attach.ahead import Ahead, copied_ahead
from lightning_speedups.attach.workers import copy_loader

CUDA = torch.device("cuda")


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device, and who uses its memory."""

    is_cuda = True
    users = ()

    def record_stream(self, stream):
        self.users = (*self.users, stream)


@pytest.fixture
def done(monkeypatch):
    """What was done, in its order."""
    done = []

    @contextmanager
    def stream(which):
        done.append(f"to the {which}")
        yield
        done.append("back")

    current = SimpleNamespace(wait_stream=lambda which: done.append(f"waits for the {which}"))
    streams = SimpleNamespace(Stream=lambda device: "side", stream=stream, current_stream=lambda device: current)
    monkeypatch.setattr(module, "CUDA", streams)

    def move(batch, device):
        if batch is module.END:
            return batch
        done.append(f"copies {int(batch[0])}")
        return [tensor.as_subclass(OnDevice) for tensor in batch]

    monkeypatch.setattr(module, "move_data_to_device", move)
    return done


def test_the_next_batch_is_on_its_way_before_the_last_one_is_trained_on(done):
    source = iter([[torch.tensor(float(number))] for number in range(3)])
    for number, batch in enumerate(copied_ahead(source, CUDA)):
        done.append(f"trains on {number}")
        assert float(batch[0]) == number
        assert type(batch[0]) is OnDevice
        assert len(batch[0].users) == 1
    copies = [one for one in done if one.startswith(("copies", "waits", "trains"))]
    assert copies == [
        "copies 0", "waits for the side", "copies 1", "trains on 0",
        "waits for the side", "copies 2", "trains on 1", "waits for the side", "trains on 2",
    ]  # fmt: skip


def test_no_batches_are_none(done):
    assert [*copied_ahead(iter([]), CUDA)] == []


def test_an_error_comes_as_it_is(done):
    def fails():
        yield [torch.zeros(())]
        raise LookupError("sample 17")

    with pytest.raises(LookupError, match="sample 17"):
        next(copied_ahead(fails(), CUDA))


def test_a_loader_copies_ahead_in_every_epoch(done):
    loader = copy_loader(DataLoader(torch.arange(4.0).view(4, 1), batch_size=1), Ahead, copies_to=CUDA)
    for _ in range(2):
        assert [float(batch[0]) for batch in loader] == [0, 1, 2, 3]


def test_what_marks_the_end_is_moved_nowhere():
    from lightning.fabric.utilities import move_data_to_device

    assert move_data_to_device(module.END, torch.device("cpu")) is module.END
