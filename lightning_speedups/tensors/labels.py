"""Class labels that stay labels for everything but the loss, which reads them as a mixture of two classes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_speedups.core.mixing import Mixture, blended_share, boxes_in, mix_values, paste
from lightning_speedups.tensors.reads import WRITES, OneOfTwo, Reads, call_plain, follow, on_part


class MixedLabels(OneOfTwo):
    """Integer labels in which each sample belongs to two classes by shares.

    They *are* the dominant labels: they index, compare and go into metrics as a plain integer tensor. Only
    ``F.cross_entropy``, ``F.nll_loss``, ``F.one_hot`` (and so ``nn.CrossEntropyLoss``, ``nn.NLLLoss`` and this
    package's losses) read the mixture; the losses of numbers (``F.binary_cross_entropy``, with logits or not,
    ``F.mse_loss``, ``F.l1_loss``, ``F.smooth_l1_loss``, ``F.huber_loss``) read the blend of both labels. Selecting,
    joining, reshaping, casting to another number type and moving keep the mixture; writing into it is refused, as it
    would change one label of two; any other operation gives plain tensors.

    Make them with [mix][lightning_speedups.tensors.labels.MixedLabels.mix].

    Attributes:
        reads: Where reads are counted.
    """

    _other: Tensor
    _share: Tensor

    @staticmethod
    def mix(first: Tensor, second: Tensor, lam: Tensor, reads: Reads | None = None) -> MixedLabels:
        """Mix two sets of labels: ``λ·one_hot(first) + (1 − λ)·one_hot(second)``.

        Args:
            first: Integer labels, ``(N, ...)``.
            second: Labels of the partners, same shape, type and device.
            lam: Share of ``first``, in [0, 1], broadcastable to ``first`` from the left: ``(N,)`` or ``(1,)``.
            reads: Where reads are counted; its own when None.

        Example:
            >>> labels = MixedLabels.mix(torch.tensor([0, 2]), torch.tensor([2, 0]), torch.tensor([0.75]))
            >>> labels.tolist(), F.one_hot(labels, 3).tolist()
            ([0, 2], [[0.75, 0.0, 0.25], [0.25, 0.0, 0.75]])
        """
        rest = 1 - lam.view(-1, *[1] * (first.ndim - 1))
        lam = 1 - rest  # both are exact, as `complementary` says
        leads = lam >= 0.5
        share = torch.maximum(lam, rest).expand(first.shape).contiguous()  # as the labels are, so that `view` works
        return _wrap(torch.where(leads, first, second), torch.where(leads, second, first), share, reads or Reads())

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return plain tensors: the dominant labels, the others, and the share of the dominant; no loss has read them.

        Example:
            >>> labels = MixedLabels.mix(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.25]))
            >>> [part.tolist() for part in labels.parts()]
            [[2], [0], [0.75]]
        """
        return self._labels, self._other, self._share

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Send losses to the mixture, shape operations to all its parts, and everything else to the plain labels."""
        if func.__name__ == "__get__" and not isinstance(found := func(args[0]._labels), Tensor):
            return found  # a property such as `shape`, which is often asked for
        kwargs = kwargs or {}
        if func in _READS_MIXTURE:
            return _READS_MIXTURE[func](*args, **kwargs)
        if func in _READS_BLEND:
            return func(*tree_map_only(MixedLabels, _blended, args), **tree_map_only(MixedLabels, _blended, kwargs))
        if func.__name__ in WRITES and args and isinstance(args[0], MixedLabels):
            raise ValueError(
                f"`{func.__name__}` would change mixed labels in place, but only the dominant one of each two. Change"
                ' them in the dataset or the transfer hooks, or use MixupCallback(targets="soft", num_classes=...).'
            )
        if func in _KEEPS_MIXTURE and (mixed := _all_mixed(args, kwargs)) is not None:
            if OneOfTwo in types:
                mixed.reads.selections += [one._labels for one in tree_leaves((args, kwargs)) if type(one) is OneOfTwo]
            labels, other = (on_part(part, func, args, kwargs) for part in ("_labels", "_other"))
            share = mixed._share if func in _CASTS else on_part("_share", func, args, kwargs)
            return tree_map(partial(_wrap_result, func, mixed), labels, other, share)
        return call_plain(func, args, kwargs)


class BlendedTargets(OneOfTwo):
    """Floating-point targets that were blended, and are plain tensors, but tell when a loss takes them for classes.

    Half of class 0 and half of class 2 is no class 1: where they are cast to whole numbers, or their largest class is
    taken, the result is followed as [OneOfTwo][lightning_speedups.tensors.reads.OneOfTwo] is.
    """

    @staticmethod
    def of(blended: Tensor, reads: Reads) -> Tensor:
        """Mark targets; those that are whole numbers are no blends, and handed back.

        Args:
            blended: The targets, plain.
            reads: Who is told.

        Example:
            >>> reads = Reads(follows=True)
            >>> targets = BlendedTargets.of(torch.tensor([1.5]), reads)
            >>> scores = torch.zeros(1, 3, requires_grad=True)
            >>> ((scores.sum(1) - targets) ** 2).sum().backward(), reads.misread
            (None, [])
            >>> F.cross_entropy(scores, targets.long()).backward(), reads.misread
            (None, ['cross_entropy'])
        """
        if torch.equal(blended, blended.ceil()):
            return blended
        marked = blended.as_subclass(BlendedTargets)
        marked._labels, marked.reads = blended, reads
        return marked

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute on the plain tensor, and see what gives whole numbers."""
        plain, by_name = tree_map_only(BlendedTargets, attrgetter("_labels"), (args, kwargs or {}))
        result = func(*plain, **by_name)
        watched = func in _KEEPS_MIXTURE or func.__name__ == "argmax"
        if torch.compiler.is_compiling() or not (watched and args and isinstance(args[0], BlendedTargets)):
            return result
        return tree_map_only(Tensor, partial(_mark_result, func, args[0]), result)


