"""Weights from a file that can't run code, for any module: safetensors, a state dict, or a Lightning checkpoint."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lightning_speedups.modules.layers import find_timm_network
from lightning_speedups.modules.weights import (
    Match,
    WeightReport,
    find_heads,
    find_prefixes,
    find_states,
    fit_state,
    head_names,
    match_states,
    named_tensors,
    renamed,
    require_fit,
    shortened,
)

TEXTS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, which stands for a file; `git lfs pull` fetches that",
    b"<": "it is a web page, perhaps of an error, and not what should be downloaded",
    b"{": "it is JSON, perhaps the index of weights in parts; load these with their own library, and save them as one",
    b"": "it is a text",
}
"""What a file is that holds text, by its beginning."""
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


class _Unneeded:
    """Stands for a value beside the weights; what it is of is not called, and its content is thrown away."""

    def __init__(self, *content: object) -> None:
        pass

    __setstate__ = __init__


UNNEEDED = [
    (_Unneeded, name)
    for name in (
        "argparse.Namespace",
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATHS),
        *(f"numpy.{name}" for name in ("dtype", "ndarray")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    )
]
"""What programs keep beside the weights: arguments, paths, numpy's numbers and arrays."""


def read_states(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the state dicts in a file: safetensors, ``torch.save``'s, or a Lightning checkpoint; no code in it runs.

    Args:
        path: The file.

    Returns:
        As from `find_states`; tensors are on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, holds no weights, or needs code to be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path} to load weights from.")
    if not path.is_file():
        raise ValueError(f"Expected weights in a file, but {path} is a folder. Name the file in it.")
    try:
        # Tensors that are mapped from the file would end the program once the file is written again.
        return copy.deepcopy(find_states(load_file(path) if _is_safetensors(path) else _read_torch(path)))
    except (pickle.UnpicklingError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError) as error:
        raise ValueError(_explained(path, error)) from error


def _is_safetensors(path: Path) -> bool:
    """Whether it begins as safetensors does: the length of a header, then the header in JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_torch(path: Path) -> Any:
    with _skipping_unneeded(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it can't read it refuses
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _skipping_unneeded() -> contextlib.AbstractContextManager[None]:
    """Let torch skip what is not needed; where the user allows a library's classes, that library is left to them."""
    theirs = torch.serialization.get_safe_globals()
    known = {str(each[1] if isinstance(each, tuple) else each.__module__).partition(".")[0] for each in theirs}
    return torch.serialization.safe_globals(
        [(stand_in, name) for stand_in, name in UNNEEDED if name.partition(".")[0] not in known]
    )


def _explained(path: Path, error: Exception) -> str:
    """Say why a file could not be read."""
    is_told = not isinstance(error, (KeyError, pickle.UnpicklingError))
    reason = _other_kind(path) or " ".join(str(error).split())[:200] * is_told
    if not reason and (unsafe := _why_unsafe(path, error)):
        return (
            f"{path} is refused: {unsafe}. Nothing in it has been run. Save its weights again, where you trust it, "
            "with safetensors or as torch.save(model.state_dict(), ...); or allow its classes yourself with "
            "torch.serialization.add_safe_globals."
        )
    return (
        f"Can't load weights from {path}: {reason or 'it is no such file'}. Expected safetensors, a state dict saved "
        "with torch.save, or a Lightning checkpoint."
    )


def _other_kind(path: Path) -> str:
    """Say what a file is that holds nothing, or a text; else nothing."""
    with path.open("rb") as file:
        start = file.read(256)
    if min(start, default=0) < ord("\t"):
        return "" if start else "it is empty"
    return next(kind for sign, kind in TEXTS.items() if start.lstrip().startswith(sign))


def _why_unsafe(path: Path, error: Exception) -> str:
    with contextlib.suppress(Exception), _skipping_unneeded():
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return f"reading it would run code of {shortened(names)}"
    found = re.search(r"GLOBAL (\S+)", str(error))
    with path.open("rb") as file:
        is_pickle = file.read(1) == pickle.PROTO
    return f"reading it would run code of {found[1]}" if found else "torch.save did not write this pickle" * is_pickle


