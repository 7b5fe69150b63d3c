"""Starts from which a network trains sooner: a whitened first convolution, identity filters, residual branches that
begin at zero, small logits, and the norms of the CIFAR-10 speedrun.

Sources: Jordan, arXiv:2404.00498 (whitening, identity filters, norms); Goyal et al., arXiv:1706.02677 (zero branches).
Functions that find change nothing; those that change do so in place, and say what they changed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_speedups.modules.layers import is_norm

NUMBERS = 2**24
"""How many numbers of patches are looked at, at most: more of them take seconds, and change nothing."""
PROJECTIONS = re.compile(r"(?:out|c|o|down)_proj|proj|fc2|linear2|w2|wo")
"""What the last layers of attention and of perceptrons are called, in torch, timm, Hugging Face and nanoGPT."""
SHORTCUTS = ("downsample", "shortcut")
"""What torchvision, timm and those who write ResNets anew call the way around a block."""


def plain_convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions whose filters can be written into, by name: trainable, of one group, and computed with
    their weights as they are (not standardised or parametrized).

    Args:
        module: Where to look.

    Example:
        >>> list(plain_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))))
        ['0']
    """
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d)
        and part.groups == 1
        and "weight" in part._parameters
        and part.weight.requires_grad
        and "Std" not in type(part).__name__
    }