def mix_targets(targets: Tensor, mixture: Mixture) -> Tensor:
    """Mix targets as their samples were mixed.

    Integers become mixed labels, floating-point targets are blended. What has three dimensions or more is a map
    ``(N, ..., H, W)``: where CutMix pasted a box into the sample it is pasted into the map, at the map's own size.

    Args:
        targets: ``(N, ...)``.
        mixture: What was done to the samples.

    Returns:
        A new tensor; plain integers where nothing was blended; the targets themselves where nothing was mixed.

    Example:
        >>> mixture = Mixture("mixup", torch.tensor([0.75]), torch.tensor([1, 0]))
        >>> F.one_hot(mix_targets(torch.tensor([0, 1]), mixture)).tolist()
        [[0.75, 0.25], [0.25, 0.75]]
    """
    if mixture.lam is None or mixture.partner is None:
        return targets
    is_map = targets.ndim >= 3
    if targets.is_floating_point():
        return mix_values(targets, mixture, cut=is_map)
    lam, own = mixture.lam, targets
    if is_map and mixture.boxes:
        own = paste(targets, targets, mixture.partner, boxes_in(mixture, targets.shape))
        if mixture.method == "cutmix":
            return own
        lam = blended_share(mixture)
    return MixedLabels.mix(own, targets[mixture.partner], lam)


