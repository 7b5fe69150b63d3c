"""Whether a model takes images of other sizes, tried on a copy of it before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_speedups.attach.batches import BatchTrick, rest_of_pipeline
from lightning_speedups.attach.rehearsal import rehearsal
from lightning_speedups.core.resizing import Size

ANY_SIZE = (
    "Make it take any size (timm's vision transformers: `dynamic_img_size=True`; convolutional networks: "
    "`nn.AdaptiveAvgPool2d` before the classifier), or give sizes that it takes, with `start=`, `stages=` or a "
    "`multiple=` of its patch size or total stride."
)


def try_sizes(
    trainer: Any, trick: BatchTrick, full: Size, sizes: Sequence[Size], resized: Callable[[Size], Any]
) -> None:
    """Refuse a model that takes full images, but not those of other sizes.

    Args:
        trainer: A fitting Trainer.
        trick: Who resizes.
        full: The full size.
        sizes: Those to come, the smallest first.
        resized: Returns the batch at a size.

    Raises:
        MisconfigurationException: If the model does not take one of them.
        NoCopyError: If nothing can be tried; the message says why.
    """
    smaller = [size for size in sizes if size != full]
    # Two neighbours show what the model wants sides to be multiples of.
    chosen = sorted({*smaller[:2], *smaller[len(smaller) // 2 :][:1], *smaller[-1:]})
    if not chosen:
        return
    with rehearsal(trainer, trainer.lightning_module) as (_, step):

        def failure(size: Size) -> Exception | None:
            try:
                step(rest_of_pipeline(trainer, trick, resized(size)))
            except Exception as error:
                return error
            return None

        for size in chosen:
            error = failure(size)
            if error is not None and failure(full) is None:  # else the first step will say what is wrong
                maps, _ = trick.left_behind(trainer, resized(full))
                rest = f", while what is at {', '.join(map(repr, maps))} keeps its size" if maps else ""
                raise trick.refusal(
                    f"needs a model for more than one size, but {type(trainer.lightning_module).__name__} takes images "
                    f"of {full[0]} × {full[1]} pixels and not of {size[0]} × {size[1]}{rest} "
                    f"({str(error) or repr(error)})",
                    trick.naming(maps) if maps else ANY_SIZE,
                ) from error
