"""Weights that a step uses several times are cast to half precision once: the cache of mixed precision (Micikevicius et
al., arXiv:1710.03740) that Lightning 2.6 switched off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Trick


class AutocastCache(Trick):
    """Keeps the half-precision copies of weights for the rest of a step, under ``"bf16-mixed"`` and ``"16-mixed"``.

    Lightning 2.6 lets autocast cast a weight anew each time that it is used, as older releases of torch lost gradients
    when its first use in a step was under ``no_grad``; those that this package runs on do not. What is saved is time
    and memory for each further use in the same step: layers that share weights, cells unrolled by hand, towers of one
    network, decoding in a loop. Losses stay the same to the bit. The gradients of one weight's uses are summed in half
    precision, and not in float32, so that weights differ in the last digits of half precision.

    When not to use it: where each layer is called once a step, as in most networks; it gains nothing there. Where a
    ``training_step`` writes into trainable weights and then uses them again, which would see the copies of before:
    manual optimization is refused for that. With another precision it does nothing, and says so in one line.

    Raises:
        MisconfigurationException: In ``setup``, in manual optimization.

    Source:
        Micikevicius et al., arXiv:1710.03740; torch's ``autocast(cache_enabled=True)``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AutocastCache()], precision="bf16-mixed", accelerator="cpu")
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand where steps get their autocast."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        plugin = trainer.precision_plugin
        if not is_a(plugin, "MixedPrecision"):
            rank_zero_info(f"{self.name} does nothing: {type(plugin).__name__} is no mixed precision of autocast.")
            return
        if not pl_module.automatic_optimization:
            what = "keeps copies of weights for a whole `training_step`, in which manual optimization changes them"
            raise self.refusal(what, "Remove it, or let Lightning optimize.")
        Station.of(plugin, "autocast_context_manager").join(self, self._cached)

    def _cached(self, make: Callable[[], torch.autocast]) -> torch.autocast:
        made = make()
        return torch.autocast(made.device, dtype=made.fast_dtype, cache_enabled=True)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave."""
        super().undo(trainer, pl_module)
        if is_a(trainer.precision_plugin, "MixedPrecision"):
            Station.of(trainer.precision_plugin, "autocast_context_manager").leave(self)
