"""Train the same network on the same images plainly and with the tricks, several seeds, arms interleaved."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_speedups.measure.arms import Arm, Situation, choose_arms
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import ImageData, quarter_turns
from lightning_speedups.measure.loading import load_data
from lightning_speedups.measure.machine import machine_facts, versions
from lightning_speedups.measure.networks import build_network, load_backbone
from lightning_speedups.measure.progress import Bars
from lightning_speedups.measure.results import Comparison
from lightning_speedups.measure.runs import Run
from lightning_speedups.measure.settings import DEFAULT_MODEL, Settings
from lightning_speedups.measure.stopwatch import Stopwatch
from lightning_speedups.measure.training import Classifier, quiet, seeded, train

__all__ = ["compare", "interleaved"]

WARM_UP_BATCHES = 8
TEST_LIMIT = 2000
"""Test images that the caller's own data are limited to unless asked otherwise; they are looked at every epoch."""


def interleaved(arms: Sequence[Arm], seeds: Sequence[int]) -> list[tuple[int, Arm]]:
    """The order of the runs: seed by seed, and within a seed every arm once, in an order that the seed shuffles.

    A machine that gets slower or busier over minutes then hurts all arms alike.

    Args:
        arms: The arms.
        seeds: The seeds.

    Returns:
        (seed, arm) of each run.
    """
    order = []
    for seed in seeds:
        shuffled = list(arms)
        random.Random(seed).shuffle(shuffled)
        order += [(seed, arm) for arm in shuffled]
    return order