def load_weights(
    module: nn.Module, source: str | Path, *, strict: bool = True, head: str | None = None, key: str | None = None
) -> WeightReport:
    """Load a backbone's weights from a file into any module; a head for other classes stays as it is.

    The file is safetensors, a state dict saved with ``torch.save``, or a Lightning checkpoint. It is read as data:
    nothing in it can run code. Names may stand under a prefix (``"module."``, ``"model."``, ...) on either side. Of
    several sets of weights that fit averaged ones are taken (``"ema"``), then those under a usual key
    (``"state_dict"``, ``"model"``, ...); the report says which, and what else would fit. What the module's own loading
    translates is translated (older names, as those of ``weight_norm``), and for one of timm's networks what timm can:
    other names, sizes of position embeddings, input channels. Of tied tensors one is enough.

    Args:
        module: Changed in place; dtype and device stay its own.
        source: Path of the file.
        strict: Whether each tensor of the backbone must be in the file, and few more among them, as those of a deeper
            network; if not, half of them must.
        head: Attribute path of the classifier. None: that of timm's network, or the last layer if it is linear.
        key: Where in the file the weights stand, as ``"teacher"``, ``"state_dict.ema_model"``, or ``""`` for those
            under no key and no prefix. None: wherever most tensors fit.

    Returns:
        What was loaded, and what was not; printed, it is a few lines.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file can't be read without running code, holds no weights, those of another model, or
            several sets that fit of which none is averaged or under a usual key; the module is unchanged then.

    Example:
        >>> import tempfile
        >>> old, new = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (1000, 5))
        >>> path = Path(tempfile.mkdtemp()) / "old.pt"
        >>> torch.save(old.state_dict(), path)
        >>> report = load_weights(new, path)
        >>> report.loaded, report.fresh
        (('0.weight', '0.bias'), ('2.weight', '2.bias'))
    """
    states, own = read_states(source), module.state_dict(keep_vars=True)
    names = head_names(module, find_heads(module, head))
    try:
        match = match_states(states, own, key)
    except ValueError as error:
        raise ValueError(f"Can't load weights from {source}: {error}") from error
    state = states[match.path]
    fitting, report = fit_state(state, own, names, str(source), (match.theirs, match.mine))
    for translate in (renamed, _translated):
        if report.missing or report.wrong:
            other, other_report = fit_state(translate(module, state, match), own, names, str(source))
            if len(other) > len(fitting):
                fitting, report = other, replace(other_report, file_prefix=match.theirs)
    report = replace(report, file_prefix=match.path + report.file_prefix, others=match.others)
    require_fit(report, [name for name in own if name not in names], strict)
    module.load_state_dict(fitting, strict=False)
    rank_zero_info(str(report))
    return report


def _translated(module: nn.Module, state: Mapping[str, Any], match: Match) -> Mapping[str, Any]:
    """Rename and resize what timm knows how to, for the network in a module."""
    network, _ = find_timm_network(module)
    if network is None or not getattr(network, "pretrained_cfg", None):
        return state
    from timm.models import adapt_input_conv

    own = network.state_dict()
    tensors = {name: value for name, value in named_tensors(state).items() if name.startswith(match.theirs)}
    prefix, _ = find_prefixes(tensors, own)
    result = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    with contextlib.suppress(Exception):  # there is none, or it is made for the original files, and this is another
        translate = sys.modules[type(network).__module__].checkpoint_filter_fn
        result = dict(translate(dict(result), network))
    first = network.pretrained_cfg.get("first_conv") or ()
    for name in [f"{each}.weight" for each in ([first] if isinstance(first, str) else first)]:
        if name in result and name in own and result[name].shape[1:2] != own[name].shape[1:2]:
            with contextlib.suppress(NotImplementedError):  # only from 3 channels to others
                result[name] = adapt_input_conv(own[name].shape[1], result[name])
    return result
