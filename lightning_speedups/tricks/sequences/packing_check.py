"""Refuses modules that let packed sequences see each other (packing: Krell et al., arXiv:2107.02027)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_speedups.attach.batches import BatchOrder, BatchTrick
from lightning_speedups.attach.copies import NoCopyError
from lightning_speedups.attach.rehearsal import rehearsal
from lightning_speedups.core.packing import with_other_neighbours

CHECKED = (0, 10)
"""Batches of a fit that are tried: in the first one attention may do nothing yet, where projections begin at zero."""
TOLERANCE = 1e-5
"""Relative difference of the two losses; where sequences are kept apart, masked scores add exactly nothing."""


@dataclass
class Run:
    """What belongs to a run.

    Attributes:
        batches: How many it has seen.
    """

    batches: int = 0


class PackingCheck(BatchTrick):
    """Refuses a module whose loss on one packed sequence changes with the tokens of the others in its row.

    Such a module attends across sequences that have nothing to do with each other, trains all the same, and gets worse
    without a sign. In the first batch of a fit and in the tenth after it, ``training_step`` runs four times on a copy
    of the module that shares its parameters, in evaluation mode, without logging, gradients or a change to random
    states: only the last sequence of a row has labels, and the tokens around it are others each time. The training
    itself is as without it. Batches that are not from ``pack`` are left alone, with an info message.

    When not to use it: where batches are not packed; where ``training_step`` does not take its targets from
    ``batch["labels"]``. Manual optimization and strategies that split the model cannot be checked; a warning says so.

    Raises:
        MisconfigurationException: In a batch that is checked, if the module does not keep sequences apart.

    Source:
        Krell et al., arXiv:2107.02027.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PackingCheck()])  # beside DataLoader(texts, 64, collate_fn=pack(512))
    """

    batch_order = BatchOrder.CHECK
    run_as = Run
    run: Run

    def change_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
        """Try the batch, if it is its turn, and hand it on as it is."""
        self.run.batches += 1
        if self.run.batches - 1 in CHECKED:
            if isinstance(batch, Mapping) and {"input_ids", "labels", "segment_ids"} <= batch.keys():
                self.check(trainer, pl_module, batch)
            elif self.run.batches == 1:
                rank_zero_info(f"{self.name} does nothing: the first batch is not packed.")
        return batch

    def check(self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any]) -> None:
        """Refuse a module that does not keep the sequences of a batch apart."""
        losses = []
        for one in with_other_neighbours(batch):
            try:
                with rehearsal(trainer, pl_module) as (twin, step):  # one for each: both draw the same random numbers
                    twin.eval()
                    output = step(one)
            except NoCopyError as error:
                rank_zero_warn(f"{self.name} cannot check whether packed sequences are kept apart: {error}.")
                return
            loss = output.get("loss") if isinstance(output, Mapping) else output
            losses.append(math.nan if loss is None else float(loss))
        worst = max(losses, key=lambda loss: abs(loss - losses[0]), default=math.nan)
        if losses and abs(worst - losses[0]) > TOLERANCE * abs(losses[0]):
            raise self.refusal(
                f"found that {type(pl_module).__name__}.training_step lets packed sequences see each other: the loss "
                f"on one is {losses[0]:.6g}, and {worst:.6g} with other tokens around it",
                "Give attention `block_mask(batch['segment_ids'])` or `cu_seqlens`, and take targets from `labels`.",
            )