class _Workbench:
    """Builds and trains: what all runs of a comparison share."""

    def __init__(self, data: ImageData, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self._pretrained: dict[int, tuple[nn.Module, float]] = {}
        if len(data.y_train) < settings.batch_size:
            raise CompareError(
                f"`batch_size` {settings.batch_size} is more than the {len(data.y_train)} training images"
            )
        self.batches_per_epoch = len(data.y_train) // settings.batch_size
        with seeded(0):
            self._network()
            self._given = None if settings.weights is None else self._network(weights=settings.weights)

    def _network(self, data: ImageData | None = None, weights: str | None = None) -> nn.Module:
        return build_network(self.settings.model, data or self.data, width=self.settings.width, weights=weights)

    def module(self, seed: int, arm: Arm, criterion: nn.Module) -> Classifier:
        """The LightningModule of a run; its initial weights depend on the seed and ``arm.pretrained`` alone."""
        with seeded(seed):
            network = self._network()
        if arm.pretrained:
            load_backbone(network, self._pretrained[seed][0])
        return Classifier(network, self.data.num_classes, lr=self.settings.lr, criterion=criterion)

    def pretrain(self, seed: int, bars: Bars) -> float:
        """Train the seed's network on quarter turns once, unless weights are given; gives the seconds that took."""
        if self._given is not None:
            self._pretrained = {seed: (self._given, 0.0)}
        if seed not in self._pretrained:
            task = quarter_turns(self.data, seed)
            epochs = self.settings.run_pretrain_epochs
            with seeded(seed):
                network = self._network(task)
            watch = bars.watch(f"seed {seed}, pretraining", self.settings.batch_size, epochs * self.batches_per_epoch)
            module = Classifier(network, task.num_classes, lr=self.settings.lr)
            points = self._train(module, task, epochs, seed, {}, watch=watch)
            self._pretrained = {seed: (network.cpu(), points[-1].seconds)}
        return self._pretrained[seed][1]

    def _train(
        self, module: Classifier, data: ImageData, epochs: int, seed: int, trainer: dict[str, Any], **more: Any
    ) -> Any:
        arguments = {"accelerator": self.settings.accelerator, **trainer}
        size = self.settings.batch_size
        return train(module, data, batch_size=size, epochs=epochs, seed=seed, trainer=arguments, **more)

    def run(self, seed: int, arm: Arm, watch: Stopwatch, epochs: int, **trainer: Any) -> None:
        """Train one arm; the points are in the stopwatch."""
        backbone = "model.backbone" if self.settings.model == DEFAULT_MODEL else None
        recipe = arm.build(Situation(epochs, self.settings.lr, self.settings.accelerator, backbone, seed))
        module = self.module(seed, arm, recipe.criterion)
        arguments = {**recipe.trainer, **trainer}
        self._train(module, self.data, epochs, seed, arguments, callbacks=recipe.callbacks, watch=watch)

    def warm_up(self, arms: Sequence[Arm]) -> None:
        """A few steps of every arm: what torch prepares once is prepared, and an arm that can't run fails now."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run of a few steps gives the tricks reasons to warn
            for arm in arms:
                if arm.pretrained:
                    with seeded(0):
                        self._pretrained = {0: (self._network() if self._given is None else self._given, 0.0)}
                try:
                    watch = Stopwatch(self.settings.batch_size)
                    self.run(0, arm, watch, 1, limit_train_batches=WARM_UP_BATCHES, limit_val_batches=1)
                except MisconfigurationException as error:
                    raise CompareError(f"the arm {arm.name!r} can't run: {' '.join(str(error).split())}") from error
        self._pretrained = {}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _images(data: ImageData | str | Path | None, settings: Settings) -> ImageData:
    if data is None:
        if settings.image_size is not None:
            raise CompareError("`image_size` is for folders of images; it needs `data`, the path of a folder")
        return digit_collages(*settings.collages)
    if not isinstance(data, ImageData):
        data = load_data(data, image_size=settings.image_size, samples=settings.samples)
    return data.limited(settings.samples, settings.test_samples or TEST_LIMIT)


def _folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "compare.json.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CompareError(f"can't write to the folder {folder}: {error.strerror or error}") from error
    return folder


def compare(
    data: ImageData | str | Path | None = None,
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
        data: Images, or the path of an ``.npz`` file or a folder; ``None`` makes collages of handwritten digits.
        arms: Names from `lightning_speedups.measure.ARMS`; ``None`` for all that need not be named. Missing baselines
            are added.
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
        >>> [run.arm for run in result.runs if run.complete]
        ['plain', 'smoothing']
    """
    settings = replace(settings, **options) if settings else Settings(**options)
    chosen = choose_arms([arms] if isinstance(arms, str) else arms)
    if settings.weights is not None and not any(arm.pretrained for arm in chosen):
        raise CompareError("`weights` is what finetune and freeze start from, but neither is among the arms")
    images = _images(data, settings)
    bench = _Workbench(images, settings)
    folder = _folder(out)
    seeds, epochs = settings.run_seeds, settings.run_epochs
    batches = len(seeds) * sum(arm.epochs(epochs) for arm in chosen) * bench.batches_per_epoch
    if settings.weights is None and any(arm.pretrained for arm in chosen):
        batches += len(seeds) * settings.run_pretrain_epochs * bench.batches_per_epoch
    with quiet(), _threads(settings.threads):
        result = Comparison(
            baselines={arm.name: arm.baseline for arm in chosen},
            settings=_described(settings, images, chosen),
            machine=machine_facts(),
            versions=versions(),
            chance=images.chance,
            target=settings.target,
        )
        with Bars(batches, progress) as bars:
            bench.warm_up(chosen)
            try:
                for seed, arm in interleaved(chosen, seeds):
                    seconds = bench.pretrain(seed, bars) if arm.pretrained else 0.0
                    length = arm.epochs(epochs)
                    watch = bars.watch(
                        f"seed {seed}, {arm.name}", settings.batch_size, length * bench.batches_per_epoch
                    )
                    run = Run(arm.name, seed, watch.points, pretrain_seconds=seconds)
                    result.runs.append(run)
                    bench.run(seed, arm, watch, length)
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


def _described(settings: Settings, images: ImageData, arms: Sequence[Arm]) -> dict[str, Any]:
    count, channels, height, width = images.x_train.shape
    return {
        "data": images.name,
        "samples": count,
        "test_samples": len(images.y_test),
        "image": [channels, height, width],
        "classes": images.num_classes,
        "model": settings.model,
        "width": settings.width,
        "seeds": len(settings.run_seeds),
        "epochs": settings.run_epochs,
        "weights": settings.weights,
        "pretrain_epochs": settings.run_pretrain_epochs if settings.weights is None else None,
        "batch_size": settings.batch_size,
        "lr": settings.lr,
        "optimizer": "SGD, Nesterov momentum 0.9, weight decay 5e-4",
        "target": settings.target,
        "accelerator": settings.accelerator,
        "arms": {arm.name: arm.description for arm in arms},
    }
