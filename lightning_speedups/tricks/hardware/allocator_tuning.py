"""Memory of one step kept for the next one: training steps ask for the same blocks again and again (Sekiyama et al.,
arXiv:1804.10001), which glibc hands back to the kernel and gets page by page.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_speedups.attach.trick import Trick

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of the parameters in glibc's malloc.h."""
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
"""No mappings of their own for large blocks, and nothing given back."""
USUAL = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024}
"""What mallopt(3) gives as defaults."""


def reason_against(device: str, libc: str, libraries: str, environment: Mapping[str, str]) -> str:
    """Return why glibc's allocator is not to be tuned; an empty string if it is.

    Args:
        device: The type of the device that tensors are on.
        libc: The name of the C library, as ``platform.libc_ver`` tells it.
        libraries: Names of the libraries that are loaded.
        environment: The process's environment variables.

    Example:
        >>> reason_against("cpu", "glibc", "libc.so.6", {}), reason_against("cuda", "glibc", "libc.so.6", {})
        ('', 'tensors are not in the memory of a CPU, but of cuda')
    """
    if device != "cpu":
        return f"tensors are not in the memory of a CPU, but of {device}"
    if libc != "glibc":
        return "it is glibc on Linux that it knows"
    if other := re.search("jemalloc|tcmalloc|mimalloc", libraries):
        return f"{other[0]} is loaded in glibc's place"
    own = [
        name for name in environment if re.fullmatch("MALLOC_(MMAP_MAX|MMAP_THRESHOLD|TRIM_THRESHOLD|TOP_PAD)_", name)
    ]
    if "glibc.malloc." in environment.get("GLIBC_TUNABLES", ""):
        own.append("GLIBC_TUNABLES")
    return f"the environment's own settings stand ({', '.join(sorted(own))})" if own else ""


class AllocatorTuning(Trick):
    """Lets glibc keep the memory of a training step for the next one, on CPUs.

    By default large blocks are mapped anew for each use, and what is free at the heap's end goes back to the kernel:
    large batches then spend part of each step in page faults. From fit start on nothing is given back; at the fit's end
    glibc's documented defaults are set, and what is free is given back at once. (glibc adapts its thresholds to the
    blocks that it sees, until the first setting of one; that does not come back within the process.) Results are the
    same to the bit. Several Trainers at once share the setting; the last one ends it.

    When not to use it: where memory is scarce, as the process keeps the most that it ever needed, and may need somewhat
    more. It does nothing, and says why in one line, with accelerators, off Linux and glibc, where jemalloc, tcmalloc or
    mimalloc is loaded, and where ``MALLOC_…`` or ``GLIBC_TUNABLES`` in the environment say something else. Small
    batches gain nothing.

    Raises:
        MisconfigurationException: In ``setup``, if the Trainer is none of Lightning's.

    Source:
        Sekiyama et al., arXiv:1804.10001; mallopt(3).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AllocatorTuning()])
    """

    users: ClassVar[set[AllocatorTuning]] = set()
    """Those in whose fits the process is now."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep memory from now on, or say why not."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        libc, _ = platform.libc_ver()
        maps = Path("/proc/self/maps").read_text() if libc == "glibc" else ""
        if reason := reason_against(trainer.strategy.root_device.type, libc, maps, os.environ):
            rank_zero_info(f"{self.name} does nothing: {reason}.")
            return
        self.users.add(self)
        set_allocator(KEEP)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give memory back, if no other Trainer needs it."""
        super().undo(trainer, pl_module)
        if self in self.users:
            self.users.remove(self)
            if not self.users:
                set_allocator(USUAL)
                ctypes.CDLL(None).malloc_trim(0)


def set_allocator(values: Mapping[int, int]) -> None:
    """Set parameters of glibc's malloc in this process.

    Args:
        values: By the parameters' numbers, as in mallopt(3).

    Raises:
        OSError: If glibc takes one of them not.

    Example:
        >>> set_allocator(USUAL)
    """
    for parameter, value in values.items():
        if not ctypes.CDLL(None).mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed.")
