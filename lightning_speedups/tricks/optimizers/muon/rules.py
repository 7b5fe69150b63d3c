"""What a step does to the parameters of a group: Muon (Jordan, 2024), or torch's SGD or AdamW."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from lightning_speedups.attach.optimizers import Birth
from lightning_speedups.attach.steps import Group, split_group
from lightning_speedups.core.orthogonal import EPS, MOST_STEPS, orthogonalized, update_scale

States = Mapping[Tensor, dict[str, Any]]

RULES: dict[str, Group] = {
    "muon": {"momentum": 0.95, "nesterov": True, "steps": MOST_STEPS, "scale": "original", "normalized": False},
    "sgd": {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": True},
}
"""What a parameter group holds beside rate and decay, by the rule that it follows."""
RULE_OF: dict[type[Optimizer], str] = {SGD: "sgd", Adam: "adamw", AdamW: "adamw"}
"""Under which rule what is no matrix goes on, by the module's optimizer."""


def momentum_of(group: Mapping[str, Any]) -> float:
    """Return a group's momentum: torch's schedulers move that of all groups under one name."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def step_muon(group: Group, params: list[Tensor], states: States) -> None:
    """Update parameters that have a gradient by Muon; matrices of one shape go through in one batch.

    Args:
        group: Their parameter group.
        params: The parameters.
        states: What is remembered of each.
    """
    for parameter in params:
        if "momentum_buffer" not in states[parameter]:
            states[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    # The columns' order makes no difference: that of memory needs no copies.
    lasts = [is_channels_last(parameter) for parameter in params]
    weights, gradients, buffers = (
        [tensor.movedim(1, -1) if last else tensor for tensor, last in zip(tensors, lasts, strict=True)]
        for tensors in (params, [p.grad for p in params], [states[p]["momentum_buffer"] for p in params])
    )
    momentum = momentum_of(group)
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    moves = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
    if group["normalized"]:
        norms = torch._foreach_norm(weights)
        torch._foreach_clamp_min_(norms, EPS)
        torch._foreach_div_(norms, [math.sqrt(len(weight)) for weight in weights])
        torch._foreach_div_(weights, norms)
    elif group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    batches: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for weight, move in zip(weights, moves, strict=True):
        batches[len(weight), weight[0].numel(), weight.dtype, weight.device].append((weight, move))
    for (rows, columns, dtype, _), batch in batches.items():
        updates = orthogonalized(torch.stack([move.flatten(1) for _, move in batch]), group["steps"]).to(dtype)
        torch._foreach_add_(
            [weight for weight, _ in batch],
            [update.view(weight.shape) for update, (weight, _) in zip(updates.unbind(), batch, strict=True)],
            alpha=-group["lr"] * update_scale(rows, columns, group["scale"]),
        )


def is_channels_last(parameter: Tensor) -> bool:
    """Tell whether filters lie in memory with their channels last.

    Example:
        >>> is_channels_last(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))
        True
    """
    return parameter.ndim == 4 and not parameter.is_contiguous() and parameter.movedim(1, -1).is_contiguous()


def step_sgd(group: Group, params: list[Tensor], states: States) -> None:
    """Update parameters that have a gradient by torch's SGD.

    Args:
        group: Their parameter group.
        params: The parameters.
        states: What is remembered of each.
    """
    buffers = [states[parameter].get("momentum_buffer") for parameter in params]
    momentum = momentum_of(group)
    sgd(
        params,
        [parameter.grad for parameter in params],  # type: ignore[misc]
        buffers,
        has_sparse_grad=any(parameter.grad.is_sparse for parameter in params if parameter.grad is not None),
        foreach=True,
        weight_decay=group["weight_decay"],
        momentum=momentum,
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"] and momentum > 0,
        maximize=False,
    )
    if momentum:
        for parameter, buffer in zip(params, buffers, strict=True):
            states[parameter]["momentum_buffer"] = buffer


def step_adamw(group: Group, params: list[Tensor], states: States) -> None:
    """Update parameters that have a gradient by torch's AdamW, or Adam.

    Args:
        group: Their parameter group.
        params: The parameters.
        states: What is remembered of each.
    """
    for parameter in params:
        state = states[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    names = ("exp_avg", "exp_avg_sq", "step")
    means, squares, steps = ([states[parameter][name] for parameter in params] for name in names)
    adam(
        params,
        [parameter.grad for parameter in params],  # type: ignore[misc]
        means,
        squares,
        [],
        steps,
        foreach=not isinstance(group["lr"], Tensor),  # torch has no such form
        decoupled_weight_decay=group["decoupled_weight_decay"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


STEPS = {"muon": step_muon, "sgd": step_sgd, "adamw": step_adamw}
"""What a step does, by the rule."""


def kept_groups(birth: Birth, matrices: Collection[int]) -> list[Group]:
    """Return an optimizer's own groups, each as one under its own rule, and one under Muon.

    Args:
        birth: With what it would be born.
        matrices: Ids of the parameters that go under Muon.

    Example:
        >>> import torch
        >>> weight, bias = torch.ones(2, 2), torch.ones(2)
        >>> groups = kept_groups(Birth(AdamW, [{"params": [weight, bias], "lr": 0.1}], {}), {id(weight)})
        >>> [(group["name"], group["rule"], group["lr"], len(group["params"])) for group in groups]
        [('pg1', 'adamw', 0.1, 1), ('pg1-muon', 'muon', 0.1, 1)]
    """
    first, others = [], []
    for i, group in enumerate(birth.groups, 1):  # named as a LearningRateMonitor does
        parts = split_group({"name": f"pg{i}", **group}, lambda p: "muon" if id(p) in matrices else None)
        for part in parts:
            held = [p[1] if isinstance(p, tuple) else p for p in part["params"]]
            part["rule"] = "muon" if held and id(held[0]) in matrices else RULE_OF[birth.kind]
        first.append(parts[0])
        others += parts[1:]
    return first + others


def move_peaks(groups: Iterable[Group], before: Iterable[Group]) -> None:
    """Let a OneCycleLR, which sets rates and does not multiply them, peak at those that groups had before it.

    Args:
        groups: An optimizer's; those of another scheduler are left alone.
        before: What they held before the first scheduler.

    Example:
        >>> from torch.optim.lr_scheduler import OneCycleLR
        >>> optimizer = SGD([torch.ones(1, requires_grad=True)], lr=0.2)
        >>> cycle = OneCycleLR(optimizer, 0.4, total_steps=4)
        >>> move_peaks(optimizer.param_groups, [{"lr": 0.2}])
        >>> optimizer.param_groups[0]["max_lr"]
        0.2
    """
    for group, own in zip(groups, before, strict=False):
        if "max_lr" in group:
            ratio = own["lr"] / group["max_lr"]
            group.update({key: group[key] * ratio for key in ("lr", "initial_lr", "max_lr", "min_lr")})
