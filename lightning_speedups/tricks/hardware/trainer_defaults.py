"""Trainer settings that are fast on the hardware at hand: mixed precision (Micikevicius et al., arXiv:1710.03740) and
cuDNN autotuning.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_speedups.attach.packages import is_a
from lightning_speedups.core.arguments import plain


def choose_precision(asked: Any, kind: str, native_bf16: bool) -> tuple[Any, str]:
    """Choose the fastest sound precision for a kind of hardware.

    Args:
        asked: ``"16-mixed"``, ``"auto"``, or any other precision of Lightning's, which stands as it is.
        kind: ``"cuda"``, ``"cpu"`` or another accelerator.
        native_bf16: Whether the hardware computes in bfloat16 itself.

    Returns:
        The precision and the reason.

    Example:
        >>> choose_precision("16-mixed", "cpu", native_bf16=False)[0]
        '32-true'
        >>> choose_precision("auto", "cuda", native_bf16=True)[0]
        'bf16-mixed'
    """
    asked = {16: "16-mixed", "16": "16-mixed"}.get(asked, asked)  # Lightning's aliases
    if asked not in ("16-mixed", "auto"):
        return asked, "as given"
    if kind == "cpu":
        if native_bf16:
            return "bf16-mixed", "this CPU computes in bfloat16, and float16 on a CPU is slower than float32"
        return "32-true", "this CPU has no fast half precision"
    if kind != "cuda":
        return "32-true", f"half precision was not measured on {kind}"
    if asked == "auto" and native_bf16:
        return "bf16-mixed", "this GPU computes in bfloat16, which needs no loss scaling"
    return "16-mixed", "float16 with loss scaling" + ("" if native_bf16 else ": this GPU has no native bfloat16")


def trainer_defaults(
    precision: str = "16-mixed", accelerator: str | Accelerator = "auto", devices: Any = "auto", **overrides: Any
) -> dict[str, Any]:
    """Return Trainer arguments that are fast on the hardware found: ``Trainer(**trainer_defaults(), callbacks=[...])``.

    It says in one log line what it chose and why. On a GPU it keeps the float16 asked for, with loss scaling,
    and with ``"auto"`` prefers bfloat16 where that is native. On a CPU float16 was 130 times slower than float32, so it
    takes bfloat16 where that is native, else float32. ``benchmark=True`` on CUDA, unless ``deterministic`` is asked
    for.

    When not to use it: where results must be equal to a float32 run to the last digit; with input sizes that change all
    the time, pass ``benchmark=False``.

    Args:
        precision: ``"16-mixed"``, ``"auto"``, or any other precision of Lightning's, which stands as it is.
        accelerator: As in Trainer.
        devices: As in Trainer.
        **overrides: Any other Trainer arguments; they win. A precision plugin in ``plugins`` replaces ``precision``.

    Returns:
        Keyword arguments for ``Trainer``.

    Raises:
        ValueError: If an override is no Trainer argument.

    Example:
        >>> settings = trainer_defaults(accelerator="cpu", max_epochs=3)
        >>> settings["accelerator"], settings["max_epochs"], settings["precision"] in ("bf16-mixed", "32-true")
        ('cpu', 3, True)
    """
    devices, overrides = plain(devices), plain(overrides)
    known = inspect.signature(Trainer).parameters
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"Trainer has no argument `{name}`" + (f"; did you mean `{near[0]}`?" if near else "."))
    kind = _kind(accelerator)
    settings: dict[str, Any] = {"accelerator": accelerator, "devices": devices}
    plugins = overrides.get("plugins") or []
    if any(is_a(plugin, "Precision") for plugin in (plugins if isinstance(plugins, Iterable) else [plugins])):
        chosen, why = "left to the precision plugin", "Trainer takes one or the other"
    else:
        chosen, why = choose_precision(precision, kind, _native_bf16(kind))
        settings["precision"] = chosen
    if kind == "cuda" and not overrides.get("deterministic"):
        settings["benchmark"] = True
    autotuning = ", cuDNN autotuning" if "benchmark" in settings else ""
    rank_zero_info(f"trainer_defaults: {kind}, precision {chosen} ({why}){autotuning}.")
    return settings | overrides


def _kind(accelerator: str | Accelerator) -> str:
    if not isinstance(accelerator, str):
        return type(accelerator).__name__.removesuffix("Accelerator").lower()
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _native_bf16(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
