"""The sweep of a learning-rate range test (Smith, arXiv:1506.01186), on a copy of the model with a Trainer of its own.

Nothing of the user's is trained, moved or drawn from: model, optimizers, loaders and random states are afterwards what
they were, also when the model raises.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CellType, FunctionType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_speedups.attach.copies import NoCopyError, copy_module, dummy_loggers, flat, require_copyable
from lightning_speedups.attach.packages import MisconfigurationException, class_of, is_a, is_overridden
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.run_length import accumulation, raw_optimizers
from lightning_speedups.attach.schedulers import SchedulersAtRest
from lightning_speedups.attach.steps import OptimizerTrick, ValueOrder
from lightning_speedups.core.range_test import Sweep, diverged, smooth, sweep_rate

WAY_OUT = "Give the learning rate as a number."


@contextmanager
def _telling_the_way_out() -> Iterator[None]:
    try:
        yield
    except NoCopyError as error:
        raise MisconfigurationException(
            f"The learning-rate range test trains a copy of the whole model on one device, but {error}. {WAY_OUT}"
        ) from error


@_telling_the_way_out()
def run_range_test(
    trainer: Trainer,
    pl_module: LightningModule,
    sweep: Sweep,
    loaders: Any = None,
    datamodule: LightningDataModule | None = None,
) -> tuple[list[float], list[float], list[float]]:
    """Train a copy of a module with an exponentially rising rate, and note the loss of each step.

    The copy is trained like the module: same device, precision, gradient clipping, hooks and batches in each step, but
    without the Trainer's callbacks and loggers, without validation, and with one rate for all parameter groups. With
    several processes the first one sweeps alone, accumulating over as many batches as all of them would take, and tells
    the others.

    A ``DataLoader`` is copied without its dataset, with its samplers and generators. Any other loader gets back the
    state it had if it has ``state_dict`` and ``load_state_dict``; else it is iterated as it is, and so are datasets,
    whatever they keep to themselves.

    Args:
        trainer: The Trainer to imitate, before a fit or in ``on_train_start``.
        pl_module: The module, without a wrapper.
        sweep: Which rates, and when to stop; steps that GradScaler skips do not count.
        loaders: Training loaders: an iterable or a nested collection of them. None: those of the running fit, or of the
            ``train_dataloader`` hook.
        datamodule: The datamodule of a fit that is still to come; that of a running one is the Trainer's own.

    Returns:
        The rates; the raw loss at each of them, averaged over the batches of the step; and the module's own rate for
        each parameter group.

    Raises:
        MisconfigurationException: If the optimization is manual, if there is not exactly one optimizer, if the strategy
            splits parameters between devices, or if the module or a loader's sampler cannot be copied.
        Exception: What the copy raises, with a note that says where in the sweep.
    """
    require_copyable(trainer, pl_module)
    run = RangeTest(sweep)
    failure: Exception | None = None
    if trainer.world_size == 1 or not torch.distributed.is_initialized() or trainer.is_global_zero:
        try:
            _fit_a_copy(trainer, pl_module, loaders, datamodule, run)
        except Exception as error:
            error.add_note(run.place())
            failure = error
    told = failure and f"{type(failure).__name__}: {failure}"
    # told to all, or those that wait for the losses would wait for ever
    losses, own, told = trainer.strategy.broadcast((run.losses, run.own, told))
    if failure is not None:
        raise failure
    if told is not None:
        raise RuntimeError(f"The learning-rate range test failed in the first process: {told}")
    return run.rates[: len(losses)], losses, own


def _fit_a_copy(
    trainer: Trainer, pl_module: LightningModule, loaders: Any, datamodule: LightningDataModule | None, run: RangeTest
) -> None:
    running = trainer.state.status == "running" and trainer.lightning_module is pl_module
    if running:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        combined = trainer.fit_loop._combined_loader
        if combined is not None and (loaders is None or loaders is combined.iterables):
            loaders = combined

    with ExitStack() as undo:
        undo.enter_context(same_randomness(trainer))
        undo.enter_context(_quiet(trainer))
        twin = _copy(trainer, pl_module, [datamodule, loaders])
        twin_data = copy.copy(datamodule)
        _silence(twin, "configure_callbacks")
        if running:  # what is set up is copied: once is enough
            _silence(twin, "prepare_data", "setup", "configure_model", "configure_sharded_model", "teardown")
            if twin_data is not None:
                _silence(twin_data, "prepare_data", "setup", "teardown", "on_exception")
        owner: Any = twin if twin_data is None else twin_data
        hook = owner.train_dataloader
        owner.__dict__["train_dataloader"] = lambda: _copy_loaders(
            trainer, hook() if loaders is None else loaders, undo
        )
        hidden = not shows_progress(trainer)
        run.bar = undo.enter_context(Tqdm(total=len(run.rates), desc="LR range test", leave=False, disable=hidden))
        inner = _imitate(trainer)
        inner.callbacks = [run]  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        inner.fit(twin, datamodule=twin_data)


class RangeTest(OptimizerTrick):
    """Sets the rate of each step, notes its loss, and ends the run."""

    order = ValueOrder.ABSOLUTE

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self.grips = (SchedulersAtRest(self),)
        self.sweep = sweep
        self.rates = [sweep_rate(step, sweep.steps, sweep.min_lr, sweep.max_lr) for step in range(sweep.steps)]
        self.losses: list[float] = []  # of the steps that were done
        self.own: list[float] = []  # rates that the module gave its parameter groups
        self.bar: Any = None
        self._window: list[float] = []  # losses of the batches of the step under way
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no single rate, and let the run go on until the sweep ends it."""
        optimizers = raw_optimizers(trainer)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if len(optimizers) != 1 or not groups or not all("lr" in group for group in groups):
            names = " and ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
            raise MisconfigurationException(
                "The learning-rate range test drives one optimizer with an `lr`, but configure_optimizers gave "
                f"{names}. {WAY_OUT}"
            )
        super().on_fit_start(trainer, pl_module)
        self.own = [float(group["lr"]) for group in groups]
        loop = trainer.fit_loop
        # Only now, so that configure_optimizers has seen the length of the user's run. Skipped steps count here.
        loop.max_epochs, loop.epoch_loop.max_steps = -1, 2 * len(self.rates)

    def place(self) -> str:
        """Say where in the sweep an error has been raised."""
        done = min(len(self.losses), len(self.rates) - 1)
        step = f"step {done + 1} of {len(self.rates)}, at the rate {self.rates[done]:.3g}" if self.own else "its set-up"
        return f"This was raised in a learning-rate range test, on a copy of the module: in {step}."

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set the rate of the step."""
        return {"lr": self.rates[len(self.losses)]}

    def stepped(self, optimizer: int) -> None:
        """Note that the step was a real one."""
        super().stepped(optimizer)
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of a step, and end the sweep where it diverges."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if "loss" in outputs:  # else training_step has skipped the batch
            self._window.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return  # more batches belong to this step
        if self._window and self._stepped:
            self.losses.append(sum(self._window) / len(self._window))
            self.bar.update()
            smoothed = smooth(self.losses, self.sweep.beta)
            if len(self.losses) == len(self.rates) or diverged(smoothed[-1], min(smoothed), self.sweep.stop_factor):
                trainer.should_stop = True
        self._window, self._stepped = [], False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a sweep that has no more batches."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:  # the loader has run dry, and will stay so
            trainer.should_stop = True


def _imitate(trainer: Trainer) -> Trainer:
    """Make a Trainer for one device that treats a module as the user's does."""
    inner: Trainer = class_of(trainer, "Trainer")(
        accelerator=trainer.accelerator,
        strategy=class_of(trainer, "strategies.SingleDeviceStrategy")(trainer.strategy.root_device),
        devices=1,
        plugins=[copy.deepcopy(trainer.precision_plugin)],
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        limit_train_batches=trainer.limit_train_batches,
        limit_val_batches=0,
        accumulate_grad_batches=accumulation(trainer, trainer.current_epoch) * trainer.world_size,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        logger=dummy_loggers(trainer) or False,  # training_step may speak to them
        default_root_dir=trainer.default_root_dir,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_autolog_hparams=False,
    )
    return inner