def soft_targets(labels: Tensor, num_classes: int, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Turn labels, plain or mixed, into class probabilities.

    Args:
        labels: Integer labels, ``(N, ...)``, or a single one, ``()``.
        num_classes: C.
        ignore_index: This label carries no probability.

    Returns:
        Probabilities, float32, ``(N, C, ...)`` or ``(C,)``, and their sum over the classes, shaped like the labels: 1
        where nothing is ignored, the share of the other label where one of two is, 0 where both are.

    Example:
        >>> soft_targets(torch.tensor([1, -100]), 2)
        (tensor([[0., 1.],
                [0., 0.]]), tensor([1., 0.]))
    """
    dim = min(labels.ndim, 1)
    size = (*labels.shape[:dim], num_classes, *labels.shape[dim:])
    if not isinstance(labels, MixedLabels):
        classes, ignored = _classes(labels, ignore_index)
        mass = (~ignored).float()
        return _put(mass.new_zeros(size), dim, classes, mass), mass
    labels.reads.count += 1
    classes, ignored = _classes(labels._labels, ignore_index)
    others, other_ignored = _classes(labels._other, ignore_index)
    share = labels._share.masked_fill(ignored, 0.0)
    share_other = (1 - labels._share).masked_fill(other_ignored, 0.0)
    soft = _put(share.new_zeros(size), dim, others, share_other)
    # The dominant class is written last: it may be the other one as well.
    return _put(soft, dim, classes, torch.where(classes == others, share + share_other, share)), share + share_other


def smooth_targets(targets: Tensor, mass: Tensor, smoothing: float | Tensor) -> Tensor:
    """Move the share ε of each target's probability from where it is to all classes evenly.

    With one ε for each class, what class c has gives ε_c of itself: ``t' = Σ_c t_c ((1 − ε_c) e_c + ε_c / C)``.

    Args:
        targets: Class probabilities, ``(N, C, ...)`` or ``(C,)``.
        mass: Their sums over the classes, ``(N, ...)`` or ``()``: what is ignored gets nothing.
        smoothing: ε in [0, 1), a number or a tensor without dimensions; or one for each class, ``(C,)``.

    Example:
        >>> smooth_targets(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]), 0.2)
        tensor([[0.9000, 0.1000],
                [0.0000, 0.0000]])
    """
    dim = min(mass.ndim, 1)
    if isinstance(smoothing, Tensor) and smoothing.ndim:
        smoothing = smoothing.view(-1, *[1] * (targets.ndim - 2))
        return targets * (1 - smoothing) + (targets * smoothing).sum(dim, keepdim=True) / targets.shape[dim]
    return targets * (1 - smoothing) + mass.unsqueeze(dim) * (smoothing / targets.shape[dim])


def shielded(scores: Tensor, targets: Tensor) -> Tensor:
    """Return scores, or log-probabilities, in which nothing is infinite or NaN that no probability falls on.

    A loss multiplies each class's probability with a logarithm, and nothing times infinity is NaN. Classes of score −∞
    get one so low that the softmax stays as it was; scores of a target without any probability become all the same.

    Args:
        scores: ``(N, C, ...)`` or ``(C,)``.
        targets: Class probabilities, of the same shape.

    Example:
        >>> scores, targets = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[1.0, 0.0]])
        >>> F.cross_entropy(scores, targets), F.cross_entropy(shielded(scores, targets), targets)
        (tensor(nan), tensor(-0.))
    """
    empty = targets == 0
    without_target = empty.all(min(scores.ndim - 1, 1), keepdim=True)
    return scores.masked_fill(empty & (scores.isneginf() | without_target), torch.finfo(scores.dtype).min / 2)


def label_weights(labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return how much each plain label counts in a mean: its class's weight, or nothing where it is ignored.

    Args:
        labels: Integer labels, ``(N, ...)``.
        weight: Class weights, ``(C,)``, or None for ones.
        ignore_index: This label does not count.

    Returns:
        ``(N, ...)``; whether it counts at all without class weights.

    Example:
        >>> label_weights(torch.tensor([1, -100]), torch.tensor([0.5, 2.0]), -100)
        tensor([2., 0.])
    """
    classes, ignored = _classes(labels, ignore_index)
    return ~ignored if weight is None else weight[classes].masked_fill(ignored, 0.0)


