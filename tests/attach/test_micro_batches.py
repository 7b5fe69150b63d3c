"""What tells that memory ran out, and what puts things back; the rest is shown by the trick's fits."""

import pytest
import torch
from torch import nn

from lightning_speedups.attach.micro_batches import is_out_of_memory, remembered


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x4 and 5x2)"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (
            RuntimeError(
                "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if a tensor is not contiguous"
            ),
            False,
        ),
        (ValueError("out of range"), False),
    ],
)
def test_it_is_told_from_other_errors(error, is_one):
    assert is_out_of_memory(error) is is_one


class Holds:
    def __init__(self):
        self.tensor, self.list, self.number, self.nothing = torch.zeros(3), [1], 1, None


@pytest.mark.parametrize("device", [None, "cpu"])
def test_what_is_held_comes_back_in_place_as_often_as_asked_for_and_so_do_random_states(device):
    holds = Holds()
    tensor = holds.tensor
    put_back = remembered([(holds, name) for name in vars(holds)], device)
    draws = set()
    for change in range(1, 4):
        draws.add(torch.rand(()).item())
        holds.tensor += change
        holds.list.append(change)
        holds.number = holds.nothing = change
        if change == 2:
            holds.tensor = torch.ones(3)
        put_back()
        assert holds.tensor is tensor
        assert (tensor.tolist(), holds.list, holds.number, holds.nothing) == ([0.0] * 3, [1], 1, None)
    assert len(draws) == 1


def test_tensors_of_inference_and_weights_come_back_too():
    holds, net = Holds(), nn.Linear(2, 1)
    with torch.inference_mode():
        holds.tensor = torch.zeros(3)
    net(torch.ones(1, 2)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()], [p.grad.clone() for p in net.parameters()]
    put_back = remembered(
        [(holds, "tensor"), *((p, name) for p in net.parameters() for name in ("data", "grad"))], "cpu"
    )
    net(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    put_back()
    for now, then in zip(([*net.parameters()], [p.grad for p in net.parameters()]), before, strict=True):
        assert all(map(torch.equal, now, then))
    net(torch.ones(1, 2)).sum().backward()  # and train on