def _copy(trainer: Trainer, pl_module: LightningModule, shared: Iterable[Any]) -> LightningModule:
    """Copy a module, parameters and all, that can train by itself."""
    twin = copy_module(trainer, pl_module, shared)
    for place in _functions_on(pl_module, twin):
        raise NoCopyError(
            f"`{place}` is a function that has captured {type(pl_module).__name__} itself, and would go on to use it; "
            "make it a method or a functools.partial"
        )
    _forget_other_processes(twin)
    return twin


def _functions_on(pl_module: LightningModule, twin: LightningModule) -> Iterator[str]:
    """Find lambdas and nested functions in a copy that have captured the original: they are shared, not copied."""
    parts = {id(module) for module in pl_module.modules()}
    for name, module in twin.named_modules():
        for key, value in vars(module).items():
            if any(parts & _captured(entry) for entry in flat([value])):
                yield f"{name}.{key}".lstrip(".")


def _captured(function: Any) -> set[int]:
    """Return the ids of what a function has captured; of a bound method the object's."""
    cells = (function.__closure__ or ()) if isinstance(function, FunctionType) else ()
    full = (cell.cell_contents for cell in cells if cell != CellType())
    return {id(getattr(thing, "__self__", thing)) for thing in full}


def _forget_other_processes(twin: LightningModule) -> None:
    """Let metrics and normalisation in a copy not wait for processes that do not train it."""
    for module in twin.modules():
        if isinstance(module, Metric):
            module.distributed_available_fn = lambda: False
    if any(isinstance(module, nn.SyncBatchNorm) for module in twin.modules()):
        class_of(twin, "plugins.TorchSyncBatchNorm")().revert(twin)


