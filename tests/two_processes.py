"""A fit in two processes on one CPU, and what each of them noted."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader, TensorDataset

from zoo import LIGHTNING, Callback, LightningModule, Trainer, trainer

SAMPLES, FEATURES = 32, 5


def forked(**options: Any) -> Any:
    return LIGHTNING.strategies.DDPStrategy(start_method="fork", timeout=timedelta(seconds=60), **options)


def two(callbacks: list[Callback], options: dict[str, Any] | None = None, **arguments: Any) -> Trainer:
    """A Trainer of two processes."""
    return trainer(
        devices=2, strategy=forked(**(options or {})), use_distributed_sampler=False, callbacks=callbacks, **arguments
    )


def regression() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs @ torch.randn(FEATURES, 1, generator=generator))


class Regressor(LightningModule):
    """Each process trains on samples of its own; all together they make the batch of a single process."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        torch.manual_seed(11)
        self.backbone = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.head = nn.Linear(6, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        own = TensorDataset(*(part[rank::processes] for part in regression().tensors))
        return DataLoader(own, batch_size=self.batch_size // processes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return ((self.head(self.backbone(inputs)) - targets) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Notes(Callback):
    """Writes each process's weights after every epoch, and the rates of its steps, into a folder."""

    def __init__(self, folder: str = "notes") -> None:
        self.folder = Path(folder)
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.strategy.optimizers:
            optimizer.register_step_pre_hook(self._rates)

    def _rates(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        inputs = [inputs for inputs, _ in getattr(pl_module, "seen", [])]
        notes = {"weights": self.weights, "rates": self.rates, "inputs": inputs}
        torch.save(notes, self.folder / f"rank{trainer.global_rank}.pt")

    def read(self, processes: int = 2) -> list[dict[str, Any]]:
        return [torch.load(self.folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class CountsTraffic(Callback):
    """Counts the bytes that each DDP wrapper sends, in each epoch, and keeps the wrappers alive."""

    def __init__(self) -> None:
        self.wrappers: list[nn.Module] = []
        self.sent: list[tuple[int, int, int]] = []

    def _watch(self, trainer: Trainer) -> None:
        wrapper = trainer.strategy.model
        if not any(wrapper is known for known in self.wrappers):
            self.wrappers.append(wrapper)
            wrapper.register_comm_hook((trainer, len(self.wrappers) - 1, self.sent), count_and_reduce)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._watch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save((len(self.wrappers), self.sent), f"traffic{trainer.global_rank}.pt")

    @staticmethod
    def read(rank: int) -> tuple[int, dict[tuple[int, int], int]]:
        """How many wrappers there were, and what each has sent in each epoch."""
        wrappers, sent = torch.load(f"traffic{rank}.pt", weights_only=True)
        by_epoch: dict[tuple[int, int], int] = {}
        for wrapper, epoch, size in sent:
            by_epoch[wrapper, epoch] = by_epoch.get((wrapper, epoch), 0) + size
        return wrappers, by_epoch


def count_and_reduce(state, bucket):  # torch reads annotations, and wants its own
    trainer, wrapper, sent = state
    sent.append((wrapper, trainer.current_epoch, bucket.buffer().numel() * bucket.buffer().element_size()))
    return default_hooks.allreduce_hook(None, bucket)


def size(*modules: nn.Module) -> int:
    """The bytes of all parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
