"""Layers that are frozen and thawed during the fit: in groups of their own in the optimizers, and known to DDP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_speedups.attach.run_length import raw_optimizers
from lightning_speedups.attach.steps import OptimizerTrick, Steps, ValueOrder
from lightning_speedups.attach.trick import callbacks_of
from lightning_speedups.attach.wrapping import require_rewrapping, rewrapped
from lightning_speedups.modules.backbones import NoBackboneError, are_paths, find_layers, has_head
from lightning_speedups.modules.folding import FoldedNorms, Pair, conv_norm_pairs, may_hold_pairs
from lightning_speedups.modules.freezing import Frozen, InEval, wholly_frozen
from lightning_speedups.modules.layers import Layer, is_norm, tied_parameters

Backbone = str | list[str] | Callable[[LightningModule], nn.Module | Iterable[nn.Module]] | None


@dataclass
class GroupLabels(Steps):
    """What a checkpoint holds of a trick that freezes.

    Attributes:
        labels: Names of the parameter groups that the layers are in, by the layers' names.
    """

    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Freezing:
    """What else belongs to a run of a trick that freezes.

    Attributes:
        roots: The modules that the backbone consists of, with a timm model's classifier.
        layers: The backbone's layers, from its input on.
        layer_of_group: Those that have a parameter group, by the indices of optimizer and group.
        sizes_before: Sizes of the parameter groups in the checkpoint, optimizer by optimizer; empty without one.
        made_with_state: Ids of the parameters of which optimizers made a state when they were made themselves.
        frozen: Those layers that are frozen now, by name.
        in_eval: The modules in which nothing trains.
        training: The parameters that train of each group of layers in which something is frozen.
        pairs: Convolutions and their norms in the backbone; None before they were looked for.
        folded: Those that are folded now.
    """

    roots: list[nn.Module] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    layer_of_group: dict[tuple[int, int], Layer] = field(default_factory=dict)
    sizes_before: list[list[int]] = field(default_factory=list)
    made_with_state: set[int] = field(default_factory=set)
    frozen: dict[str, Frozen] = field(default_factory=dict)
    in_eval: InEval = field(default_factory=InEval)
    training: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    pairs: list[Pair] | None = None
    folded: FoldedNorms = field(default_factory=lambda: FoldedNorms([]))


class FreezingTrick(OptimizerTrick):
    """A trick that freezes layers and thaws them, and may pace each of them.

    A subclass calls `freeze_only` when something changes, at the same time on all ranks.

    Args:
        backbone: Attribute path in the LightningModule, a list of such paths, a callable that takes it and returns one
            or several modules, or None: the network in it without its head.
        train_norm: Leave norms as they are.
        fold: Compute a frozen convolution and its frozen BatchNorm as one.
    """

    order = ValueOrder.FACTOR
    saved_as, run_as = GroupLabels, Freezing
    saved: GroupLabels
    run: Freezing

    def __init__(self, backbone: Backbone, train_norm: bool = False, fold: bool = True) -> None:
        super().__init__()
        if not (backbone is None or callable(backbone) or are_paths(backbone)):
            kinds = "an attribute path, a list of such paths, a callable or None"
            raise ValueError(f"Expected `backbone` to be {kinds}, but got {backbone!r}.")
        self.backbone, self.train_norm, self.fold = backbone, train_norm, fold

    @property
    def layers(self) -> list[Layer]:
        """The backbone's layers in the run under way, from its input on."""
        return self.run.layers

    @property
    def layer_of_group(self) -> dict[tuple[int, int], Layer]:
        """Those that have a parameter group in the run under way, by the indices of optimizer and group."""
        return self.run.layer_of_group

    @property
    def frozen_parameters(self) -> int:
        """How many numbers are frozen now."""
        return sum(parameter.numel() for frozen in self.run.frozen.values() for parameter in frozen.parameters)

    def group_label(self, layer: Layer) -> str:
        """Return the name of the parameter group that a layer is in; layers of one group are always paced alike."""
        return layer.name

    def find_layers(self, pl_module: LightningModule) -> list[Layer]:
        """Return the backbone's layers, from its input on."""
        try:
            self.run.roots, layers = find_layers(pl_module, self.backbone, self.saved.labels if self.resumed else ())
        except NoBackboneError as error:
            raise self.refusal(*error.args, backbone=self.backbone) from error
        return layers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the optimizer driver."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            require_rewrapping(trainer, self.name)

    def settle_groups(self, pl_module: LightningModule) -> Callable[[Tensor], str | None]:
        """Settle the layers; their parameters get groups of their own."""
        self.run.layers = self.find_layers(pl_module)
        self.settle_courses(pl_module)
        labels = {layer.name: self.group_label(layer) for layer in self.layers}
        if self.resumed and self.saved.labels != labels:  # torch would hand the state of one layer to another
            what = "found other parameter groups in the checkpoint than its arguments make now"
            raise self.refusal(what, "Resume with the arguments of that run, or load its weights alone.")
        self.saved.labels = labels
        label_of = {id(parameter): labels[layer.name] for layer in self.layers for parameter in layer.parameters()}
        return lambda parameter: label_of.get(id(parameter))

    def settle_courses(self, pl_module: LightningModule) -> None:
        """Settle what the layers do when."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the parameter groups of a run that may have had no such trick."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        states = checkpoint.get("optimizer_states", ())
        if all("param_groups" in state for state in states):
            self.run.sizes_before = _sizes(state["param_groups"] for state in states)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that nobody else freezes the layers, and that the optimizers have them in groups of their own; warn of
        parameters that are elsewhere too.
        """
        super().on_fit_start(trainer, pl_module)
        sizes = _sizes(optimizer.param_groups for optimizer in raw_optimizers(trainer))
        if not self.resumed and self.run.sizes_before not in ([], sizes):
            what = "has the layers in parameter groups of their own, which those in the checkpoint do not fit"
            raise self.refusal(what, f"Resume without {self.name}, or load the weights alone, without `ckpt_path`.")
        own = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        for other in callbacks_of(trainer):
            others = other.layers if isinstance(other, FreezingTrick) and other is not self else []
            if any(id(parameter) in own for layer in others for parameter in layer.parameters()):
                what = f"and {type(other).__name__} both freeze the same layers"
                raise self.refusal(what, "Use one of them, or give them different backbones.")
        group_of = {module: self.group_label(layer) for layer in self.layers for module in layer.modules}
        for name, same in tied_parameters(pl_module, group_of):
            rank_zero_warn(
                f"{self.name} freezes, thaws and paces `{name}` with `{same}`, which is the same parameter. Give it "
                "one of its own if it shall train by itself."
            )

    def meet(self, trainer: Trainer) -> None:
        """Find the layers in the optimizers' groups."""
        super().meet(trainer)
        optimizers = raw_optimizers(trainer)
        self._settle_layer_of_group(optimizers)
        self._settle_training(optimizers)
        # A state that is there before anything was loaded or stepped.
        self.run.made_with_state = {id(p) for optimizer in optimizers for p, state in optimizer.state.items() if state}

    def _settle_layer_of_group(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        layer_of = {id(parameter): layer for layer in self.layers for parameter in layer.parameters()}
        lacking = {id(p) for layer in self.layers for p in layer.parameters() if p.requires_grad}
        self.run.layer_of_group.clear()
        if self.layers and not lacking and not self.run.frozen:  # which are what it froze itself, in mid-run
            what = "finds that no parameter of the backbone can be trained at all"
            raise self.refusal(what, "Leave the freezing to this callback.")
        for i, optimizer in enumerate(optimizers):
            for g, group in enumerate(optimizer.param_groups):
                found = [layer_of.get(id(parameter)) for parameter in group["params"]]
                lacking -= {id(parameter) for parameter in group["params"]}
                if len({layer and self.group_label(layer) for layer in found}) > 1:
                    what = "found backbone and head in one parameter group, or layers that go apart"
                    raise self.refusal(what, "Make the optimizer in `configure_optimizers`.")
                if found and found[0] is not None:
                    self.run.layer_of_group[i, g] = found[0]
        if lacking:
            what = f"finds that {len(lacking)} of the backbone's trainable parameters are in no optimizer"
            raise self.refusal(what, "Give it all parameters, and leave the freezing to this callback.")

    def require_training(self, pl_module: LightningModule, frozen: Collection[str], when: str, way_out: str) -> None:
        """Refuse to freeze all that there is, before the time for it comes.

        Args:
            pl_module: The module, with nothing frozen.
            frozen: Names of the layers that will be.
            when: And when, for the message.
            way_out: What the user can do, as a sentence.
        """
        modules = [module for layer in self.layers if layer.name in frozen for module in layer.modules]
        resting = (module for module in modules if not (self.train_norm and is_norm(module)))
        parameters = {id(parameter) for module in resting for parameter in module.parameters(recurse=False)}
        if parameters.issuperset(id(p) for p in pl_module.parameters() if p.requires_grad):
            if isinstance(self.backbone, str) and has_head(pl_module.get_submodule(self.backbone)):
                way_out += " `backbone=None` is a network without its head."
            raise self.refusal(f"would freeze every parameter{when}: nothing is left to train", way_out)

    def freeze_only(self, trainer: Trainer, pl_module: LightningModule, names: Collection[str]) -> bool:
        """Freeze the layers of these names, thaw the others, and tell whether that changed anything."""
        if set(names) == set(self.run.frozen):
            return False
        self.run.folded.undo()
        self.run.in_eval.undo()
        with rewrapped(trainer, pl_module):
            for layer in self.layers:
                if layer.name in names and layer.name not in self.run.frozen:
                    frozen = self.run.frozen[layer.name] = Frozen(layer.modules, self.train_norm)
                    forgotten = [p for p in frozen.parameters if id(p) not in self.run.made_with_state]
                    forget_state(raw_optimizers(trainer), forgotten)
                elif layer.name not in names and layer.name in self.run.frozen:
                    self.run.frozen.pop(layer.name).undo()
            if not any(parameter.requires_grad for parameter in pl_module.parameters()):
                what = "froze every parameter: nothing is left to train"
                raise self.refusal(what, "`backbone` must not contain the head.")
        frozen_now = {module for layer in self.layers if layer.name in names for module in layer.modules}
        resting = wholly_frozen(pl_module, self.run.roots, frozen_now)
        self.run.in_eval = InEval(part for part in resting if not (self.train_norm and is_norm(part)))
        self._settle_training(raw_optimizers(trainer))
        if self.fold and not self.train_norm and self.run.frozen:
            self._fold(trainer, pl_module)
        return True

    def _settle_training(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        own = {(i, g): optimizers[i].param_groups[g]["params"] for i, g in self.run.layer_of_group if self.run.frozen}
        trains = {at: [parameter for parameter in params if parameter.requires_grad] for at, params in own.items()}
        self.run.training = {at: some for at, some in trains.items() if len(some) < len(own[at])}

    def values_now(self, optimizer: int, group: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Show the optimizer only what trains: some move parameters that have no gradient."""
        shown = super().values_now(optimizer, group, values)
        training = self.run.training.get((optimizer, group))
        return shown if training is None else {**shown, "params": training}

    def rests(self, optimizer: torch.optim.Optimizer) -> bool:
        """Tell whether all of an optimizer's parameters are frozen."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return bool(self.run.frozen) and not any(parameter.requires_grad for parameter in parameters)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Fold anew: averages of weights come and go in a way that leaves no trace on the tensors."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if batch_idx == 0:
            self.run.folded.forget()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold anew."""
        super().on_validation_end(trainer, pl_module)
        self.run.folded.forget()

    def _fold(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen = {module for layer in self.layers if layer.name in self.run.frozen for module in layer.modules}
        if self.run.pairs is None:
            held = {module for layer in self.layers for module in layer.modules}
            children = [child for child in pl_module.children() if may_hold_pairs(held.intersection(child.modules()))]
            self.run.pairs = [pair for child in children for pair in conv_norm_pairs(child, [pl_module, trainer])]
        self.run.folded = FoldedNorms(pair for pair in self.run.pairs if frozen.issuperset(pair))

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was handed in."""
        self.run.folded.undo()
        self.run.in_eval.undo()
        for frozen in self.run.frozen.values():
            frozen.undo()
        super().undo(trainer, pl_module)


def forget_state(optimizers: Iterable[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Free what optimizers remember of parameters; when these train again, they start anew.

    Args:
        optimizers: Torch's optimizers, of those that make a state in a step and not once, when they are made.
        parameters: The parameters.
    """
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def _sizes(optimizers: Iterable[Iterable[Mapping[str, Any]]]) -> list[list[int]]:
    return [[len(group["params"]) for group in groups] for groups in optimizers]
