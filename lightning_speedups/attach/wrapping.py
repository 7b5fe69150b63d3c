"""Keeps the strategy's wrapper in step with the set of trainable parameters.

DDP's reducer knows only the parameters that could be trained when it was built. One that is unfrozen later trains on
each rank by itself, and the ranks part silently (Lightning #20340); one that is frozen later would be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_speedups.attach.copies import may_split_model
from lightning_speedups.attach.packages import MisconfigurationException, is_a


def require_rewrapping(trainer: Trainer, name: str) -> None:
    """Refuse a strategy under which parameters cannot be frozen and unfrozen during the fit.

    Args:
        trainer: The Trainer.
        name: Who asks, for the message.

    Raises:
        MisconfigurationException: If the strategy is neither single-device nor DDP.
    """
    if may_split_model(trainer):
        raise MisconfigurationException(
            f"{name} freezes and unfreezes parameters during the fit, which {type(trainer.strategy).__name__} does not "
            "follow. Use `strategy='ddp'` (or a single device)."
        )


def trainable(pl_module: LightningModule) -> set[str]:
    """Return the names of the parameters that can be trained."""
    return {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}


@contextmanager
def rewrapped(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Wrap the module anew if the body changes the set of trainable parameters.

    All ranks must make the same change at the same time.

    Args:
        trainer: The Trainer, fitting.
        pl_module: Its module.
    """
    before = trainable(pl_module)
    yield
    strategy: Any = trainer.strategy
    if (
        is_a(strategy, "DDPStrategy")
        and isinstance(strategy.model, DistributedDataParallel)
        and trainable(pl_module) != before
    ):
        # The old reducer's hooks on the parameters would otherwise live as long as it does.
        strategy.model._remove_autograd_hooks()  # type: ignore[no-untyped-call]
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