def find_stem(module: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Return the first convolution and its name; None if there is none, or if its filters cannot be written into.

    Args:
        module: A network that registers its parts in the order in which it calls them.

    Example:
        >>> find_stem(nn.Sequential(nn.Identity(), nn.Conv2d(3, 8, 3)))
        ('1', Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)))
    """
    first = next((name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)), None)
    found = plain_convolutions(module)
    return (first, found[first]) if first in found else None


@torch.no_grad()
def patch_moments(images: Tensor, convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the patches that a convolution sees in some images, without its padding.

    Of many patches, every n-th is taken, so that there are 2²⁴ numbers at most.

    Args:
        images: A sample of its inputs, ``(N, C_in, H, W)``.
        convolution: Whose patches.

    Returns:
        Mean, ``(d,)``, and covariance, ``(d, d)``, in float64 on the CPU, with ``d = C_in · height · width`` of its
        kernel, in the order of its weight.

    Raises:
        ValueError: If there are no more patches than numbers in one.

    Example:
        >>> mean, covariance = patch_moments(torch.randn(64, 3, 8, 8), nn.Conv2d(3, 16, 3))
        >>> mean.shape, covariance.shape
        (torch.Size([27]), torch.Size([27, 27]))
    """
    shape = {"kernel_size": convolution.kernel_size, "dilation": convolution.dilation, "stride": convolution.stride}
    size = convolution.weight[0].numel()
    spans = [d * (k - 1) + 1 for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
    fits = [(n - s) // step + 1 for n, s, step in zip(images.shape[-2:], spans, convolution.stride, strict=True)]
    total = len(images) * math.prod(fits) if min(fits) > 0 else 0
    if min(total, NUMBERS // size) <= size:
        raise ValueError(
            f"Expected `images` to hold more patches than there are numbers in one, which is {size}, but got "
            f"{min(total, NUMBERS // size)} of {tuple(images.shape)}."
        )
    every = math.ceil(total * size / NUMBERS)
    parts = (F.unfold(some.detach().float(), **shape).mT.reshape(-1, size) for some in torch.split(images, 32))
    patches = torch.cat([part[::every].cpu().double() for part in parts])
    mean = patches.mean(0)
    patches -= mean
    return mean, patches.T @ patches / len(patches)


def whitening_filters(covariance: Tensor, eps: float = 5e-4) -> Tensor:
    """Return filters whose outputs on patches of this covariance are uncorrelated and have unit variance.

    A filter is an eigenvector over √(its eigenvalue + ε · the mean eigenvalue): of directions that hardly occur it
    makes little, and images need not be normalised for ε to mean the same.

    Args:
        covariance: Of the patches, ``(d, d)``.
        eps: ε, above 0, as a part of the variance of a pixel.

    Returns:
        One filter a row, ``(d, d)``, that of the largest eigenvalue first.

    Example:
        >>> whitening_filters(torch.diag(torch.tensor([1.0, 4.0])), eps=1e-9).abs()
        tensor([[0.0000, 0.5000],
                [1.0000, 0.0000]])
    """
    values, vectors = torch.linalg.eigh(covariance)
    filters: Tensor = (vectors / (values.clamp(min=0) + eps * values.mean()).sqrt()).T.flip(0)
    return filters


@torch.no_grad()
def whiten(convolution: nn.Conv2d, mean: Tensor, covariance: Tensor, eps: float = 5e-4) -> int:
    """Let a convolution begin with filters that whiten its patches, each with both signs, the strongest first.

    Where there are more outputs than that takes, the rest keep their values; where there are fewer, the weakest filters
    are left out. A bias takes the mean of the outputs away.

    Args:
        convolution: Changed in place.
        mean: Of its patches, from [patch_moments][lightning_speedups.modules.initialization.patch_moments].
        covariance: Of its patches.
        eps: As in [whitening_filters][lightning_speedups.modules.initialization.whitening_filters].

    Returns:
        How many of its outputs were set.

    Example:
        >>> convolution, images = nn.Conv2d(3, 8, 3), torch.randn(64, 3, 8, 8)
        >>> whiten(convolution, *patch_moments(images, convolution))
        8
        >>> outputs = convolution(images)[:, :4].transpose(0, 1).flatten(1)
        >>> torch.allclose(outputs.cov(), torch.eye(4), atol=0.01)
        True
    """
    filters = whitening_filters(covariance, eps)[: convolution.out_channels // 2]
    both = torch.cat([filters, -filters])
    convolution.weight[: len(both)] = both.view(-1, *convolution.weight.shape[1:]).to(convolution.weight)
    if convolution.bias is not None:
        convolution.bias[: len(both)] = -(both @ mean).to(convolution.bias)
    return len(both)


def identity_convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions that may begin as the identity, by name.

    Those with odd kernels of more than one pixel. The first one is none of them, since it makes features of colours;
    nor is a 1×1 convolution, whose work it is to mix channels, or one of several groups.

    Args:
        module: Where to look.

    Example:
        >>> layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 2)
        >>> list(identity_convolutions(nn.Sequential(*layers)))
        ['1']
    """
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    return {
        name: part
        for name, part in plain_convolutions(module).items()
        if part is not first and max(part.kernel_size) > 1 and all(side % 2 for side in part.kernel_size)
    }


@torch.no_grad()
def start_as_identity(convolutions: Collection[nn.Conv2d]) -> int:
    """Let the first outputs of convolutions be their inputs, as many as there are; further outputs keep their filters.

    Args:
        convolutions: Changed in place, of one group each; their biases stay.

    Returns:
        How many there are.

    Example:
        >>> convolution, images = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.randn(1, 2, 4, 4)
        >>> start_as_identity([convolution])
        1
        >>> torch.equal(convolution(images)[:, :2], images)
        True
    """
    for convolution in convolutions:
        nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return len(convolutions)


def zero_residual_branches(module: nn.Module) -> list[str]:
    """Let residual blocks begin as their shortcuts: the weight of the norm at the end of each branch becomes 0.

    Blocks are those that know how (timm's ``zero_init_last``), and those with a ``downsample`` or ``shortcut`` in which
    a norm with a weight comes directly after the last convolution: torchvision's ResNets and those written after them.
    In blocks of transformers it is the last projections of attention and perceptron that become 0, known by their usual
    names, such as ``out_proj`` and ``fc2``, by a norm of their size around them, and by layers before them that take
    that size. Blocks of another build, and those
    in which these do not train, stay as they are.

    Args:
        module: Changed in place.

    Returns:
        The names of the blocks.

    Example:
        >>> from torchvision.models import resnet18
        >>> zero_residual_branches(resnet18())[:2]
        ['layer1.0', 'layer1.1']
    """
    begun = []
    for name, block in module.named_modules():
        norm = _last_norm(block)
        if hasattr(block, "zero_init_last") and any(p.requires_grad for p in block.parameters()):
            block.zero_init_last()
        elif norm is not None:
            nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
        else:
            continue
        begun.append(name)
    return begun + _zero_projections(module)


def _zero_projections(module: nn.Module) -> list[str]:
    """Set the last projections of transformers' blocks to 0, and return the names of the blocks."""
    parts, begun = dict(module.named_modules()), []
    for name, part in parts.items():
        path = name.split(".")
        outputs = getattr(part, "out_features", getattr(part, "nf", None))  # nf: of Hugging Face's Conv1D
        trains = all(p.requires_grad for p in part.parameters(recurse=False))
        if not (PROJECTIONS.fullmatch(path[-1]) and isinstance(outputs, int) and trains):
            continue
        if not _takes(parts[".".join(path[:-1])], part, outputs):
            continue
        around = [".".join(path[:-up]) for up in (1, 2) if up <= len(path)]
        block = next((one for one in around if _has_norm(parts[one], outputs)), None)
        if block is not None:
            for parameter in part.parameters(recurse=False):
                nn.init.zeros_(parameter)
            begun.append(block)
    return list(dict.fromkeys(begun))


def _takes(branch: nn.Module, end: nn.Module, size: int) -> bool:
    """Tell whether something before the end of a branch takes what its block adds the end to: what does not, as the
    projection of patches or the second layer of a plain perceptron, has no shortcut around it.
    """
    before = itertools.takewhile(lambda one: one is not end.weight, branch.parameters())
    inputs = 0 if hasattr(end, "nf") else -1
    return any(one.ndim == 2 and one.shape[inputs] == size for one in before)


def _has_norm(block: nn.Module, size: int) -> bool:
    norms = [one for one in block.children() if is_norm(one)]
    return any(p.shape == (size,) for norm in norms for p in norm.parameters(recurse=False))


def _last_norm(block: nn.Module) -> nn.Module | None:
    """The norm right after the last convolution of a branch; one before it, at 0, would let no gradient pass."""
    if not any(hasattr(block, name) for name in SHORTCUTS):
        return None
    parts = [part for name, part in block.named_children() if name not in SHORTCUTS]
    last = max((i for i, part in enumerate(parts) if isinstance(part, nn.Conv2d)), default=len(parts))
    norm = parts[last + 1] if last + 1 < len(parts) else None
    weight = getattr(norm, "weight", None)
    return norm if norm is not None and is_norm(norm) and weight is not None and weight.requires_grad else None


@torch.no_grad()
def scale_logits(heads: Collection[nn.Module], scale: float) -> int:
    """Multiply the weights and biases of linear heads, and so the first logits, by a number.

    It is what ``logits * scale`` in the forward does, once the head's learning rate is multiplied by ``scale ** 2`` and
    its weight decay divided by it (SGD, with momentum or not; for AdamW ``scale`` takes the place of its square).
    Proof: with ``V = s W`` the logits are ``V x``, and ``∂L/∂W = s ∂L/∂V``; so a step of W by ``-η ∂L/∂W`` moves V by
    ``-η s² ∂L/∂V``. At an unchanged rate the logits leave their small start faster.

    Args:
        heads: Changed in place.
        scale: Above 0; 1/9 in the CIFAR-10 speedrun.

    Returns:
        How many of them have weights.

    Example:
        >>> head = nn.Linear(4, 2)
        >>> before = head(torch.ones(1, 4))
        >>> scale_logits([head], 0.5)
        1
        >>> torch.equal(head(torch.ones(1, 4)), before / 2)
        True
    """
    weights = [list(head.parameters()) for head in heads]
    for parameter in (parameter for of_head in weights for parameter in of_head):
        parameter.mul_(scale)
    return sum(map(bool, weights))


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm modules."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def set_momentum(module: nn.Module, momentum: float) -> list[tuple[_BatchNorm, float | None]]:
    """Set the momentum of BatchNorms, which is not in a state dict.

    Args:
        module: Changed in place.
        momentum: Share of a new batch in the running statistics, torch's way, in (0, 1]: 0.4 in the CIFAR-10 speedrun,
            which calls it 0.6.

    Returns:
        The norms, and what momentum each had before.

    Example:
        >>> norm = nn.BatchNorm2d(4)
        >>> set_momentum(norm, 0.4) == [(norm, 0.1)], norm.momentum
        (True, 0.4)
    """
    before = [(norm, norm.momentum) for norm in batch_norms(module)]
    for norm, _ in before:
        norm.momentum = momentum
    return before


def weights_of_one(module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable weights of BatchNorms that are 1 throughout, as they begin.

    Args:
        module: Where to look.

    Example:
        >>> len(weights_of_one(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))))
        1
    """
    weights = [norm.weight for norm in batch_norms(module) if norm.affine]
    return [weight for weight in weights if weight.requires_grad and bool((weight == 1).all())]


def statistics_moved(module: nn.Module) -> bool:
    """Tell whether the running statistics of a BatchNorm have moved; a network without any tells nothing.

    Args:
        module: Where to look.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> statistics_moved(norm), norm(torch.randn(4, 2)).shape, statistics_moved(norm)
        (False, torch.Size([4, 2]), True)
    """
    means = [norm.running_mean for norm in batch_norms(module) if norm.running_mean is not None]
    return any(bool(mean.any()) for mean in means if not is_lazy(mean))


def fingerprint(module: nn.Module) -> tuple[float, ...]:
    """Return numbers that tell a module's weights from those after a step of training: the sum of each parameter.

    Args:
        module: Whose weights.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> before = fingerprint(linear)
        >>> scale_logits([linear], 0.5)
        1
        >>> fingerprint(linear) == before
        False
    """
    return tuple(float(parameter.detach().float().sum()) for parameter in module.parameters())
