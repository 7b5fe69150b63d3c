"""The learning-rate range test (Smith, arXiv:1506.01186): which rate does this model bear, on this data?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_speedups.attach.packages import is_a, require_served
from lightning_speedups.attach.range_test import run_range_test
from lightning_speedups.core.range_test import Method, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RangeTestResult:
    """What a sweep has shown.

    Attributes:
        rates: The learning rate of each step.
        losses: The loss of each step, before its update.
        smoothed: The losses, averaged exponentially.
        suggestion: The rate to use.
        method: How it was picked.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    method: Method

    def figure(self, ax: Axes | None = None) -> Figure:
        """Draw the loss over the rate, and mark the suggestion.

        Args:
            ax: Axes to draw on. None: those of a new figure, outside pyplot's global state.

        Returns:
            The figure, which nobody has shown.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
        ax.plot(self.rates, self.losses, color="C0", alpha=0.3, linewidth=1, label="loss of each step")
        ax.plot(self.rates, self.smoothed, color="C0", linewidth=2, label="smoothed")
        label = f"suggestion: {self.suggestion:.2g} ({self.method})"
        ax.axvline(self.suggestion, color="C1", linestyle="--", linewidth=1)
        ax.plot(self.suggestion, self.smoothed[self.rates.index(self.suggestion)], "o", color="C1", label=label)
        # The way down fills the picture; where the loss blows up, it leaves it.
        finite = [loss for loss in self.smoothed if math.isfinite(loss)]
        low = min(finite)
        high = max(finite[: finite.index(low) + 1])
        ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        if high > low:
            ax.set_ylim(low - 0.25 * (high - low), high + 0.75 * (high - low))
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
        return cast("Figure", ax.figure)


class LRRangeTest:
    """Raise the learning rate step by step on a copy of the model, watch the loss, and suggest a rate.

    The suggestion suits the peak of a cycle (``OneCycleMomentum(max_lr=...)``); a good constant rate is a few times
    lower. It lies between two and ten times the rate that ``configure_optimizers`` gives, unless that is a placeholder:
    five times above the rate at which the loss is lowest, or ten thousand times below it. It belongs to this batch
    size, optimizer and weight decay. Model, Trainer, loaders and random states are left as they were: a fit that
    follows is the same as without the test.

    When not to use it: in manual optimization, with several optimizers, or when parameters are split between devices
    (FSDP, DeepSpeed); for a model whose copy does not fit beside it into memory; or to tell rates apart that are closer
    than a factor of two or three, since the suggestion is no finer. A loss that falls no further than its noise within
    the sweep is refused, as that of a model that is trained already or learns too slowly. Callbacks do not run in the
    test (no mixing, no freezing).

    Args:
        min_lr: Rate of the first step, above 0; far too low on purpose.
        max_lr: Rate of the last step, above ``min_lr``; far too high on purpose.
        steps: Length of the sweep in optimizer steps, 10 or more. It starts the loader again as often as it must.
        method: ``"minimum"``: a fifth of the rate at which the loss is lowest, within the bounds; ``"valley"``: the
            middle of the longest way down of the loss; ``"steepest"``: where it falls fastest. The last two are the
            field's usual picks, without bounds, and ruined runs in ``benchmarks/peak_rules.py``.
        beta: Weight of the past in the smoothed loss, in [0, 1).
        stop_factor: The sweep ends early when the smoothed loss is above this many times its best, above 1.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Smith, arXiv:1506.01186; the valley is fastai's.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from lightning.pytorch.demos.boring_classes import RandomDataset
        >>> class Decoder(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(32, 32)
        ...     def training_step(self, batch, batch_idx):
        ...         return (self.layer(batch) - batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> model, loader = Decoder(), torch.utils.data.DataLoader(RandomDataset(32, 64), batch_size=8)
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> result = LRRangeTest(min_lr=1e-3, max_lr=100.0).run(trainer, model, loader)
        >>> 0.01 < result.suggestion < 30
        True
    """

    def __init__(
        self,
        min_lr: float = 1e-6,
        max_lr: float = 10.0,
        steps: int = 100,
        method: Method = "minimum",
        beta: float = 0.98,
        stop_factor: float = 4.0,
    ) -> None:
        self.sweep = Sweep(min_lr, max_lr, steps, method, beta, stop_factor)

    def run(
        self,
        trainer: Trainer,
        model: LightningModule,
        train_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
    ) -> RangeTestResult:
        """Sweep, and suggest a rate.

        Args:
            trainer: The Trainer that is going to fit the model; the test takes over its device, precision, accumulation
                and gradient clipping.
            model: As for ``Trainer.fit``.
            train_dataloaders: As for ``Trainer.fit``: loaders, a datamodule, or None for the model's own.
            datamodule: As for ``Trainer.fit``.

        Raises:
            ValueError: If the loss never falls, or no further than its noise, or diverges before there are enough
                points.
            MisconfigurationException: If the Trainer is none of Lightning's, or the model or datamodule of the other of
                its two packages, if the optimization is manual, if there is not exactly one optimizer, if the strategy
                splits parameters between devices, or if the model cannot be copied.
        """
        if is_a(train_dataloaders, "LightningDataModule"):
            train_dataloaders, datamodule = None, train_dataloaders
        unwrapped = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        require_served(trainer, "LRRangeTest", unwrapped, datamodule)
        rates, losses, own = run_range_test(trainer, unwrapped, self.sweep, train_dataloaders, datamodule)
        smoothed, suggestion = self.sweep.read(rates, losses, own)
        return RangeTestResult(tuple(rates), tuple(losses), tuple(smoothed), suggestion, self.sweep.method)
