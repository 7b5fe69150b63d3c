"""Convolutions and images with their channels last in memory: the layout in which oneDNN and cuDNN compute them without
reordering (Georganas et al., arXiv:1808.05567, on the weight of layouts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_speedups.attach.batches import BatchOrder, BatchTrick
from lightning_speedups.attach.copies import require_whole
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.stations import Station
from lightning_speedups.core.batch import places_of_tensors, replace_part
from lightning_speedups.modules.memory_format import (
    LAYOUTS,
    contiguous_state,
    format_of,
    make_channels_last,
    make_contiguous,
    match_state,
)


def with_channels_last(batch: Any, layouts: dict[int, torch.memory_format]) -> Any:
    """Return a batch whose images have their channels last in memory; shapes and values stay.

    Args:
        batch: Nested as it may be. Images are floating-point tensors; a container of which no copy can be made stays.
        layouts: The layout for each number of dimensions, those of the batch and the channels included.

    Example:
        >>> image, label = with_channels_last((torch.ones(2, 3, 8, 8), torch.ones(2)), {4: torch.channels_last})
        >>> tuple(image.shape), image.stride()
        ((2, 3, 8, 8), (192, 1, 24, 3))
    """
    for place, part in list(places_of_tensors(batch)):
        layout = layouts.get(part.ndim) if type(part) is Tensor and part.is_floating_point() else None
        if layout is None or part.layout is not torch.strided or part.is_contiguous(memory_format=layout):
            continue
        try:
            batch = replace_part(batch, place, part.contiguous(memory_format=layout))
        except ValueError:  # the first convolution will do it
            return batch
    return batch


@dataclass
class Laid:
    """What belongs to a run.

    Attributes:
        weights: The parameters whose layout was changed.
        layouts: The layout for tensors of each number of dimensions.
    """

    weights: list[nn.Parameter] = field(default_factory=list)
    layouts: dict[int, torch.memory_format] = field(default_factory=dict)


class ChannelsLast(BatchTrick):
    """Trains convolutions, in two and three dimensions, with channels last in memory.

    The weights are laid so when the fit begins, before DDP looks at them, and as they were at its end; training images
    are laid so behind augmentation and resizing. In validation the first convolution does it. Values, shapes,
    parameters and the meaning of checkpoints stay; sums are made in another order, so that results differ in the last
    digits.

    When not to use it: where nothing convolves, which it warns of. The gain depends on the network and the processor:
    measure it together with the precision that you train in. Networks of depthwise convolutions gain on a CPU in
    float32, and may be slower there in bfloat16, with this layout or without. Code that calls ``view`` on a network's
    images needs ``reshape`` or ``flatten`` in its place; torch says so at the first batch.

    Raises:
        MisconfigurationException: At fit start, if the strategy may split weights, or if ``training_step`` fetches its
            batches itself.

    Source:
        Georganas et al., arXiv:1808.05567.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ChannelsLast()])
    """

    run_as = Laid
    run: Laid
    batch_order = BatchOrder.MEMORY_FORMAT

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the module to be complete."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        require_whole(self, trainer, "weights")
        # After `configure_model` and the loading of weights, and before DDP takes down how gradients lie.
        Station.of(trainer.precision_plugin, "convert_module").join(self, self._convert)
        Station.of(trainer.strategy, "optimizer_state").join(self, self._state)

    def _convert(self, convert: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
        module = convert(module)
        found = {layout for one in module.modules() if (layout := format_of(one))}
        if not found:
            rank_zero_warn(f"{self.name} finds no convolution in {type(module).__name__}, and does nothing. Remove it.")
        self.run.layouts = {dimensions: layout for dimensions, layout in LAYOUTS.items() if layout in found}
        self.run.weights += make_channels_last(module)
        return module

    def _state(self, state: Callable[[Optimizer], dict[str, Any]], optimizer: Optimizer) -> dict[str, Any]:
        """Return what a checkpoint is to hold: a fused step in a run without this trick needs the usual layout."""
        return contiguous_state(optimizer, state(optimizer), self.run.weights)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay the optimizers' state, which a checkpoint may have brought, as the weights."""
        super().on_train_start(trainer, pl_module)
        self._match(trainer)

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Lay the images."""
        return with_channels_last(batch, self.run.layouts)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay the weights as they were."""
        Station.of(trainer.precision_plugin, "convert_module").leave(self)
        Station.of(trainer.strategy, "optimizer_state").leave(self)
        if self.run.weights:
            make_contiguous(self.run.weights)
            self._match(trainer)
        super().undo(trainer, pl_module)

    def _match(self, trainer: Trainer) -> None:
        for optimizer in raw_optimizers(trainer):
            match_state(optimizer)