def _classes(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return indices, 0 for what is ignored, and what that is."""
    labels = labels.long()  # a byte never equals -100, or does so for the wrong reason
    ignored = labels == ignore_index
    return labels.masked_fill(ignored, 0), ignored


def _put(soft: Tensor, dim: int, classes: Tensor, mass: Tensor) -> Tensor:
    """Write each label's probability to its class; a class that is not there is told, but on a CPU only."""
    try:
        return soft.scatter_(dim, classes.unsqueeze(dim), mass.unsqueeze(dim))
    except RuntimeError as error:
        wrong = classes[(classes < 0) | (classes >= soft.shape[dim])]
        if not len(wrong):
            raise
        raise ValueError(
            f"Expected class labels from 0 to {soft.shape[dim] - 1}, or the `ignore_index`, but got {wrong[0]}."
        ) from error


def _wrap(labels: Tensor, other: Tensor, share: Tensor, reads: Reads) -> MixedLabels:
    mixed = labels.as_subclass(MixedLabels)
    # The plain tensors beside it: torch.compile cannot strip a subclass, but it can read an attribute.
    mixed._labels, mixed._other, mixed._share, mixed.reads = labels, other, share, reads
    return mixed


def _wrap_result(func: Callable[..., Any], mixed: MixedLabels, labels: Any, other: Any, share: Any) -> Any:
    """Wrap what came of the three parts; what is no number any more is handed out as it is."""
    if not isinstance(labels, Tensor):
        return labels
    if labels.dtype == torch.bool:
        return labels if torch.compiler.is_compiling() else follow(func, (mixed,), other, labels)
    return _wrap(labels, other, share.to(labels.device), mixed.reads)


def _mark_result(func: Callable[..., Any], source: BlendedTargets, result: Tensor) -> Tensor:
    """Go on watching what is blended, and follow classes."""
    if result.is_floating_point():
        return BlendedTargets.of(result, source.reads)
    return result if result.dtype == torch.bool else follow(func, (source,), None, result)


def _all_mixed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> MixedLabels | None:
    """Return the mixed labels that an operation works on (``input``, or all of a list), or None if there is another."""
    operand = args[0] if args else kwargs.get("input", kwargs.get("tensors"))
    operands = list(operand) if isinstance(operand, (tuple, list)) else [operand]
    return operands[0] if operands and all(isinstance(one, MixedLabels) for one in operands) else None


def _blended(labels: MixedLabels) -> Tensor:
    """Return the blend of both labels, floating point."""
    labels.reads.count += 1
    own, other, share = labels.parts()
    wide = torch.promote_types(own.dtype, torch.float32)
    mixed = torch.lerp(other.to(wide), own.to(wide), share.to(wide))
    return mixed.to(own.dtype) if own.is_floating_point() else mixed


def _mixed_loss(
    loss: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute a loss with the mixture as soft target; the mean is over the targets that are not ignored."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    soft, mass = soft_targets(target, input.shape[min(target.ndim, 1)], ignore_index)
    if label_smoothing > 0.0:  # here, not in torch, which would smooth ignored samples as well
        soft = smooth_targets(soft, mass, label_smoothing)
    result = loss(shielded(input, soft), soft, weight, reduction="sum" if reduction == "mean" else reduction)
    return result / mass.sum() if reduction == "mean" else result


def _soft_nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Compute F.nll_loss of log-probabilities and soft targets; the cross-entropy of the scores behind them."""
    if weight is not None:
        target = target * weight.view(-1, *[1] * (input.ndim - 2))
    loss = -(input * target)
    return loss.sum(min(input.ndim - 1, 1)) if reduction == "none" else loss.sum()


def _mixed_one_hot(input: MixedLabels, num_classes: int = -1) -> Tensor:
    """Compute F.one_hot as float shares, ``(N, ..., C)``."""
    # torchmetrics makes its targets one-hot to count hits: there the dominant label is meant.
    if not torch.compiler.is_compiling() and _caller().startswith("torchmetrics"):
        return F.one_hot(input._labels, num_classes)
    if num_classes == -1:
        num_classes = int(torch.maximum(input._labels.max(), input._other.max())) + 1
    return soft_targets(input, num_classes)[0].movedim(min(input.ndim, 1), -1)


def _caller() -> str:
    """Return the name of the module that called the function which came here through ``__torch_function__``."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:  # one for each mode
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


_READS_MIXTURE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: partial(_mixed_loss, F.cross_entropy),
    F.nll_loss: partial(_mixed_loss, _soft_nll_loss),
    F.one_hot: _mixed_one_hot,
    Tensor.__iter__: lambda labels: iter(labels.unbind()),  # for a loss of each sample apart
}
_READS_BLEND = {
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss,
}  # fmt: skip
_CASTS = {Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.type, Tensor.type_as, Tensor.byte, Tensor.char, Tensor.short}
_CASTS |= {Tensor.long, Tensor.int, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
_KEEPS_MIXTURE = _CASTS | {
    Tensor.__getitem__, torch.cat, torch.stack,
    *(getattr(owner, name) for owner in (Tensor, torch) for name in (
        "reshape", "flatten", "ravel", "squeeze", "unsqueeze", "clone", "permute", "transpose", "flip", "roll",
        "index_select", "repeat_interleave", "chunk", "split", "unbind", "detach", "masked_select",
    )),
    *(getattr(Tensor, name) for name in ("view", "contiguous", "repeat", "expand")),
}  # fmt: skip
