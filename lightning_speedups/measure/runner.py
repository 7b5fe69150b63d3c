"""Train the same network on the same data plainly and with the tricks, several seeds, arms interleaved."""

from __future__ import annotations

import contextlib
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_speedups.core.counts import counted
from lightning_speedups.measure.arms import Arm, Ingredients, Situation, choose_arms
from lightning_speedups.measure.errors import CompareError, as_compare_error
from lightning_speedups.measure.images import ImageData, quarter_turns
from lightning_speedups.measure.machine import machine_facts, versions
from lightning_speedups.measure.networks import load_backbone
from lightning_speedups.measure.progress import Bar
from lightning_speedups.measure.results import Comparison
from lightning_speedups.measure.runs import Run
from lightning_speedups.measure.settings import Settings
from lightning_speedups.measure.stopwatch import Stopwatch
from lightning_speedups.measure.tasks import TASKS, Data, Task
from lightning_speedups.measure.text import TextData
from lightning_speedups.measure.training import quiet, seeded, train
from lightning_speedups_command import DEFAULT_MODEL

WARM_UP_BATCHES = 8


def interleaved(arms: Sequence[Arm], seeds: Sequence[int], once: bool = False) -> list[tuple[int, Arm]]:
    """The order of the runs: seed by seed, and within a seed every arm once, in an order that the seed shuffles.

    A machine that gets slower or busier over minutes then hurts all arms alike.

    Args:
        arms: The arms.
        seeds: The seeds.
        once: Whether single tricks run with the first seed only.

    Returns:
        (seed, arm) of each run.
    """
    runs = [(seed, arm) for seed in seeds for arm in random.Random(seed).sample(arms, len(arms))]
    return [(seed, arm) for seed, arm in runs if seed == seeds[0] or not (once and arm.single)]


