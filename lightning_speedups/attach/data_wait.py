"""How long training waits for its batches, whatever the loader."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import Trainer

from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.trick import Grip, Trick

FIRST, LAST, FEWEST = 20, 70, 10
"""Of which batches the waits count (workers may have had those before ready when training began), and how many it takes
to tell.
"""


class DataWait(Grip):
    """Times what Lightning's loop waits for its first batches.

    Args:
        trick: Who wants to know.
        tell: Is told, once: the seconds waited, and in how many; 0 and 0 if the run is too short.
    """

    def __init__(self, trick: Trick, tell: Callable[[float, float], None]) -> None:
        super().__init__(trick)
        self.tell = tell

    def on_fit_start(self, trainer: Trainer) -> None:
        """Stand around Lightning's requests."""
        self.batches, self.asked, self.began, self.waited = 0, 0.0, 0.0, 0.0
        Station.of(trainer.fit_loop.epoch_loop, "_on_before_fetch").join(self, partial(self._before, trainer))
        Station.of(trainer.fit_loop.epoch_loop, "_on_after_fetch").join(self, self._after)

    def leave(self, trainer: Trainer) -> None:
        """Stand there no more."""
        Station.of(trainer.fit_loop.epoch_loop, "_on_before_fetch").leave(self)
        Station.of(trainer.fit_loop.epoch_loop, "_on_after_fetch").leave(self)

    def _before(self, trainer: Trainer, begin: Callable[[], None]) -> None:
        if self.batches < LAST and trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()  # or a wait beside the device's own work would count
        begin()
        self.asked = time.perf_counter()

    def _after(self, end: Callable[[], None]) -> None:
        end()
        now = time.perf_counter()
        self.batches, self.waited = self.batches + 1, self.waited + now - self.asked
        if self.batches == FIRST:
            self.began, self.waited = now, 0.0
        if self.batches == LAST:
            self.tell(self.waited, now - self.began)

    def end(self) -> None:
        """Tell what is known by the end of a run, if nothing was told."""
        if self.batches < LAST:
            known = self.batches >= FIRST + FEWEST
            self.tell(*((self.waited, time.perf_counter() - self.began) if known else (0.0, 0.0)))
