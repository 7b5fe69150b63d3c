"""Where a process stands in its training: the place in the loader's epoch, and the random states that go with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_speedups.attach.loaders import LoaderGrip, goes_on
from lightning_speedups.attach.randomness import plain_states, put_states
from lightning_speedups.attach.stations import Station


class PlaceGrip(LoaderGrip):
    """A trick's hold on the place in training, to take it down and to let a resumed run go on there.

    The trick's ``saved.places`` are those of the checkpoint that the run goes on from, one of each process, until it
    does so. A place is a dictionary:

    - ``states``: the random states of the process, those of the loader's own generators among them.
    - ``batches``: how many batches of the epoch are done; 0 between two epochs.
    - ``in_epoch``: how many batches the epoch has.
    - ``drawn``: the samples that the sampler has drawn for the epoch, int64 ``(N,)``; None between two epochs.
    """

    keeps_order = True

    @property
    def is_under_way(self) -> bool:
        """Tell whether there is a place to take down."""
        return "loaders" in vars(self) and self.loaders.selection is not None

    @property
    def goal(self) -> dict[str, Any]:
        """The place where a resumed run goes on, until it does; otherwise empty."""
        places: list[dict[str, Any]] = self.trick.saved.places
        return places[self.loaders.trainer.global_rank] if places else {}

    def epoch_left(self) -> tuple[list[int], int] | None:
        """Return what was drawn for the epoch that goes on, and how many of its batches to leave out: none where the
        loader keeps its place itself, and does so.
        """
        drawn = self.goal.get("drawn")
        return None if drawn is None else (drawn.tolist(), 0 if goes_on(self.loader) else self.goal["batches"])

    def change_loader(self, trainer: Trainer, loader: Any, epoch: int) -> None:
        """Refuse a loader or a number of processes with which the run cannot go on."""
        selection, there = self.loaders.selection, len(self.trick.saved.places)
        assert selection is not None
        if there not in (0, trainer.world_size):
            what = f"needs the place of each process, but the checkpoint has {there}, and this run {trainer.world_size}"
            raise self.trick.refusal(what, "Resume with as many processes, or take the callback away.")
        goal, batches = self.goal, selection.batches_in_epoch(epoch)
        if goal.get("batches") and goal["in_epoch"] != batches:
            what = f"cannot let an epoch of {goal['in_epoch']} batches go on, which has {batches} now"
            raise self.trick.refusal(what, "Use the dataset, batch size and limits of the run that saved it.")

    def on_train_start(self, trainer: Trainer) -> None:
        """Wait for the epoch that goes on."""
        super().on_train_start(trainer)
        if self.trick.saved.places:
            Station.of(trainer.fit_loop, "on_advance_start").join(self, self._begin_epoch)

    def _begin_epoch(self, begin: Callable[[], None]) -> None:
        """Put the random states back, before hooks of an epoch's start, which may draw."""
        loop, goal = self.loaders.trainer.fit_loop, self.goal
        Station.of(loop, "on_advance_start").leave(self)
        put_states(self.loaders.trainer, goal["states"])
        for generator, state in zip(self._generators(), goal["states"]["generators"], strict=False):
            generator.set_state(state)
        if not goal["batches"]:
            Station.of(loop.epoch_loop, "_on_before_fetch").join(self, self._make_iterator)
            if loop.epoch_loop.restarted_on_train_batch_end:
                loop.reset_restart_stage()  # Lightning takes the new epoch for the old one, and does not count it
        begin()

    def _make_iterator(self, begin: Callable[[], None]) -> None:
        """Make the iterator anew, for which Lightning has drawn already, before it has restored anything."""
        loop: Any = self.loaders.trainer.fit_loop
        Station.of(loop.epoch_loop, "_on_before_fetch").leave(self)
        if loop.is_resuming:  # where Lightning had to end an epoch first, it has made the iterator at its time
            iter(loop._combined_loader)
        begin()

    def begin_batch(self) -> None:
        """Settle the order of an epoch with its first batch; a resumed run has gone on."""
        ready = self.loaders.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.require_numbers(self.loaders.settle_order(ready - 1)[:1])
        self.trick.saved = self.trick.saved_as()

    def places(self) -> list[dict[str, Any]]:
        """Return where each process stands, by their ranks; all of them must ask."""
        loaders: Any = self.loaders  # with an only loader, of whose epoch a batch has come
        trainer, batches = loaders.trainer, self.batches_done()
        drawn = torch.tensor(loaders.order.drawn) if batches else None
        states = plain_states(trainer) | {"generators": [one.get_state() for one in self._generators()]}
        in_epoch = loaders.selection.batches_in_epoch(loaders.epoch)
        place = {"states": states, "batches": batches, "in_epoch": in_epoch, "drawn": drawn}
        if trainer.world_size == 1:
            return [place]
        places: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(places, place)
        return places

    def _generators(self) -> list[torch.Generator]:
        """Return torch's generators that the loader and its sampler hold."""
        source = getattr(self.loaders.selection, "source", None)
        wrapped = getattr(getattr(source, "dataset", None), "_sampler", None)  # by Lightning, for DDP
        held = [value for owner in (self.loader, source, wrapped) for value in getattr(owner, "__dict__", {}).values()]
        return [value for value in held if isinstance(value, torch.Generator)]

    def leave(self, trainer: Trainer) -> None:
        """Let go."""
        Station.of(trainer.fit_loop, "on_advance_start").leave(self)
        Station.of(trainer.fit_loop.epoch_loop, "_on_before_fetch").leave(self)
        super().leave(trainer)