class _Workbench:
    """Builds and trains: what all runs of a comparison share."""

    def __init__(self, task: Task, data: Data, settings: Settings) -> None:
        self.task, self.data, self.settings = task, data, settings
        count, batch_size = len(data.y_train), settings.run_batch_size
        if count < batch_size:
            what = counted(count, f"training {task.sample}")
            raise CompareError(f"`batch_size` {batch_size} is more than the {what}")
        self.batches = count // batch_size
        self.samples_per_epoch = self.batches * data.y_train[:batch_size].numel()
        self._first = self._network(0, data, weights=settings.weights)
        self._pretrained: dict[int, tuple[nn.Module, float]] = {}

    def _network(self, seed: int, data: Data, weights: str | None = None) -> nn.Module:
        with seeded(seed):
            return self.task.network(self.settings, data, weights)

    def _train(self, network: nn.Module, data: Data, recipe: Ingredients, **run: Any) -> None:
        settings = self.settings
        lr, criterion = recipe.one_cycle or settings.run_lr, recipe.criterion
        module = self.task.module(network, data, lr=lr, criterion=criterion, one_cycle=recipe.one_cycle is not None)
        pace = self.task.pace(run["epochs"], self.batches if recipe.loader is None else len(recipe.loader))
        trainer = {"accelerator": settings.accelerator, **pace, **recipe.trainer}
        parts: dict[str, Any] = {"callbacks": recipe.callbacks, "trainer": trainer, "loader": recipe.loader}
        train(module, data, batch_size=settings.run_batch_size, make_loaders=self.task.loaders, **parts, **run)

    def pretrained(self, seed: int, bar: Bar) -> tuple[nn.Module, float]:
        """What a seed's pretrained arms start from, and the seconds that took: weights, or once a run on turns."""
        if self.settings.weights is not None:
            return self._first, 0.0
        if seed not in self._pretrained:
            assert isinstance(self.data, ImageData)
            turned, epochs = quarter_turns(self.data, seed), self.settings.run_pretrain_epochs
            network = self._network(seed, turned)
            watch = bar.watch(f"seed {seed}, pretraining")
            self._train(network, turned, Ingredients(), epochs=epochs, seed=seed, watch=watch)
            self._pretrained = {seed: (network.cpu(), watch.points[-1].seconds)}
        return self._pretrained[seed]

    def run(
        self, seed: int, arm: Arm, epochs: float, watch: Stopwatch, source: nn.Module | None, **trainer: Any
    ) -> None:
        """Train one arm from a seed's weights and those of the source's backbone; the points are in the stopwatch."""
        backbone = "model.backbone" if self.settings.model == DEFAULT_MODEL else None
        lr, accelerator = self.settings.run_lr, self.settings.accelerator
        recipe = arm.build(Situation(epochs, lr, accelerator, backbone, seed, self.data))
        network = self._network(seed, self.data)
        if source is not None:
            load_backbone(network, source)
        recipe = replace(recipe, trainer={**recipe.trainer, **trainer})
        self._train(network, self.data, recipe, epochs=epochs, seed=seed, watch=watch)

    def warm_up(self, arms: Sequence[Arm], bar: Bar, *, named: bool) -> dict[str, str]:
        """A few steps of every arm: what torch prepares once is prepared, and an arm that can't run fails now.

        Gives the arms that can't run and why, baselines and arms that were named excepted.
        """
        left_out = {}
        few: dict[str, Any] = {"limit_train_batches": WARM_UP_BATCHES, "limit_val_batches": 1}
        few |= {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run of a few steps gives the tricks reasons to warn
            for arm in bar.each(arms, "warming up"):
                source = self._first if arm.pretrained else None
                try:
                    with as_compare_error(f"the arm {arm.name!r} can't run: ", MisconfigurationException):
                        self.run(0, arm, 1, Stopwatch(), source, **few)
                except CompareError as error:
                    if named or arm.baseline is None:
                        raise
                    left_out[arm.name] = str(error)
        return left_out


def _folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out)
    with as_compare_error(f"can't write to the folder {folder}: ", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def compare(
    data: ImageData | TextData | str | Path | None = None,
    arms: Sequence[str] | None = None,
    *,
    settings: Settings | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    on_run: Callable[[Comparison], None] | None = None,
    **options: Any,
) -> Comparison:
    """Compare training with the tricks to training without them, on this machine.

    Args:
        data: Images, or the path of an ``.npz`` file or a folder; ``None`` makes collages of handwritten digits. The
            task ``"text"`` has a text of its own, Python's standard library, or takes a `TextData`.
        arms: Names from `lightning_speedups.measure.TASKS`; ``None`` for all that need not be named, but those
            that can't train this model, of which a note tells. Missing baselines are added.
        settings: Size and choices of the comparison.
        out: Folder for ``compare.json`` (rewritten after every run) and ``compare.png``; ``None`` writes nothing.
        progress: Whether to show progress bars on stderr.
        on_run: Called after every run with what was measured so far.
        **options: Fields of `Settings`; they win over those of ``settings``.

    Returns:
        All runs. After a Ctrl-C those so far, with ``interrupted`` set.

    Raises:
        CompareError: If something that was asked for can't be done; nothing has been trained then.
        KeyboardInterrupt: If a Ctrl-C came before the first run.

    Example:
        >>> result = compare(arms=["smoothing"], seeds=1, epochs=1, samples=64, test_samples=50, progress=False)
        >>> sorted(run.arm for run in result.runs if run.complete)
        ['plain', 'smoothing']
    """
    settings = replace(settings, **options) if settings else Settings(**options)
    task = TASKS[settings.task]
    chosen = choose_arms([arms] if isinstance(arms, str) else arms, task.arms)
    if settings.weights is not None and not any(arm.pretrained for arm in chosen):
        raise CompareError("`weights` is what finetune and freeze start from, but neither is among the arms")
    bar = Bar(shown=progress, metric=task.metric)
    with bar:
        samples = task.load(data, settings)
    bench = _Workbench(task, samples, settings)
    folder = _folder(out)
    seeds, epochs = settings.run_seeds, settings.run_epochs
    pretrains = settings.weights is None and any(arm.pretrained for arm in chosen)
    with quiet(), contextlib.ExitStack() as put_back:
        if settings.threads is not None:
            put_back.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.threads)
        with bar:
            left_out = bench.warm_up(chosen, bar, named=arms is not None)
        chosen = tuple(arm for arm in chosen if arm.name not in left_out)
        runs = interleaved(chosen, seeds, once=arms is None)
        run_epochs = sum(task.epochs(arm, epochs) for _, arm in runs)
        run_epochs += pretrains * len(seeds) * settings.run_pretrain_epochs
        result = Comparison(
            baselines={arm.name: arm.baseline for arm in chosen},
            settings={**_described(settings, samples, chosen), "left_out": left_out},
            machine=machine_facts(),
            versions=versions(),
            chance=samples.chance,
            target=settings.target,
            metric=task.metric.name,
        )
        with bar:
            bar.begin("first run", round(run_epochs * bench.samples_per_epoch))
            try:
                for seed, arm in runs:
                    source, seconds = bench.pretrained(seed, bar) if arm.pretrained else (None, 0.0)
                    watch = bar.watch(f"seed {seed}, {arm.name}")
                    run = Run(arm.name, seed, watch.points, pretrain_seconds=seconds)
                    result.runs.append(run)
                    bench.run(seed, arm, task.epochs(arm, epochs), watch, source)
                    run.complete = True
                    if folder is not None:
                        result.save_json(folder)
                    if on_run is not None:
                        on_run(result)
            except KeyboardInterrupt:
                result.interrupted = True
    if folder is not None:
        result.save_json(folder)
        result.save_figure(folder)
    return result


def _described(settings: Settings, data: Data, arms: Sequence[Arm]) -> dict[str, Any]:
    """The settings as they came out for this data."""
    task = TASKS[settings.task]
    return {
        **asdict(settings),
        "data": data.name,
        "batch_size": settings.run_batch_size,
        "lr": settings.run_lr,
        "samples": len(data.y_train),
        "test_samples": len(data.y_test),
        **task.facts(settings, data),
        "classes": data.num_classes,
        "seeds": len(settings.run_seeds),
        "epochs": settings.run_epochs,
        "pretrain_epochs": settings.run_pretrain_epochs if settings.weights is None else None,
        "optimizer": task.optimizer,
        "arms": {arm.name: arm.description for arm in arms},
        "singles": [arm.name for arm in arms if arm.single],
    }
