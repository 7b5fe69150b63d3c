"""Transfer learning: train the head on a frozen backbone first, then the backbone too, at once or layer by layer, at a
lower rate (fastai's ``fine_tune``; gradual unfreezing and rates by depth: ULMFiT, arXiv:1801.06146).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypedDict, Unpack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_speedups.core.arguments import check_number
from lightning_speedups.core.counts import counted
from lightning_speedups.core.durations import Duration, RunFacts
from lightning_speedups.core.plateau import Mode, Plateau
from lightning_speedups.modules.layers import HEAD, Layer, rates_by_depth, split_layers
from lightning_speedups.modules.unfreezing import Names, Stage, all_names, check_schedule, gradually, stages
from lightning_speedups.tricks.transfer.base import Backbone, Freezing, FreezingTrick, GroupLabels


class PlateauArguments(TypedDict, total=False):
    """A `Plateau`, argument by argument, as it was given before there was one."""

    monitor: str | None
    mode: Mode
    patience: int
    min_delta: float


class LoggedBy(Enum):
    """Where the metric comes from that decides when the next layer thaws."""

    UNKNOWN = auto()
    """A validation is still to come that may log it."""
    VALIDATION = auto()
    TRAINING = auto()
    """A validation has passed without it, or there is none."""


@dataclass
class Progress(GroupLabels):
    """What a checkpoint holds.

    Attributes:
        stage: The stage under way.
        due: With a plateau, the stage of the next epoch.
        best: The best value of the metric so far; of one that shall grow, its negative.
        waited: How many times in a row it has not improved.
        thawed: The layers that began to train after the start, and the steps of each optimizer at that time.
        head: The layer that stands for a head where nothing else trains, by name, or ``"head"``.
    """

    stage: int = 0
    due: int = 0
    best: float = math.inf
    waited: int = 0
    thawed: dict[str, list[int]] = field(default_factory=dict)
    head: str = HEAD


@dataclass
class Stages(Freezing):
    """What else belongs to a run.

    Attributes:
        stages: Which layers train when.
        rate_of: Rate of each layer over the head's.
        warmup_steps: Length of the ramp of what was thawed.
        logged_by: Where the metric comes from.
        value_before: The metric before the validation under way.
    """

    stages: list[Stage] = field(default_factory=list)
    rate_of: dict[str, float] = field(default_factory=dict)
    warmup_steps: float = 0.0
    logged_by: LoggedBy = LoggedBy.UNKNOWN
    value_before: Any = None


class FreezeBackboneFinetune(FreezingTrick):
    """Freezes a backbone for the first epochs, then trains it too, its layers at fractions of the learning rate.

    Frozen means frozen: no gradient, no graph up to the first layer that trains, weights and running statistics equal
    to the bit whatever the optimizer does, eval mode after every ``.train()`` (no dropout, no stochastic depth; but for
    recurrent layers), no optimizer state, unless the optimizer makes that once and for all.
    Frozen convolutions take the BatchNorm behind them in for that time; checkpoints hold the weights as they are.
    Optimizers are built with the backbone in parameter groups of its own from the start, so no scheduler or checkpoint
    ever sees a group appear. DDP is re-wrapped when layers move: frozen parameters cost no communication, and ranks
    stay equal. ``configure_optimizers`` gives all parameters to the optimizer, as without this callback.

    Where nothing outside the backbone trains, its last layer takes the head's place: it trains at its own rate, and the
    schedule must name it. Parameters that a frozen layer shares with the head are warned of.

    Layers are timm's own (``"stem"``, ``"layer1"``, … of a ResNet, ``"blocks.0"``, … of a ViT). Of other backbones each
    block of their one list of like blocks is one, with all that stands before them for the first and all that follows
    for the last (``"embeddings"``, ``"encoder.layer.0"``, …, ``"pooler"`` of a BERT); without such a list, each child
    is one, and they are called one after the other. An error about a name lists them. Layers that always do the same
    share a parameter group; a scheduler of yours that takes one value for each group needs one for each of these, which
    come last, and a run resumes with the groups it was begun with.

    When not to use it: from random weights, where the frozen phase is lost time; under FSDP or model parallelism (it
    refuses).

    Args:
        backbone: Attribute path in the LightningModule; a list of paths, as of several encoders, each with layers and
            rates by depth of its own; a callable that takes the module and returns one or several modules (a layer
            each); or None: the network in one of the module's attributes, or the module itself, but for its head. That
            is timm's classifier, what lies outside a Hugging Face model's ``base_model``, what
            ``get_output_embeddings()`` returns, or what is called ``fc``, ``classifier``, ``head``, ``heads``
            or ``lm_head``.
        unfreeze_at_epoch: First epoch, counted from 0, in which the backbone trains; 0 freezes nothing, None keeps it
            frozen. With ``gradual`` the first epoch of the last layer; with ``schedule`` it says nothing.
        backbone_lr_ratio: Backbone's learning rate over the head's, above 0; it multiplies whatever schedules give. A
            pair: of the first and of the last layer, geometric between. None: 0.1, unless ``lr_decay`` is given.
        train_norm: Let the backbone's norms go on training while it is frozen. Costs most of the saving, as the
            backward pass must reach them.
        lr_decay: In (0, 1]: rate of each layer over the next one's, and of the last one over the head's.
        head_lr_ratio: Head's learning rate over its own while nothing else trains, above 0.
        unfreeze_warmup: Ramp of what was thawed, to its rate: optimizer steps, a float as a fraction of the run, or a
            text like ``"1 epoch"``.
        schedule: Which layers begin to train in which epoch, such as ``{0: "head", 2: "layer4", 4: ["layer3",
            "layer2"]}``. Names are paths, in the backbone or from the module on, and mean all layers under them; a
            module inside a layer becomes one of its own. ``"all"`` is all. In a pattern like ``"encoder.layer.*"``,
            ``*`` stands for one step of a path: the last match begins in that epoch, the one before it
            ``every_n_epochs`` later, and so on. What is never named stays frozen.
        refreeze: Which of them stop again, in the same form; matches of a pattern from the first on.
        gradual: Thaw one layer after the other, from the last one down: True: by epochs;
            [Plateau][lightning_speedups.core.plateau.Plateau]``("val_loss")``: when that logged metric has not
            improved, not before ``unfreeze_at_epoch``.
        every_n_epochs: With ``gradual=True``, and with a pattern: epochs from one layer to the next, 1 or more.
        fold: Compute a frozen convolution and its frozen BatchNorm as one.
        **plateau: ``monitor``, ``mode``, ``patience`` and ``min_delta``, with ``gradual=True`` the same as
            ``gradual=Plateau(...)``.

    Raises:
        ValueError: If an argument is out of range, or two of them contradict each other.
        MisconfigurationException: At fit start, if there is no such backbone or layer, no head is found or several, the
            optimizer lacks the backbone's parameters, nothing would be left to train, or the strategy cannot follow;
            after the first epoch, if there is no such metric.

    Source:
        Howard & Gugger, fastai, arXiv:2002.04688; Howard & Ruder, ULMFiT, arXiv:1801.06146; ``lr_decay``: Bao et al.,
        BEiT, arXiv:2106.08254.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FreezeBackboneFinetune("backbone", unfreeze_at_epoch=2)])
        >>> trainer = Trainer(callbacks=[FreezeBackboneFinetune(None, gradual=True, lr_decay=0.65)])
        >>> trainer = Trainer(callbacks=[FreezeBackboneFinetune(None, gradual=Plateau("val_loss", patience=2))])
        >>> trainer = Trainer(callbacks=[FreezeBackboneFinetune("bert", schedule={0: "head", 1: "encoder.layer.*"})])
    """

    saved_as, run_as = Progress, Stages
    saved: Progress
    run: Stages

    def __init__(
        self,
        backbone: Backbone = "backbone",
        unfreeze_at_epoch: int | None = 1,
        backbone_lr_ratio: float | tuple[float, float] | None = None,
        train_norm: bool = False,
        *,
        lr_decay: float | None = None,
        head_lr_ratio: float = 1.0,
        unfreeze_warmup: int | float | str = 0,
        schedule: Mapping[int, Names] | None = None,
        refreeze: Mapping[int, Names] | None = None,
        gradual: bool | Plateau = False,
        every_n_epochs: int = 1,
        fold: bool = True,
        **plateau: Unpack[PlateauArguments],
    ) -> None:
        super().__init__(backbone, train_norm, fold)
        check_number("unfreeze_at_epoch", unfreeze_at_epoch, 0, whole=True, optional=True)
        self.rates = _checked_rates(backbone_lr_ratio, lr_decay)
        check_number("head_lr_ratio", head_lr_ratio, 0, above=True)
        check_schedule("schedule", schedule)
        check_schedule("refreeze", refreeze)
        check_number("every_n_epochs", every_n_epochs, 1, whole=True)
        self.plateau = _checked_plateau(gradual, {**plateau}, refreeze)
        if schedule is not None and gradual:
            raise ValueError("Expected one of `schedule` and `gradual=True`, but got both: each says when layers thaw.")
        if gradual and unfreeze_at_epoch is None:
            raise ValueError("Expected `unfreeze_at_epoch` to be an epoch with `gradual=True`, but got None.")
        self.unfreeze_at_epoch, self.head_lr_ratio = unfreeze_at_epoch, head_lr_ratio
        self.unfreeze_warmup = Duration.parse("unfreeze_warmup", unfreeze_warmup)
        self.schedule, self.refreeze, self.gradual, self.every_n_epochs = schedule, refreeze, gradual, every_n_epochs

    def find_layers(self, pl_module: LightningModule) -> list[Layer]:
        """Return the backbone's layers; what is named inside one of them is one of its own."""
        layers = super().find_layers(pl_module)
        (root,) = self.run.roots if len(self.run.roots) == 1 else (pl_module,)
        return split_layers(layers, all_names(self.schedule, self.refreeze), root)

    def settle_courses(self, pl_module: LightningModule) -> None:
        """Settle the layers' rates, and the stages."""
        super().settle_courses(pl_module)
        layers, (decay, ends) = self.layers, self.rates
        names = [layer.name for layer in layers]
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        trains = {id(parameter) for parameter in pl_module.parameters() if parameter.requires_grad}
        if names and inside >= trains and not self.resumed:  # older checkpoints name none, and go on without
            self.saved.head = names[-1]
        self.run.rate_of = {self.saved.head: 1.0}
        for root in {layer.root for layer in layers}:  # each encoder by itself
            paced = [layer.name for layer in layers if layer.root == root and layer.name != self.saved.head]
            rates = rates_by_depth(len(paced), decay=decay, ends=ends)
            self.run.rate_of |= zip(paced, rates, strict=True)
        thaw: Mapping[int, Names] = {} if self.unfreeze_at_epoch is None else {self.unfreeze_at_epoch: "all"}
        if self.schedule is not None:
            thaw = self.schedule
        elif self.gradual and self.unfreeze_at_epoch is not None:
            thaw = gradually(layers, self.unfreeze_at_epoch, self.every_n_epochs)
        try:
            self.run.stages = stages(layers, thaw, self.refreeze or {}, self.every_n_epochs)
        except LookupError as error:
            what = f"finds that the backbone has no layer {error.args[0]!r}. Its layers are {names}"
            way_out = "`schedule` and `refreeze` can name these, modules in them, paths above them, 'head' and 'all'."
            raise self.refusal(what, way_out) from error
        except ValueError as error:
            raise self.refusal(f"finds that {error}", "Mend `schedule` and `refreeze`.") from error

    def group_label(self, layer: Layer) -> str:
        """Put layers that always do the same into one parameter group."""
        return next(other.name for other in self.layers if self._course(other) == self._course(layer))

    def _course(self, layer: Layer) -> tuple[float, list[bool]]:
        return self.run.rate_of[layer.name], [layer.name in stage.training for stage in self.run.stages]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a stage in which nothing would train."""
        super().on_fit_start(trainer, pl_module)
        way_out = (
            "'head' is what lies outside `backbone`, where nothing trains here. Name a part of the module as "
            f"`backbone`, or in `schedule={{0: ...}}` which of its layers train, of "
            f"{[layer.name for layer in self.layers]}."
        )
        for stage in self.run.stages:
            self.require_training(pl_module, self._frozen_in(stage), f" in epoch {stage.epoch}", way_out)

    def plan(self, run: RunFacts) -> None:
        """Settle the ramp."""
        super().plan(run)
        (self.run.warmup_steps,) = self._steps_of_parts(run, unfreeze_warmup=self.unfreeze_warmup)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze as the epoch wants it, also in a resumed run."""
        super().on_train_start(trainer, pl_module)
        self.run.logged_by = LoggedBy.UNKNOWN if trainer.enable_validation else LoggedBy.TRAINING
        # To thaw as many layers one by one as there is time for is what some want.
        change = self.run.stages[-1 if not self.gradual else min(1, len(self.run.stages) - 1)].epoch
        change = min(change, max([*(self.schedule or [change]), *(self.refreeze or ())]))
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= change:
            rank_zero_warn(
                f"{self.name} thaws or freezes layers in epoch {change}, but the run ends before, after "
                f"{counted(trainer.max_epochs, 'epoch')}. Let it come earlier, or give None if the backbone shall stay "
                "frozen."
            )
        self._move(trainer, pl_module, self.saved.stage)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw and freeze what it is time for."""
        super().on_train_epoch_start(trainer, pl_module)
        self._move(trainer, pl_module, self.saved.due)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the metric was before."""
        super().on_validation_start(trainer, pl_module)
        if self.plateau:
            self.run.value_before = trainer.callback_metrics.get(self.plateau.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric, if validation has logged it."""
        super().on_validation_end(trainer, pl_module)
        if self.plateau is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.callback_metrics.get(self.plateau.monitor) is not self.run.value_before:
            self.run.logged_by = LoggedBy.VALIDATION
            self._look(trainer, self.plateau)
        elif self.run.logged_by is LoggedBy.UNKNOWN:
            self.run.logged_by = LoggedBy.TRAINING

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric, if validation does not log it."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.plateau is None or self.run.logged_by is LoggedBy.VALIDATION:
            return
        name = self.plateau.monitor
        if name in trainer.callback_metrics:
            self._look(trainer, self.plateau)
        elif self.run.logged_by is LoggedBy.TRAINING:
            what = f"finds that no such metric was logged, only {sorted(trainer.callback_metrics)}"
            raise self.refusal(what, f"Log it with `self.log({name!r}, ...)`, or name one of these.", monitor=name)

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Pace the layers, and the head while it trains alone."""
        layer = self.layer_of_group.get((optimizer, group))
        name = HEAD if layer is None else layer.name
        ratio = self.run.rate_of.get(name, 1.0)
        if name == self.saved.head and self.run.stages and self.run.stages[self.saved.stage].training <= {name}:
            ratio = self.head_lr_ratio
        since = self.saved.thawed.get(name)
        if since is not None and step - since[optimizer] < self.run.warmup_steps:
            ratio *= (step - since[optimizer] + 1) / math.ceil(self.run.warmup_steps)
        return {} if layer is None and ratio == 1 else {"lr": values["lr"] * ratio}

    def _frozen_in(self, stage: Stage) -> set[str]:
        return {layer.name for layer in self.layers} - stage.training

    def _move(self, trainer: Trainer, pl_module: LightningModule, told: int) -> None:
        """Begin the stage of this epoch, or the one that the metric has told."""
        begun = [i for i, stage in enumerate(self.run.stages) if stage.epoch <= trainer.current_epoch]
        self.saved.stage = told if self.plateau else begun[-1]
        self.saved.due = max(self.saved.due, self.saved.stage)
        stage = self.run.stages[self.saved.stage]
        since = {name: list(self.steps_done) for name in stage.training - self.run.stages[0].training}
        self.saved.thawed = {name: self.saved.thawed.get(name, steps) for name, steps in since.items()}
        if self.freeze_only(trainer, pl_module, self._frozen_in(stage)):
            names = [layer.name for layer in self.layers if layer.name in stage.training]
            rank_zero_info(
                f"{self.name}: in epoch {trainer.current_epoch} the head trains"
                f"{' with ' + ', '.join(names) if names else ''}; {self.frozen_parameters:,} parameters are frozen."
            )

    def _look(self, trainer: Trainer, plateau: Plateau) -> None:
        saved = self.saved
        if saved.due + 1 >= len(self.run.stages) or saved.due > saved.stage:
            return
        # Ranks that decide for themselves would part.
        value = float(trainer.strategy.broadcast(float(trainer.callback_metrics[plateau.monitor])))
        saved.best, saved.waited, is_due = plateau.seen(value, saved.best, saved.waited)
        if is_due and trainer.current_epoch + 1 >= (self.unfreeze_at_epoch or 0):
            saved.due, saved.waited = saved.due + 1, 0


def _checked_rates(
    ratio: float | tuple[float, float] | None, decay: float | None
) -> tuple[float | None, tuple[float, float]]:
    """Return ``lr_decay`` and the ratios of the first and the last layer."""
    check_number("lr_decay", decay, 0, 1, above=True, optional=True)
    if ratio is not None and decay is not None:
        raise ValueError(f"Expected one of `backbone_lr_ratio` and `lr_decay`, but got {ratio!r} and {decay!r}.")
    ratio = 0.1 if ratio is None else ratio
    ends = tuple(ratio) if isinstance(ratio, (list, tuple)) else (ratio, ratio)
    if len(ends) != 2:
        raise ValueError(f"Expected `backbone_lr_ratio` to be a number or a pair of numbers, but got {ratio!r}.")
    for end in ends:
        check_number("backbone_lr_ratio", end, 0, above=True)
    return decay, (ends[0], ends[1])


def _checked_plateau(gradual: bool | Plateau, given: dict[str, Any], refreeze: object) -> Plateau | None:
    """Return what decides when layers thaw, if a metric does, however it was given."""
    if isinstance(gradual, Plateau) and given:
        raise ValueError(f"Expected `gradual=Plateau(...)` to hold all of its settings, but got {given} beside it.")
    monitor = gradual.monitor if isinstance(gradual, Plateau) else given.get("monitor")
    if monitor is not None and (not gradual or refreeze is not None):
        raise ValueError(
            f"Expected `monitor` with `gradual=True` and without `refreeze`, but got monitor={monitor!r}, "
            f"gradual={gradual!r} and refreeze={refreeze!r}."
        )
    if isinstance(gradual, Plateau):
        return gradual
    plateau = Plateau(**{**given, "monitor": "none" if monitor is None else monitor})  # which checks the others, too
    return None if monitor is None else plateau
