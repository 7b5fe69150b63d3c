"""The one-cycle policy with inverse momentum (Smith & Topin, arXiv:1708.07120; Smith, arXiv:1803.09820)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_speedups.attach.optimizers import OptimizerTrick, Order
from lightning_speedups.attach.trick import callbacks_of, raw_optimizers, total_steps
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.schedules import Anneal, one_cycle

curve = lru_cache(maxsize=8)(one_cycle)  # parameter groups ask for the same point


def set_momentum(group: Mapping[str, Any], momentum: float) -> dict[str, Any]:
    """Return the entry of a parameter group that holds the momentum, with a new value.

    Args:
        group: A parameter group of an SGD-like (``momentum``) or Adam-like (``betas``) optimizer.
        momentum: In [0, 1).

    Example:
        >>> set_momentum({"betas": (0.9, 0.999)}, 0.85)
        {'betas': (0.85, 0.999)}
    """
    if "betas" in group:
        return {"betas": (momentum, *group["betas"][1:])}
    return {"momentum": momentum}


class OneCycleMomentum(OptimizerTrick):
    """One cycle over the whole run: the learning rate goes low → high → far below low, momentum high → low → high.

    The values of each step are those of ``torch.optim.lr_scheduler.OneCycleLR``, but they count real optimizer steps
    (one that GradScaler skips moves nothing), stay at the end instead of climbing again, and a resumed run may have
    another length: the curve is stretched over the new total, with a warning.

    When not to use it: together with another scheduler (it refuses), or for open-ended runs. The peak must fit: too
    high a ``max_lr`` diverges.

    Args:
        max_lr: The peak, above 0: one number, or one for each parameter group.
        total_steps: Length in optimizer steps, 1 or more. None: the length of the run, from the Trainer.
        pct_start: Fraction of the run in which the rate rises, in (0, 1); at most 0.5 with ``three_phase``.
        anneal: ``"cos"`` or ``"linear"``.
        div_factor: ``max_lr`` over the first rate, above 0.
        final_div_factor: First rate over the last, above 0.
        base_momentum: Momentum at the peak, in [0, 1).
        max_momentum: Momentum at both ends, in [0, 1).
        three_phase: Return to the first rate before the final fall.
        cycle_momentum: Move ``momentum`` (or ``betas[0]``) as well.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the run's length is unknown, if there is another owner of the
            learning rate, if ``max_lr`` does not fit the parameter groups, or if the optimizer has no momentum to
            cycle.

    Source:
        Smith & Topin, arXiv:1708.07120; Smith, arXiv:1803.09820.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[OneCycleMomentum(max_lr=0.4)], max_epochs=10)
    """

    order = Order.ABSOLUTE

    def __init__(
        self,
        max_lr: float | list[float],
        total_steps: int | None = None,
        pct_start: float = 0.3,
        anneal: Anneal = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        three_phase: bool = False,
        cycle_momentum: bool = True,
    ) -> None:
        super().__init__()
        for rate in max_lr if isinstance(max_lr, (list, tuple)) and max_lr else [max_lr]:
            check_number("max_lr", rate, 0, above=True)
        check_number("total_steps", total_steps, 1, whole=True, optional=True)
        check_number("pct_start", pct_start, 0, 0.5 if three_phase else 1, above=True, below=not three_phase)
        if anneal not in ("cos", "linear"):
            raise ValueError(f"Expected `anneal` to be 'cos' or 'linear', but got {anneal!r}.")
        check_number("div_factor", div_factor, 0, above=True)
        check_number("final_div_factor", final_div_factor, 0, above=True)
        check_number("base_momentum", base_momentum, 0, 1, below=True)
        check_number("max_momentum", max_momentum, 0, 1, below=True)
        self.max_lr, self.total_steps, self.cycle_momentum = max_lr, total_steps, cycle_momentum
        self.shape: dict[str, Any] = {
            "pct_start": pct_start,
            "anneal": anneal,
            "div_factor": div_factor,
            "final_div_factor": final_div_factor,
            "base_momentum": base_momentum,
            "max_momentum": max_momentum,
            "three_phase": three_phase,
        }
        self._total: int | None = None
        self._total_before: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the optimizer driver."""
        super().setup(trainer, pl_module, stage)
        self._total = self._total_before = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse another owner of the learning rate, and groups that do not fit."""
        others = [
            f"the scheduler {type(config.scheduler).__name__} from configure_optimizers"
            for config in trainer.lr_scheduler_configs
        ]
        for callback in callbacks_of(trainer):
            absolute = (
                isinstance(callback, OptimizerTrick) and callback.order == Order.ABSOLUTE and callback is not self
            )
            if absolute or isinstance(callback, StochasticWeightAveraging):
                others.append(f"the callback {type(callback).__name__}")
        if others:
            raise MisconfigurationException(
                f"OneCycleMomentum sets the learning rate of every step, and so does {' and '.join(others)}. Remove one"
                " of them (WarmupLRScaler may stay: it multiplies)."
            )
        for optimizer in raw_optimizers(trainer):
            groups, name = optimizer.param_groups, type(optimizer).__name__
            if isinstance(self.max_lr, Sequence) and len(self.max_lr) != len(groups):
                raise MisconfigurationException(
                    f"OneCycleMomentum(max_lr={self.max_lr}) has {len(self.max_lr)} values, but {name} has "
                    f"{len(groups)} parameter groups. Give one number, or one for each group."
                )
            if self.cycle_momentum and not all("momentum" in group or "betas" in group for group in groups):
                raise MisconfigurationException(
                    f"OneCycleMomentum cycles `momentum` or `betas[0]`, but {name} has neither. Use "
                    "`cycle_momentum=False`."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the length of the cycle."""
        super().on_train_start(trainer, pl_module)
        known = total_steps(trainer) if pl_module.automatic_optimization else None
        self._total = self.total_steps or known
        if not self._total:
            raise MisconfigurationException(
                "OneCycleMomentum needs the length of the run, and this one's is unknown (an endless loader, no "
                "`max_epochs`, or manual optimization, where the steps are the module's own). Give `total_steps=`, in "
                "optimizer steps, or `Trainer(max_steps=...)`."
            )
        if self._total_before not in (None, self._total):
            rank_zero_warn(
                f"OneCycleMomentum: the checkpoint's run had {self._total_before} optimizer steps, this one has "
                f"{self._total}; the rest of the cycle is stretched over the new total."
            )

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set rate and momentum."""
        assert self._total is not None
        max_lr = self.max_lr[group] if isinstance(self.max_lr, Sequence) else self.max_lr
        lr, momentum = curve(step, self._total, max_lr=max_lr, **self.shape)
        return {"lr": lr, **(set_momentum(values, momentum) if self.cycle_momentum else {})}

    def state_dict(self) -> dict[str, Any]:
        """Return the counted steps and the length of the run."""
        return {**super().state_dict(), "total_steps": self._total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the same step."""
        super().load_state_dict(state_dict)
        self._total_before = state_dict["total_steps"]
