"""Each sample's own loss, read and weighted inside code that calls torch's losses, without a change to that code."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_speedups.core.batch import tensors_in
from lightning_speedups.tensors.labels import MixedLabels, label_weights, soft_targets


def mean_over_samples(losses: Tensor, weight: Tensor | None = None) -> Tensor:
    """Average a batch's losses, and show each of them to ``SubsetTraining``.

    For losses of your own, which torch's functions do not compute: end ``training_step`` with this instead of
    ``losses.mean()``. Without ``SubsetTraining`` it is that, or Σ w·l / Σ w with weights. With several losses in a
    step, each of them ends so: they add up.

    When not to use it: for a loss that compares samples with each other (contrastive ones, Dice of a whole batch),
    which has no value for each of them; ``SubsetTraining(method="random")`` needs none.

    Args:
        losses: ``(N, ...)``, the batch's samples first; or flattened to ``(N·T,)``, one sample's after the other's.
        weight: What each loss counts, 0 or more, in a shape that broadcasts to that of the losses, as a mask of what is
            no padding; None where all count 1. Where nothing counts the result is 0.

    Returns:
        A scalar.

    Example:
        Dice, one value a sample:

        >>> chances, masks = torch.tensor([[[0.5, 1.0]], [[0.0, 0.5]]]), torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
        >>> shared, sizes = (chances * masks).flatten(1).sum(1), (chances + masks).flatten(1).sum(1)
        >>> mean_over_samples(1 - 2 * shared / sizes)
        tensor(0.2381)

        Quantiles (pinball loss), ``(N, Q)``:

        >>> quantiles, forecasts = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 1.5]])
        >>> errors = torch.tensor([[3.0], [1.0]]) - forecasts
        >>> mean_over_samples(torch.maximum(quantiles * errors, (quantiles - 1) * errors))
        tensor(0.1583)

        Sequences with padding, ``(N, T)``:

        >>> mean_over_samples(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]))
        tensor(3.)
    """
    if has_torch_function_variadic(losses, weight):
        return handle_torch_function(mean_over_samples, (losses, weight), losses, weight=weight)
    if weight is None:
        return losses.mean()
    weight = weight.expand(losses.shape)
    total = weight.sum()
    return _weighted(losses, weight).sum() / torch.where(total > 0, total, 1)


class SampleLosses(TorchFunctionMode):
    """Reads the loss of each of a batch's samples from the losses that are computed under it, and may weigh them.

    It sees torch's cross-entropies, ``nll_loss``, ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``, ``huber_loss`` and
    ``kl_div`` from ``torch.nn.functional``, the modules that call them, and ``mean_over_samples``; of these the calls
    that training depends on (their result requires a gradient) with one loss for each sample, or several, along the
    first dimension. ``(N, T, C)`` scores and ``(N, T)`` targets may also come flattened to ``(N·T, C)`` and ``(N·T,)``,
    if one of them was under this; ``(T, N)`` flattened is not taken. Where N = T it may be either: that is taken of a
    part of the batch itself, in whose memory samples come first. A sample's loss is the mean of those of its targets
    that count: neither ignored, nor of weight 0. The losses of several calls add up.

    Without weights each call's result is untouched. With weights wᵢ a mean Σ lᵢ / Z becomes Σ wᵢ·lᵢ / Z, where Z is
    the call's own normaliser: class weights and ``ignore_index`` keep their meaning.

    Args:
        samples: N, how many samples the batch has.
        weights: ``(N,)``, on the losses' device; None for none.
        batch: What the code under it has of the batch: tensors, or containers of them.

    Attributes:
        losses: float32 ``(N,)``, detached; None as long as nothing was seen.

    Example:
        >>> scores, labels = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 1])
        >>> with SampleLosses(2, torch.tensor([3.0, 1.0])) as seen:
        ...     loss = F.cross_entropy(scores, labels)
        >>> print(f"{loss:.4f}", seen.losses)
        2.7726 tensor([1.3863, 1.3863])
    """

    def __init__(self, samples: int, weights: Tensor | None = None, batch: Any = None) -> None:
        super().__init__()
        self.samples, self.weights, self.batch = samples, weights, batch
        self.losses: Tensor | None = None
        self._flattened: Any = WeakTensorKeyDictionary()  # the shapes before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a loss once more, sample by sample; leave everything else alone."""
        if func in _LOSSES:
            return self._loss(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if func in _FLATTENS and args and result.ndim < args[0].ndim and not torch.compiler.is_compiling():
            shape = args[0].shape[: args[0].ndim - result.ndim + 1]  # of what became the first one
            if self.samples not in shape[1:] or self._is_of_batch(args[0]):
                self._flattened[result] = shape
        elif func in _KEEPS and (shape := self._flattened.get(args[0])) and not torch.compiler.is_compiling():
            self._flattened[result] = shape
        return result

    def _is_of_batch(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in the batch's memory, or a part of it, sample after sample."""
        with torch._C.DisableTorchFunction():
            ascends = tensor.stride(0) == max(tensor.stride())
            base = tensor if tensor._base is None else tensor._base
        return ascends and any(base is one or base is one._base for one in tensors_in(self.batch))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # runs between two graphs
    def _loss(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is F.l1_loss and (weight := _weight_of_l1_loss()) is not None:
            kwargs = {**kwargs, "weight": weight}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        call = dict(_LOSSES[func].bind(*args, **kwargs).arguments)
        if call.get("size_average") is not None or call.get("reduce") is not None:
            raise ValueError(f"Expected `reduction` for `{func.__name__}`, but got old `size_average` or `reduce`.")
        reduction = call.pop("reduction", "mean")
        if self.weights is None:
            result = func(*args, **kwargs)
            if result.requires_grad:
                with torch.no_grad():
                    self._take(result if reduction == "none" else _one_by_one(func, call), func, call)
            return result
        losses = _one_by_one(func, call)
        if not losses.requires_grad or not self._take(losses.detach(), func, call):
            return func(*args, **kwargs)
        each = self.weights.to(losses.dtype).repeat_interleave(len(losses) // self.samples)
        weighted = _weighted(losses, each.view(-1, *[1] * (losses.ndim - 1)))
        return weighted if reduction == "none" else weighted.sum() / _normaliser(func, call, reduction, losses)

    def _take(self, losses: Tensor, func: Callable[..., Any], call: dict[str, Any]) -> bool:
        if losses.ndim == 0 or (len(losses) != self.samples and not self._stand_together(losses, call)):
            return False
        own = losses.detach().float()  # a loss with reduction="none" comes with its graph
        if losses.shape != (self.samples,):
            counts = _counts(func, call, losses).reshape(self.samples, -1)
            own = own.reshape(self.samples, -1).sum(1) / counts.sum(1).clamp(min=1)
        self.losses = own if self.losses is None else self.losses + own
        return True

    def _stand_together(self, losses: Tensor, call: dict[str, Any]) -> bool:
        """Tell whether flattened losses are one sample's after the other's, by what they were before."""
        shapes = [self._flattened.get(given, ()) for given in call.values() if isinstance(given, Tensor)]
        return any(shape[:1] == (self.samples,) and math.prod(shape) == len(losses) for shape in shapes)


def _weight_of_l1_loss() -> Tensor | None:
    """Return the ``weight`` that torch's ``l1_loss`` was given, which since 2.14 it does not hand on to a mode."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weight")


def _weighted(losses: Tensor, weight: Tensor) -> Tensor:
    return losses.masked_fill(weight == 0, 0) * weight  # an infinite loss, too, counts nothing then


def _one_by_one(func: Callable[..., Any], call: dict[str, Any]) -> Any:
    if func is not mean_over_samples:
        return func(**call, reduction="none")
    weight = _shares(func, call)
    return call["losses"] if weight is None else _weighted(call["losses"], weight)


def _shares(func: Callable[..., Any], call: dict[str, Any]) -> Tensor | None:
    """Return how much each target of a call counts in its mean; None where all count 1."""
    weight, ignored = call.get("weight"), call.get("ignore_index", -100)
    if func is mean_over_samples:
        return None if weight is None else weight.expand(call["losses"].shape)
    if func not in (F.cross_entropy, F.nll_loss):
        return weight if func in (F.mse_loss, F.l1_loss, F.huber_loss) else None
    target = call["target"]
    if isinstance(target, MixedLabels):
        return soft_targets(target, call["input"].shape[1], ignored)[1]
    return None if target.is_floating_point() else label_weights(target, weight, ignored)


def _counts(func: Callable[..., Any], call: dict[str, Any], losses: Tensor) -> Tensor:
    """Return which of a call's losses are of targets that count."""
    shares = _shares(func, call)
    if shares is None and func is F.cross_entropy:  # probabilities, none of them where nothing counts
        return (call["target"] != 0).any(1)  # type: ignore[no-any-return]
    shares = call.get("weight") if shares is None else shares  # a binary cross-entropy's does not count in its mean
    return torch.ones_like(losses, dtype=torch.bool) & (True if shares is None else shares != 0)


def _normaliser(func: Callable[..., Any], call: dict[str, Any], reduction: str, losses: Tensor) -> Tensor | float:
    """Return what a call divides the sum of its losses by."""
    if reduction == "sum":
        return 1
    shares = _shares(func, call)
    if shares is not None:
        total = shares.sum()
        return torch.where(total > 0, total, 1) if func is mean_over_samples else total
    return len(losses) if reduction == "batchmean" else losses.numel()


_LOSSES: dict[Callable[..., Any], inspect.Signature] = {
    func: inspect.signature(func)
    for func in (
        mean_over_samples, F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
        F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
    )
}  # fmt: skip
_KEEPS = {Tensor.to, Tensor.masked_fill}  # with which this package's losses begin
_FLATTENS = {Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten}
