"""The images of a batch as training_step will see them, drawn before the run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.batch import Place, check_place, check_places, get_part, say_places
from lightning_speedups.core.mixing import NO_BOX, Mixture
from lightning_speedups.tensors.labels import MixedLabels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 3  # classes in a title


class Mixes(Protocol):
    """A trick that mixes a batch without a Trainer."""

    def mix(self, batch: Any, generator: torch.Generator) -> tuple[Any, Mixture]:
        """Return the mixed batch and what was done to it."""


def plot_batch(
    batch: Any,
    trick: Mixes | None = None,
    *,
    count: int = 8,
    columns: int = 8,
    inputs: Place | list[Place] | None = None,
    labels: Place | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Figure:
    """Draw the images of a batch with their labels; with a trick, each row as it was and below as it is mixed.

    The trick, the batch and the global random numbers stay as they are.

    When not to use it: for what a run really drew, which ``MixupCallback.last`` says.

    Args:
        batch: A batch with images ``(N, C, H, W)`` or ``(N, H, W)``, as ``training_step`` gets it. Of one or two
            channels the first is drawn in grey, of three and more the first three as red, green and blue.
        trick: A ``MixupCallback``. None: draw the batch as it is.
        count: How many images at most, the first ones of the batch, 1 or more.
        columns: How many stand side by side, 1 or more.
        inputs: Where the images stand in the batch; of several the first. None: where the trick has its inputs, or 0.
        labels: Where the labels stand. None: where the trick has them, or 1 if there are any.
        mean: What a normalisation subtracted, for each channel or all, to be undone. Without ``mean`` and ``std``
            floating-point images are drawn from the batch's smallest to its largest value, unless all are in [0, 1].
        std: What it divided by, above 0. Neither is applied to images in bytes.
        class_names: The name of each class.
        seed: Seed of the trick's draws.

    Returns:
        The figure.

    Raises:
        ValueError: If an argument is out of range or the batch has no images there.

    Example:
        >>> from lightning_speedups import MixupCallback
        >>> batch = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> figure = plot_batch(batch, MixupCallback(alpha=1.0), class_names=["ant", "bee", "cat", "dog"])
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['ant', 'bee', 'cat', 'dog']
    """
    from matplotlib.figure import Figure

    check_number("count", count, 1, whole=True)
    check_number("columns", columns, 1, whole=True)
    check_number("seed", seed, whole=True)
    if trick is not None and not hasattr(trick, "mix"):
        raise ValueError(f"Expected `trick` to be a trick with a method `mix`, as MixupCallback, but got {trick!r}.")
    first, *_ = check_places("inputs", getattr(trick, "inputs", 0) if inputs is None else inputs)
    place = getattr(trick, "labels", 1) if labels is None else labels
    check_place("labels", place)

    versions: list[tuple[Any, Mixture]] = [(batch, Mixture("none"))]
    if trick is not None:
        versions.append(trick.mix(batch, torch.Generator().manual_seed(seed)))
    pictures = _pictures([_part(one, first, "inputs")[:count] for one, _ in versions], mean, std)
    try:
        named: list[Tensor | None] = [_part(one, place, "labels") for one, _ in versions]
    except ValueError:
        if trick is not None or labels is not None:
            raise
        named = [None]

    shown = pictures.shape[1]
    wide = min(columns, shown)
    high = -(-shown // wide) * len(versions)
    figure = Figure(figsize=(1.7 * wide, 2.1 * high), layout="constrained")
    for row, (start, version) in enumerate(itertools.product(range(0, shown, wide), range(len(versions)))):
        for i in range(start, min(start + wide, shown)):
            axes = figure.add_subplot(high, wide, 1 + row * wide + i - start)
            axes.imshow(pictures[version, i].numpy(), cmap="gray", vmin=0, vmax=1)
            parts = _share(versions[version][1], i), _name(named[version], i, class_names)
            axes.set_title("\n".join(filter(None, parts)), fontsize=8)
            axes.set_axis_off()
    return figure


def _part(batch: Any, place: Place, argument: str) -> Tensor:
    there = say_places(batch)
    try:
        part = get_part(batch, place)
    except LookupError as error:
        raise ValueError(f"plot_batch({argument}={place!r}): {error.args[0]}. Name the right place{there}.") from error
    if not isinstance(part, Tensor) or part.ndim == 0:
        found = f"expected a tensor, but found {type(part).__name__}"
        raise ValueError(f"plot_batch({argument}={place!r}) {found}. Name the right place{there}.")
    return part


def _pictures(
    versions: Sequence[Tensor], mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> Tensor:
    """Bring all versions of the images into [0, 1] in the same way: ``(V, n, H, W)`` or ``(V, n, H, W, 3)``."""
    first = versions[0]
    if first.ndim not in (3, 4) or first.numel() == 0:
        raise ValueError(f"Expected images (N, C, H, W) or (N, H, W), but got the shape {tuple(first.shape)}.")
    in_bytes, channels = first.dtype == torch.uint8, first.shape[1] if first.ndim == 4 else 1
    shift, scale = _per_channel("mean", mean, 0.0, channels), _per_channel("std", std, 1.0, channels)
    if (scale <= 0).any():
        raise ValueError(f"Expected `std` to be above 0, but got {std!r}.")
    images = torch.stack([one.detach().cpu().float() for one in versions])
    images = images.view(len(versions), len(first), channels, *first.shape[-2:])
    images = images / 255 if in_bytes else images * scale + shift
    low, high = images[0].aminmax()
    if mean is None and std is None and not in_bytes and (low < 0 or high > 1):
        images = (images - low) / (high - low).clamp_min(1e-12)
    return (images[:, :, :3].movedim(2, -1) if channels >= 3 else images[:, :, 0]).clamp(0, 1)


def _per_channel(name: str, given: float | Sequence[float] | None, default: float, channels: int) -> Tensor:
    values = torch.as_tensor(default if given is None else given, dtype=torch.float32).flatten()
    if len(values) not in (1, channels) or not values.isfinite().all():
        raise ValueError(f"Expected `{name}` to be a number or {channels} of them, one a channel, but got {given!r}.")
    return values.view(-1, 1, 1)


def _share(mixture: Mixture, i: int) -> str:
    if mixture.lam is None:
        return ""
    lam = float(mixture.lam[min(i, len(mixture.lam) - 1)])
    pasted = mixture.boxes and mixture.boxes[min(i, len(mixture.boxes) - 1)] != NO_BOX
    return f"{'cutmix' if pasted else 'mixup'} λ = {lam:.2f}" if lam < 1 else ""


def _name(labels: Tensor | None, i: int, class_names: Sequence[str] | None) -> str:
    def name(label: Any) -> str:
        return class_names[int(label)] if class_names and 0 <= label < len(class_names) else str(int(label))

    if labels is None or labels.ndim > 2:  # a map
        return ""
    if isinstance(labels, MixedLabels) and labels.ndim == 1:
        label, other, share = (part[i].item() for part in labels.parts())
        shares: dict[Any, float] = {label: share, other: 1 - share} if label != other else {label: 1.0}
    else:
        values = labels[i].detach().cpu().flatten().tolist()
        if not labels.is_floating_point():
            return ", ".join(name(label) for label in values[:NAMED])
        if labels.ndim == 1 or min(values) < 0 or max(values) > 1:
            return ", ".join(f"{value:.3g}" for value in values[:NAMED])
        shares = dict(enumerate(values))
    best = sorted(shares.items(), key=lambda one: -one[1])[:NAMED]
    return " + ".join(name(c) if share == 1 else f"{share:.0%} {name(c)}" for c, share in best if share >= 0.005)
