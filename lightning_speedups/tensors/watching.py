"""Whether the losses of a run see that their targets are mixed, and what to tell the user where they do not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_speedups.tensors.labels import BlendedTargets, MixedLabels
from lightning_speedups.tensors.reads import OneOfTwo, Reads


@dataclass
class Watch:
    """Judges each step of a run that has mixed targets.

    Each step is judged by what it reads and by what its loss depends on directly. What is computed from one of two
    targets is followed to the loss as well in the first mixed batch of an epoch and in the 1st, 2nd, 4th, 8th … of the
    run, as it costs a little for each function that is called on it.

    Attributes:
        batches: How many batches had mixed targets.
        epoch: The epoch of the last one.
        seen: What the step sees of its targets; None where that is not mixed, or not watched.
        is_right: Whether any step that was judged had no fault.
    """

    batches: int = 0
    epoch: int = -1
    seen: OneOfTwo | None = None
    is_right: bool = False

    def begin(self, targets: Tensor, epoch: int) -> Tensor:
        """Return the mixed targets of a batch as a step is to see them.

        Args:
            targets: Mixed labels, or floating point.
            epoch: The epoch.
        """
        self.batches += 1
        follows = epoch != self.epoch or self.batches & (self.batches - 1) == 0
        self.epoch, self.seen = epoch, None
        if follows and targets.is_floating_point():
            targets = BlendedTargets.of(targets, Reads())
        if isinstance(targets, OneOfTwo):
            self.seen, targets.reads.follows = targets, follows
        return targets

    def end(self) -> OneOfTwo | None:
        """Follow nothing any more; return what the step has seen of its targets, None where nothing is to be judged."""
        seen, self.seen = self.seen, None
        if seen is not None:
            seen.reads.close()
        return seen

    def fault(self, seen: OneOfTwo, step: str) -> tuple[str, str] | None:
        """Return what is wrong with the loss of a step, and the way out; None where it is right.

        A step that reads nothing is wrong as long as no earlier one was right: it may be one of several kinds.

        Args:
            seen: Its targets, after its backward pass.
            step: Its name.

        Example:
            >>> import torch
            >>> watch, scores = Watch(), torch.zeros(1, 3, requires_grad=True)
            >>> labels = watch.begin(MixedLabels.mix(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.75])), 0)
            >>> scores.gather(1, labels.unsqueeze(1)).sum().backward()
            >>> watch.fault(watch.end(), "training_step")[0].split(": ")[1]
            'its loss used the dominant labels only (through `gather`), which is the wrong target'
        """
        reads, are_labels = seen.reads, isinstance(seen, MixedLabels)
        through = " and ".join(f"`{name}`" for name in reads.misread)
        if not through and (reads.count or self.is_right or not are_labels):
            self.is_right = True
            return None
        if not are_labels:
            return (
                f"blended the targets, but {step} makes classes of them for its loss (through {through}), and half of "
                "class 0 with half of class 2 is no class 1",
                "Give class labels as integers (by `.long()` in the dataset or a transfer hook): these keep both.",
            )
        if not (through or reads.is_used):
            return (
                f"mixed the inputs, but {step} reads no labels at all",
                "Name the place of the labels with `labels=`. A step that learns without any mixes its inputs by "
                "itself: `draw_mixture` and `mix_values` in `lightning_speedups.core.mixing`.",
            )
        whose = f"a part of the loss in {step}" if reads.count else f"nothing in {step} read the mixed labels: its loss"
        return (
            f"mixed the inputs, but {whose} used the dominant labels only{through and f' (through {through})'}, which "
            "is the wrong target",
            "Use F.cross_entropy, F.nll_loss, F.one_hot or LabelSmoothingLoss on the labels as they come; for yes or "
            "no and for numbers F.binary_cross_entropy_with_logits or F.mse_loss on `labels.float()`; for other losses "
            'MixupCallback(targets="soft", num_classes=...), or labels that are floating point in the dataset.',
        )
