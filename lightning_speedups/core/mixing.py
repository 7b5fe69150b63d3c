"""Mixing the samples of a batch: λ, partners, boxes and mixed tensors.

Sources: mixup (Zhang et al., arXiv:1710.09412), CutMix (Yun et al., arXiv:1905.04899).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Box = tuple[int, int, int, int]
"""top, bottom, left, right in pixels, half-open."""
NO_BOX: Box = (0, 0, 0, 0)
Method = Literal["mixup", "cutmix", "both", "none"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """What was done to the samples of one batch.

    Args:
        method: ``"mixup"``, ``"cutmix"``, ``"both"`` (some samples by the one, some by the other) or ``"none"``.
        lam: λ, the share that a sample kept of itself: float32, ``(1,)`` for the whole batch or ``(N,)``, on the
            inputs' device. None where nothing was mixed.
        partner: Whom each sample was mixed with: int64, ``(N,)``, on the inputs' device. None where nothing was mixed.
        boxes: What CutMix pasted, one box for the whole batch or one for each sample (an empty one where nothing was
            pasted), in pixels of the first input. ``()`` without CutMix.
        frame: Height and width of the first input, which the boxes refer to. None without CutMix.

    Example:
        >>> Mixture("none").lam is None
        True
    """

    method: Method
    lam: Tensor | None = None
    partner: Tensor | None = None
    boxes: tuple[Box, ...] = ()
    frame: tuple[int, int] | None = None


def draw_mixture(
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    alpha: float,
    cutmix_alpha: float,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    per_element: bool = False,
    device: torch.device | str = "cpu",
) -> Mixture:
    """Draw how a batch is mixed.

    Args:
        shape: Shape of the inputs, ``(N, ...)``; CutMix cuts along the last two dimensions.
        generator: Source of randomness, on the CPU.
        alpha: Concentration of mixup's λ; 0 for no mixup.
        cutmix_alpha: Concentration of CutMix's λ; 0 for no CutMix.
        prob: Probability to mix at all.
        switch_prob: Probability of CutMix where both alphas are above 0.
        per_element: Draw λ and method for each sample instead of once for the batch.
        device: Where λ and the partners are to be.

    Example:
        >>> mixture = draw_mixture((2, 3, 8, 8), torch.Generator().manual_seed(0), alpha=0.4, cutmix_alpha=0.0)
        >>> mixture.method, mixture.lam.shape, sorted(mixture.partner.tolist())
        ('mixup', torch.Size([1]), [0, 1])
    """
    if alpha == cutmix_alpha == 0:
        return Mixture("none")
    share_of_cuts = switch_prob if alpha > 0 and cutmix_alpha > 0 else float(cutmix_alpha > 0)
    partner = torch.randperm(shape[0], generator=generator)
    ways = _draw_ways(shape[0] if per_element else 1, prob, share_of_cuts, generator)
    methods = set(ways) - {"none"}
    if not methods:
        return Mixture("none")
    frame = (int(shape[-2]), int(shape[-1])) if "cutmix" in methods else None
    kept, boxes = _draw_shares(ways, {"mixup": alpha, "cutmix": cutmix_alpha}, frame or (0, 0), generator)
    if not frame and all(share == 1 for share in kept):
        return Mixture("none")
    lam = torch.tensor(kept)
    if 1.0 in kept:  # what keeps all of itself takes nothing of another, be it infinite
        partner = torch.where(lam == 1, torch.arange(shape[0]), partner)
    return Mixture(
        "both" if len(methods) > 1 else methods.pop(),
        (complementary(lam) if frame else lam).to(device, non_blocking=True),
        partner.to(device, non_blocking=True),
        tuple(boxes) if frame else (),
        frame,
    )


def _draw_ways(size: int, prob: float, share_of_cuts: float, generator: torch.Generator) -> list[Method]:
    """Draw how each sample, or the batch, is mixed, if at all."""
    # Numbers rather than tensors: in the common case there is one of each.
    drawn = torch.rand(2, size, generator=generator).T.tolist()
    return ["none" if mix >= prob else "cutmix" if switch < share_of_cuts else "mixup" for mix, switch in drawn]


def _draw_shares(
    ways: Sequence[Method], alphas: Mapping[Method, float], frame: tuple[int, int], generator: torch.Generator
) -> tuple[list[float], list[Box]]:
    """Draw what share each sample keeps of itself, and the box that is pasted into it."""
    drawn = {way: draw_lambda(alpha, len(ways), generator).tolist() for way, alpha in alphas.items() if way in ways}
    kept, boxes = [1.0] * len(ways), [NO_BOX] * len(ways)
    for i, way in enumerate(ways):
        if way == "mixup":
            kept[i] = drawn[way][i]
        elif way == "cutmix":
            boxes[i] = cut_box(*frame, drawn[way][i], generator)
            kept[i] = kept_share(boxes[i], *frame)
        if kept[i] == 0:  # exchanged for its partner, which leaves it as pure as it was
            kept[i], boxes[i] = 1.0, NO_BOX
    return kept, boxes


def mix_values(values: Tensor, mixture: Mixture, *, cut: bool = True) -> Tensor:
    """Do to a tensor what a mixture says: blend it, paste boxes into it, or both.

    Args:
        values: ``(N, ...)``, for boxes ``(N, ..., H, W)``; they are scaled where its H and W are not the mixture's.
        mixture: What to do.
        cut: Whether boxes are pasted. False: the samples with one are blended by the share that it leaves.

    Returns:
        A new tensor of the same shape, type and memory format; the tensor itself where nothing is mixed.

    Example:
        >>> mixture = Mixture("mixup", torch.tensor([0.75]), torch.tensor([1, 0]))
        >>> mix_values(torch.tensor([0.0, 8.0]), mixture)
        tensor([2., 6.])
    """
    if mixture.lam is None or mixture.partner is None:
        return values
    if not (cut and mixture.boxes):
        return blend(values, mixture.partner, mixture.lam)
    mixed = blend(values, mixture.partner, blended_share(mixture)) if mixture.method == "both" else values
    return paste(mixed, values, mixture.partner, boxes_in(mixture, values.shape))


def blended_share(mixture: Mixture) -> Tensor:
    """Return the share of itself that a sample keeps where it is blended: λ, but 1 where a box is pasted instead.

    Args:
        mixture: One that mixes.

    Example:
        >>> lam, partner = torch.tensor([0.75, 0.5]), torch.tensor([1, 0])
        >>> blended_share(Mixture("both", lam, partner, ((0, 2, 0, 1), (0, 0, 0, 0)), (2, 2)))
        tensor([1.0000, 0.5000])
    """
    assert mixture.lam is not None
    pasted = [bottom > top and right > left for top, bottom, left, right in mixture.boxes]
    if not any(pasted):
        return mixture.lam
    return mixture.lam.masked_fill(torch.tensor(pasted).to(mixture.lam.device, non_blocking=True), 1.0)


def boxes_in(mixture: Mixture, shape: Sequence[int]) -> list[Box]:
    """Return a mixture's boxes in pixels of a tensor that may be larger or smaller than the first input.

    Args:
        mixture: One with boxes.
        shape: ``(..., H, W)``.

    Example:
        >>> boxes_in(Mixture("cutmix", boxes=((0, 4, 2, 7),), frame=(8, 8)), (5, 4, 4))
        [(0, 2, 1, 4)]
    """
    assert mixture.frame is not None
    (height, width), (rows, columns) = mixture.frame, shape[-2:]

    def scaled(start: int, stop: int, size: int, new: int) -> tuple[int, int]:
        return (2 * start * new + size) // (2 * size), (2 * stop * new + size) // (2 * size)  # rounded

    return [
        (*scaled(top, bottom, height, rows), *scaled(left, right, width, columns))
        for top, bottom, left, right in mixture.boxes
    ]


def draw_lambda(alpha: float, size: int, generator: torch.Generator) -> Tensor:
    """Draw λ ~ Beta(alpha, alpha).

    Args:
        alpha: Concentration, above 0; small values keep most samples nearly pure, 1 is uniform.
        size: How many to draw.
        generator: Source of randomness, on the CPU.

    Returns:
        float32, ``(size,)``, in [0, 1], and such that λ and 1 − λ are both exact.

    Example:
        >>> lam = draw_lambda(0.2, 4, torch.Generator().manual_seed(0))
        >>> lam.shape, bool(((lam >= 0) & (lam <= 1)).all())
        (torch.Size([4]), True)
    """
    # torch.distributions.Beta draws from this same operator but takes no generator.
    pair = torch._sample_dirichlet(torch.full((size, 2), alpha, dtype=torch.float64), generator=generator)
    if alpha < 0.01:  # where both parts underflow torch says one half, but λ is 0 or 1
        pair = torch.where(pair == 0.5, torch.rand(size, 1, generator=generator).round(), pair)
    return complementary(pair[:, 0].float())


def complementary(lam: Tensor) -> Tensor:
    """Round λ so that λ and 1 − λ are both exact, and it makes no difference which of the two a loss starts from.

    Args:
        lam: Floating point, in [0, 1].

    Example:
        >>> lam = complementary(torch.tensor(0.3))
        >>> bool(1 - (1 - lam) == lam)
        True
    """
    return 1 - (1 - lam)


def cut_box(height: int, width: int, lam: float, generator: torch.Generator) -> Box:
    """Draw the box that CutMix pastes: sides √(1−λ) of the image's, uniform centre, clipped at the border.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        lam: The share of the image to keep, in [0, 1].
        generator: Source of randomness, on the CPU.

    Returns:
        top, bottom, left, right in pixels, half-open.

    Example:
        >>> top, bottom, left, right = cut_box(8, 8, 1.0, torch.Generator().manual_seed(0))
        >>> bottom - top, right - left
        (0, 0)
    """
    side = math.sqrt(1.0 - lam)
    cut_h, cut_w = int(height * side), int(width * side)
    row, column = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    top, left = int(row * height) - cut_h // 2, int(column * width) - cut_w // 2
    return max(top, 0), min(top + cut_h, height), max(left, 0), min(left + cut_w, width)


def kept_share(box: Box, height: int, width: int) -> float:
    """Return the share of the image that a pasted box leaves: 1 − box / (H·W).

    Args:
        box: top, bottom, left, right in pixels.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Example:
        >>> kept_share((0, 2, 0, 4), 4, 4)
        0.5
    """
    top, bottom, left, right = box
    return 1.0 - (bottom - top) * (right - left) / (height * width)


def blend(values: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """Mix each sample with its partner: ``λ·x[i] + (1 − λ)·x[partner[i]]``.

    Args:
        values: ``(N, ...)``; integers are rounded back to their type, half precision is mixed in float32.
        partner: int64, ``(N,)``, on the same device.
        lam: float32, ``(N,)`` in [0, 1], or ``(1,)`` between 0 and 1 (a mixture with one of these is none), on the
            same device.

    Returns:
        A new tensor of the same shape and type.

    Example:
        >>> blend(torch.tensor([[0.0], [8.0]]), torch.tensor([1, 0]), torch.tensor([0.75]))
        tensor([[2.],
                [6.]])
    """
    wide = values.dtype if values.dtype in (torch.float32, torch.float64) else torch.float32
    share = lam.to(wide).view(-1, *[1] * (values.ndim - 1))
    own, other = values.to(wide), values[partner].to(wide)
    if len(lam) == 1:  # not `lerp`, which makes NaN of two infinities
        mixed = other.mul_(1 - share).addcmul_(own, share)
    else:  # a share of 0 is nothing, also of what is infinite
        mixed = torch.addcmul(other * (1 - share), own, share).where(share > 0, other).where(share < 1, own)
    if not values.is_floating_point():
        mixed = mixed.round()
    return mixed.to(values.dtype)


def paste(images: Tensor, source: Tensor, partner: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Paste into each image the same region of its partner.

    Args:
        images: ``(N, ..., H, W)``.
        source: Where the partners are taken from, of the same shape.
        partner: int64, ``(N,)``, on the same device.
        boxes: One box for the whole batch, or one for each image.

    Returns:
        A new tensor.

    Example:
        >>> x = torch.tensor([[[1, 1]], [[2, 2]]])
        >>> paste(x, x, torch.tensor([1, 0]), [(0, 1, 0, 1)]).tolist()
        [[[2, 1]], [[1, 2]]]
    """
    if len(boxes) == 1:
        ((top, bottom, left, right),) = boxes
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = source[..., top:bottom, left:right][partner]
        return mixed
    # One mask for all: a copy for each image would be as many kernels.
    edges = torch.tensor(boxes).to(images.device, non_blocking=True).view(-1, 4, *[1] * (images.ndim - 1))
    tops, bottoms, lefts, rights = edges.unbind(1)
    rows = torch.arange(images.shape[-2], device=images.device).unsqueeze(1)
    columns = torch.arange(images.shape[-1], device=images.device)
    inside = (rows >= tops) & (rows < bottoms) & (columns >= lefts) & (columns < rights)
    return torch.where(inside, source[partner], images)
