"""Each sample's own loss, read and weighted inside code that calls torch's losses, without a change to that code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from lightning_speedups.tensors.labels import MixedLabels, label_weights, soft_targets


def mean_over_samples(losses: Tensor) -> Tensor:
    """Average a batch's losses, and show each of them to ``SubsetTraining``.

    For losses of your own, which torch's functions do not compute: end ``training_step`` with this instead of
    ``losses.mean()``. Without ``SubsetTraining`` it is that.

    Args:
        losses: ``(N, ...)``, the batch's samples first.

    Returns:
        A scalar.

    Example:
        >>> mean_over_samples(torch.tensor([1.0, 2.0, 6.0]))
        tensor(3.)
    """
    if has_torch_function_unary(losses):
        return handle_torch_function(mean_over_samples, (losses,), losses)
    return losses.mean()


class SampleLosses(TorchFunctionMode):
    """Reads the loss of each of a batch's samples from the losses that are computed under it, and may weigh them.

    It sees torch's cross-entropies, ``nll_loss``, ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``, ``huber_loss`` and
    ``kl_div`` from ``torch.nn.functional``, the modules that call them, and ``mean_over_samples``; of these the calls
    that training depends on (their result requires a gradient) with one loss for each sample, or several, along the
    first dimension. The losses of several calls add up.

    Without weights each call's result is untouched. With weights wᵢ a mean Σ lᵢ / Z becomes Σ wᵢ·lᵢ / Z, where Z is
    the call's own normaliser: class weights and ``ignore_index`` keep their meaning.

    Args:
        samples: N, how many samples the batch has.
        weights: ``(N,)``, on the losses' device; None for none.

    Attributes:
        losses: float32 ``(N,)``, detached; None as long as nothing was seen.

    Example:
        >>> scores, labels = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 1])
        >>> with SampleLosses(2, torch.tensor([3.0, 1.0])) as seen:
        ...     loss = F.cross_entropy(scores, labels)
        >>> print(f"{loss:.4f}", seen.losses)
        2.7726 tensor([1.3863, 1.3863])
    """

    def __init__(self, samples: int, weights: Tensor | None = None) -> None:
        super().__init__()
        self.samples, self.weights = samples, weights
        self.losses: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a loss once more, sample by sample; leave everything else alone."""
        if func not in _LOSSES:
            return func(*args, **(kwargs or {}))
        return self._loss(func, args, kwargs or {})

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
                    self._take(result if reduction == "none" else _one_by_one(func, call))
            return result
        losses = _one_by_one(func, call)
        if not losses.requires_grad or not self._take(losses.detach()):
            return func(*args, **kwargs)
        weighted = losses * self.weights.to(losses.dtype).view(-1, *[1] * (losses.ndim - 1))
        return weighted if reduction == "none" else weighted.sum() / _normaliser(func, call, reduction, losses)

    def _take(self, losses: Tensor) -> bool:
        if losses.ndim == 0 or len(losses) != self.samples:
            return False
        losses = losses.detach().float()  # a loss with reduction="none" comes with its graph
        own = losses.flatten(1).mean(1) if losses.ndim > 1 else losses
        self.losses = own if self.losses is None else self.losses + own
        return True


def _weight_of_l1_loss() -> Tensor | None:
    """Return the ``weight`` that torch's ``l1_loss`` was given, which since 2.14 it does not hand on to a mode."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not F.l1_loss.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weight")


def _one_by_one(func: Callable[..., Any], call: dict[str, Any]) -> Any:
    return call["losses"] if func is mean_over_samples else func(**call, reduction="none")


def _normaliser(func: Callable[..., Any], call: dict[str, Any], reduction: str, losses: Tensor) -> Tensor | float:
    """Return what a call divides the sum of its losses by."""
    if reduction == "sum":
        return 1
    weight = call.get("weight")
    if func in (F.cross_entropy, F.nll_loss):
        target, ignored = call["target"], call.get("ignore_index", -100)
        if isinstance(target, MixedLabels):
            return soft_targets(target, call["input"].shape[1], ignored)[1].sum()
        if not target.is_floating_point():
            return label_weights(target, weight, ignored).sum()
    if func in (F.mse_loss, F.l1_loss, F.huber_loss) and weight is not None:
        return weight.sum()  # type: ignore[no-any-return]
    return len(losses) if reduction == "batchmean" else losses.numel()


_LOSSES: dict[Callable[..., Any], inspect.Signature] = {
    func: inspect.signature(func)
    for func in (
        mean_over_samples, F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
        F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
    )
}  # fmt: skip