def _copy_loaders(trainer: Trainer, loaders: Any, undo: ExitStack) -> Any:
    mode = "max_size_cycle"  # Lightning's own choice for training
    if is_a(loaders, "CombinedLoader"):
        loaders, mode = loaders.iterables, loaders._mode
    combined = class_of(trainer, "utilities.combined_loader.CombinedLoader")(loaders, mode)
    combined.flattened = [_copy_loader(loader, undo) for loader in combined.flattened]
    return combined


def _copy_loader(loader: Any, undo: ExitStack) -> Any:
    """Copy a DataLoader with its order but not its data, or see to it that another loader gets its state back."""
    if isinstance(loader, DataLoader):
        kind = type(loader).__name__
        if kept := [key for key, value in vars(loader).items() if hasattr(value, "__next__") and key != "_iterator"]:
            raise MisconfigurationException(
                f"The learning-rate range test cannot copy {kind}, which keeps an iterator (`{kept[0]}`) over its "
                f"epochs. {WAY_OUT}"
            )
        twin = copy.copy(loader)
        dataset: Any = loader.dataset
        memo = {}
        while dataset is not None:  # a subset's sampler may hold the whole
            memo[id(dataset)] = dataset
            dataset = getattr(dataset, "dataset", None)
        # Past DataLoader's own __setattr__, which forbids this.
        for name in ("generator", "sampler", "batch_sampler"):
            try:
                vars(twin)[name] = copy.deepcopy(getattr(loader, name), memo)
            except Exception as error:
                raise MisconfigurationException(
                    f"The learning-rate range test cannot copy the {name} of {kind} ({error}). {WAY_OUT}"
                ) from error
        vars(twin)["_iterator"] = None  # of persistent workers
        return twin
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        undo.callback(loader.load_state_dict, copy.deepcopy(loader.state_dict()))
    return loader


@contextmanager
def _quiet(trainer: Trainer) -> Iterator[None]:
    """Keep back what Lightning says about the second Trainer: it has said it, or will say it, about the user's."""
    log: logging.Logger = rank_zero_module.log
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", class_of(trainer, "utilities.warnings.PossibleUserWarning"))
            yield
    finally:
        log.setLevel(level)


def shows_progress(trainer: Trainer) -> bool:
    """Tell whether another progress bar may be shown for a while.

    Args:
        trainer: The Trainer.
    """
    bar: Any = trainer.progress_bar_callback
    # A rich bar that is already there would be torn by another one.
    return bar is not None and bar.is_enabled and getattr(bar, "progress", None) is None


def _silence(owner: Any, *names: str) -> None:
    """Replace methods of one instance by nothing."""
    owner.__dict__.update(dict.fromkeys((name for name in names if is_overridden(name, owner)), _nothing))


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
