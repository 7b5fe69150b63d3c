"""An average of the weights over the last part of the run takes their place in evaluation (Polyak & Juditsky, 1992; its
length as a share of the run: Ajroldi et al., arXiv:2502.06761).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_speedups.attach.copies import require_whole
from lightning_speedups.attach.packages import is_a
from lightning_speedups.attach.rehearsal import Statistics, fresh_statistics, norms_of, swap_statistics
from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.stations import Station
from lightning_speedups.attach.steps import OptimizerTrick, Steps, ValueOrder
from lightning_speedups.attach.trick import callbacks_of
from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.durations import Duration, RunFacts
from lightning_speedups.modules.averages import averaged_tensors, exchange, share_kept


@dataclass
class Averages(Steps):
    """What a checkpoint holds.

    Attributes:
        held: By name, the weights that the module does not hold: their average, or in a checkpoint and after the fit,
            where the module holds that, the weights themselves.
        holds_raw: Whether it is the weights themselves.
    """

    held: dict[str, Tensor] = field(default_factory=dict)
    holds_raw: bool = False


@dataclass
class Run:
    """What else belongs to a run.

    Attributes:
        pairs: The module's tensors, each with its average; empty before training.
        horizon: Steps that it reaches back over.
        every: Steps from one update to the next.
        recent: The last training batches, where there are norms that need them.
        is_fresh: Whether the average's norms have the statistics of these.
    """

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    horizon: float = 1.0
    every: int = 1
    recent: deque[Any] = field(default_factory=deque)
    is_fresh: bool = False


class AveragedWeights(OptimizerTrick):
    """Keeps an exponential average of the weights, and evaluates it: validation sees the average, training does not.

    Averaging takes the noise out that a high learning rate leaves in the weights, much as a decay of the rate does, but
    at any time of the run. It reaches back over about 1 % of the run, whatever its length: the decay of 0.999 that is
    often seen is a horizon of 1,000 steps, and in a short run an average of weights that know nothing yet.

    BatchNorm gets the statistics that the averaged weights themselves have on the last training batches, from
    ``training_step`` on a copy of the module that shares its parameters: before a validation, at the end of an epoch,
    and where a checkpoint is made. Where no step can be run so (as in manual optimization), and without
    ``refresh_batches``, it gets the average of its running statistics.

    For the time of a validation the average stands in the module, and after the fit it stays there. After an
    exception, Ctrl-C included, the module has the training's weights. A checkpoint's ``state_dict`` is the average,
    also where only weights are saved, so that ``load_from_checkpoint`` gives what was evaluated; a full checkpoint
    holds the training's weights as well, and a resumed run goes on from these to the same bits; BatchNorm's statistics
    for the average come from the batches since the resume, if these are fewer than ``refresh_batches``. A run that goes
    on without this trick starts from the average.

    It costs one copy of the parameters in memory, one more while a checkpoint is made, the last batches, a pass over
    the parameters every few steps, and a few forward passes before each validation.

    When not to use it: where the rate goes down to almost nothing at the end, which leaves no noise to take out; with
    weights in half precision (use ``precision="bf16-mixed"``), models that are split between devices, or several
    optimizers.

    Args:
        horizon: Steps that the average reaches back over: 1 / (1 − decay). A whole number of optimizer steps, a float
            in (0, 1] as a fraction of the run, or a text like ``"500 steps"``, ``"2 epochs"`` and ``"1%"``. In manual
            optimization a fraction of the run is one of its batches, as if each made a step.
        every: Optimizer steps from one update of the average to the next, 1 or more, with a decay to match. None: a
            quarter of the horizon, but 5 at most.
        refresh_batches: How many of the last training batches give BatchNorm its statistics for the average; they are
            kept on the device. 0: average its running statistics.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if the horizon depends on a length that is not known, if there are
            several optimizers, weights in half precision that train, a strategy that may split the model, or another
            callback that averages weights.

    Source:
        Ajroldi et al., arXiv:2502.06761 (the horizon); Izmailov et al., arXiv:1803.05407 (averages in place of decay).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AveragedWeights()])
    """

    order, keys = ValueOrder.FINAL, ()
    saved_as, run_as = Averages, Run
    saved: Averages
    run: Run

    def __init__(self, horizon: int | float | str = 0.01, every: int | None = None, refresh_batches: int = 4) -> None:
        super().__init__()
        self.horizon = Duration.parse("horizon", horizon)
        check_number("horizon", self.horizon.amount, 0, above=True)
        check_number("every", every, 1, whole=True, optional=True)
        check_number("refresh_batches", refresh_batches, 0, whole=True)
        self.every, self.refresh_batches = every, refresh_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take a place where the fit validates, and where the module's state is saved."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            for place, act in zip(places(trainer), (self._evaluate, self._averaged_state), strict=True):
                place.join(self, partial(act, trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what it cannot average."""
        super().on_fit_start(trainer, pl_module)
        require_whole(self, trainer, "weights")
        for one in callbacks_of(trainer):
            if is_a(one, "WeightAveraging", "StochasticWeightAveraging"):
                raise self.refusal(f"averages weights, and so does {type(one).__name__}", "Use one of them.")
        for name, weight in averaged_tensors(pl_module).items():
            if weight.requires_grad and weight.dtype.itemsize < 4:
                what = f"cannot add small changes to weights in half precision, but `{name}` is in {weight.dtype}"
                raise self.refusal(what, "Use `Trainer(precision='bf16-mixed')`, with weights in single precision.")
        if (count := len(raw_optimizers(trainer))) != 1:
            what = f"averages all weights by the steps of one optimizer, but this module has {count}"
            raise self.refusal(what, "Leave it out, or use one optimizer.")

    def plan(self, run: RunFacts) -> None:
        """Settle the horizon."""
        super().plan(run)
        self.run.horizon = max(1.0, *self._steps_of_parts(run, run.steps or run.batches, horizon=self.horizon))
        self.run.every = self.every or max(1, min(5, int(self.run.horizon / 4)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average, or go on with it."""
        super().on_train_start(trainer, pl_module)
        self._settle(pl_module)
        rank_zero_info(f"{self.name}: averages over {self.run.horizon:g} steps, updated every {self.run.every}.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch; go on where one of Lightning's finders has loaded a checkpoint in the middle of the run."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.saved.holds_raw:
            self._settle(pl_module)
        self.run.is_fresh = False
        self.run.recent.append(batch)

    def _settle(self, pl_module: LightningModule) -> None:
        """Make the average, from a checkpoint's if there was one, and see that the module has the training's weights.

        A checkpoint has left the average in the module.
        """
        tensors, loaded = averaged_tensors(pl_module), self.saved.held
        pairs = {id(tensor): (tensor, tensor.detach().clone()) for tensor in tensors.values()}  # tied ones once
        self.run.pairs = list(pairs.values())
        self.saved.held = {name: pairs[id(tensor)][1] for name, tensor in tensors.items()}
        self.saved.holds_raw, self.run.recent = False, deque(maxlen=self.refresh_batches * bool(norms_of(pl_module)))
        with torch.no_grad():
            for name in tensors.keys() & loaded.keys():
                tensors[name].copy_(loaded[name])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of whoever compiles the optimizer's step
    @torch.no_grad()
    def stepped(self, optimizer: int) -> None:
        """Count, and update the average; the first update takes the weights as they are."""
        super().stepped(optimizer)
        if self.run.pairs and self.steps_done[0] % self.run.every == 0:
            is_first = self.steps_done[0] == self.run.every
            kept = 0.0 if is_first else share_kept(self.run.horizon, self.steps_done[0], self.run.every)
            tensors, averages = zip(*self.run.pairs, strict=True)
            torch._foreach_lerp_(averages, tensors, 1 - kept)

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set nothing."""
        return {}

    def _refresh(self, trainer: Trainer) -> None:
        """Give the average's norms the statistics that they have on the last batches, unless that was done."""
        if self.run.is_fresh or self.saved.holds_raw or not self.run.recent:
            return
        self.run.is_fresh, module = True, trainer.lightning_module
        norms: Any = norms_of(module)  # those that do not train keep their own
        own: Statistics = {name: (one.running_mean.clone(), one.running_var.clone()) for name, one in norms.items()}
        self._turn()
        try:
            swap_statistics(module, own | fresh_statistics(trainer, module, self.run.recent))
        except Exception as error:
            self.run.recent = deque(maxlen=0)
            rank_zero_warn(
                f"For BatchNorm, {self.name} falls back, and takes the average of its running statistics: "
                f"{str(error) or repr(error)}. `refresh_batches=0` does so from the start."
            )
        finally:
            self._turn()

    def _evaluate(self, trainer: Trainer, run: Callable[[], Any]) -> Any:
        """Validate the average; the training's weights are put back, also after an exception."""
        self._refresh(trainer)
        self._turn()
        try:
            return run()
        finally:
            self._turn()

    def _turn(self) -> None:
        """Exchange the module's weights and their average, once there is one."""
        if self.run.pairs:
            exchange(self.run.pairs)
            self.saved.holds_raw = not self.saved.holds_raw

    def _averaged_state(self, trainer: Trainer, state_dict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the module's state with the average in it."""
        self._refresh(trainer)
        state = state_dict()
        if not self.saved.holds_raw:
            state.update({name: one for name, one in self.saved.held.items() if name in state})
        return state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give a full checkpoint the training's weights beside the average, also after an exception."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.saved.held and not self.saved.holds_raw:
            checkpoint["state_dict"] = self._averaged_state(trainer, lambda: checkpoint["state_dict"])
            raw = {name: tensor.detach() for name, tensor in averaged_tensors(pl_module).items()}
            checkpoint["callbacks"][self.state_key] |= {"held": raw, "holds_raw": True}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh the average before others end what they do to the module."""
        super().on_train_epoch_end(trainer, pl_module)
        self._refresh(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        super().on_train_end(trainer, pl_module)
        self._turn()

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the places."""
        super().undo(trainer, pl_module)
        for place in places(trainer):
            place.leave(self)


def places(trainer: Trainer) -> tuple[Station, Station]:
    """Return where the fit validates, and where the module's state is taken for a file."""
    loop, strategy = trainer.fit_loop.epoch_loop.val_loop, trainer.strategy
    return Station.of(loop, "run"), Station.of(strategy, "lightning_module_state_dict")
