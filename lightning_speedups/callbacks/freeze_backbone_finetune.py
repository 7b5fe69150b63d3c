"""Transfer learning: train the head on a frozen backbone first, then everything, the backbone at a lower rate (fastai's
``fine_tune``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_speedups.attach.optimizers import OptimizerTrick, Order
from lightning_speedups.attach.trick import raw_optimizers
from lightning_speedups.attach.wrapping import require_rewrapping, rewrapped
from lightning_speedups.core.arguments import check_number

Backbone = str | Callable[[LightningModule], nn.Module | Iterable[nn.Module]] | None


def find_backbone(pl_module: LightningModule, backbone: Backbone) -> list[nn.Module]:
    """Return all modules of the backbone, nested ones included.

    Args:
        pl_module: The module that trains.
        backbone: Attribute path, a callable that picks one or several modules, or None: the timm model in it without
            its classifier.

    Raises:
        MisconfigurationException: If there is no such thing.
    """
    if backbone is None:
        return _timm_backbone(pl_module)
    if callable(backbone):
        picked = backbone(pl_module)
    else:
        try:
            picked = pl_module.get_submodule(backbone)
        except AttributeError as error:
            raise MisconfigurationException(
                f"FreezeBackboneFinetune(backbone={backbone!r}): {type(pl_module).__name__} has no such submodule. It "
                f"has {[name for name, _ in pl_module.named_children()]}; name one, give a callable, or None for a timm"
                " model."
            ) from error
    roots = list(picked) if isinstance(picked, Iterable) and not isinstance(picked, nn.Module) else [picked]
    if not roots or not all(isinstance(root, nn.Module) for root in roots):
        raise MisconfigurationException(
            f"FreezeBackboneFinetune: `backbone` must pick nn.Modules, but it picked {picked!r}."
        )
    return list(dict.fromkeys(module for root in roots for module in root.modules()))


def _timm_backbone(pl_module: LightningModule) -> list[nn.Module]:
    model = next(
        (m for m in pl_module.modules() if hasattr(m, "get_classifier") and hasattr(m, "reset_classifier")), None
    )
    if model is None:
        raise MisconfigurationException(
            f"FreezeBackboneFinetune(backbone=None) looks for a timm model in {type(pl_module).__name__}, but found "
            "none. Give an attribute path."
        )
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    heads: list[nn.Module] = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    head_modules = {module for head in heads for module in head.modules()}
    if not any(True for head in heads for _ in head.parameters()):
        raise MisconfigurationException(
            f"FreezeBackboneFinetune(backbone=None): the classifier of {type(model).__name__} has no parameters. Create"
            " it with `num_classes`, or name the backbone by its attribute path."
        )
    return [module for module in model.modules() if module not in head_modules]


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalisation layer, torch's or anyone's.

    Example:
        >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.LayerNorm(3)), is_norm(nn.Linear(3, 3))
        (True, True, False)
    """
    torchs = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
    # A container that is named after the norm in it is none itself.
    by_name = "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
    return isinstance(module, torchs) or by_name


class _StaysInEval:
    """Stands in for the ``train`` method of a frozen module, so that no ``model.train()`` moves its statistics.

    Its children go with the call: they may be of the head, or dropouts.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mode_before = module, module.training
        module.training = False
        module.__dict__["train"] = self

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self.module.children():
            child.train(mode)
        self.module.training = False
        return self.module

    def undo(self) -> None:
        del self.module.__dict__["train"]
        self.module.training = self.mode_before


class FreezeBackboneFinetune(OptimizerTrick):
    """Freezes a backbone for the first epochs, then trains all, the backbone at a fraction of the learning rate.

    Frozen means frozen: no gradient, no graph, weights and running statistics equal to the bit, norms (and whatever
    else keeps buffers) in eval mode after every ``.train()``. Optimizers are built with the backbone in parameter
    groups of its own from the start, so no scheduler or checkpoint ever sees a group appear. DDP is re-wrapped when the
    backbone moves: frozen parameters cost no communication, and ranks stay equal. ``configure_optimizers`` gives all
    parameters to the optimizer, as without this callback.

    When not to use it: from random weights, where the frozen phase is lost time; under FSDP or model parallelism (it
    refuses).

    Args:
        backbone: Attribute path in the LightningModule, a callable that takes it and returns one or several modules, or
            None for a timm model: everything but its classifier.
        unfreeze_at_epoch: First epoch, counted from 0, in which the backbone trains; 0 freezes nothing, None keeps it
            frozen.
        backbone_lr_ratio: Backbone's learning rate over the head's, above 0; it multiplies whatever schedules give.
        train_norm: Let the backbone's norms go on training while it is frozen. Costs most of the saving, as the
            backward pass must reach them.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At fit start, if there is no such backbone, the optimizer lacks its parameters,
            nothing would be left to train, or the strategy cannot follow.

    Source:
        Howard & Gugger, fastai (arXiv:2002.04688).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FreezeBackboneFinetune("backbone", unfreeze_at_epoch=2)])
    """

    order = Order.FACTOR

    def __init__(
        self,
        backbone: Backbone = "backbone",
        unfreeze_at_epoch: int | None = 1,
        backbone_lr_ratio: float = 0.1,
        train_norm: bool = False,
    ) -> None:
        super().__init__()
        if not (backbone is None or callable(backbone) or (isinstance(backbone, str) and backbone)):
            raise ValueError(f"Expected `backbone` to be an attribute path, a callable or None, but got {backbone!r}.")
        check_number("unfreeze_at_epoch", unfreeze_at_epoch, 0, whole=True, optional=True)
        check_number("backbone_lr_ratio", backbone_lr_ratio, 0, above=True)
        self.backbone, self.unfreeze_at_epoch = backbone, unfreeze_at_epoch
        self.backbone_lr_ratio, self.train_norm = backbone_lr_ratio, train_norm
        self._modules: list[nn.Module] = []
        self._backbone_groups: set[tuple[int, int]] = set()
        self._frozen: list[nn.Parameter] = []
        self._kept_in_eval: list[_StaysInEval] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the optimizer driver."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            require_rewrapping(trainer, self.name)

    def splits_groups(self, pl_module: LightningModule) -> Callable[[Tensor], bool]:
        """Find the backbone; its parameters get groups of their own."""
        self._modules = find_backbone(pl_module, self.backbone)
        backbone = {id(parameter) for parameter in self._parameters()}
        return lambda parameter: id(parameter) in backbone

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimizers have the backbone in groups of its own."""
        backbone = {id(parameter) for parameter in self._parameters()}
        lacking = {id(parameter) for parameter in self._parameters() if parameter.requires_grad}
        if not lacking:
            raise MisconfigurationException(
                "FreezeBackboneFinetune: no parameter of the backbone can be trained at all."
            )
        self._backbone_groups = set()
        for i, optimizer in enumerate(raw_optimizers(trainer)):
            for g, group in enumerate(optimizer.param_groups):
                ids = {id(parameter) for parameter in group["params"]}
                lacking -= ids
                if ids & backbone:
                    self._backbone_groups.add((i, g))
                    if ids - backbone:
                        raise MisconfigurationException(
                            "FreezeBackboneFinetune found backbone and head in one parameter group: the optimizer was "
                            "not made in `configure_optimizers`. Make it there."
                        )
        if lacking:
            raise MisconfigurationException(
                f"FreezeBackboneFinetune: {len(lacking)} of the backbone's trainable parameters are in no optimizer and"
                " would never train. Give all parameters to the optimizer in `configure_optimizers`, and leave the"
                " freezing to this callback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze, unless a resumed run is past that."""
        super().on_train_start(trainer, pl_module)
        if self.unfreeze_at_epoch is None or trainer.current_epoch < self.unfreeze_at_epoch:
            with rewrapped(trainer, pl_module):
                self._freeze()
                if not any(p.requires_grad for p in pl_module.parameters()):
                    raise MisconfigurationException(
                        "FreezeBackboneFinetune froze every parameter: nothing is left to train. `backbone` must not "
                        "contain the head."
                    )
            until = "to the end" if self.unfreeze_at_epoch is None else f"until epoch {self.unfreeze_at_epoch}"
            rank_zero_info(
                f"FreezeBackboneFinetune: {sum(p.numel() for p in self._frozen):,} parameters frozen {until}."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze when the time has come."""
        if self.unfreeze_at_epoch is not None and trainer.current_epoch >= self.unfreeze_at_epoch and self._frozen:
            with rewrapped(trainer, pl_module):
                self._unfreeze()

    def group_values(self, optimizer: int, group: int, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Lower the backbone's rate."""
        return {"lr": values["lr"] * self.backbone_lr_ratio} if (optimizer, group) in self._backbone_groups else {}

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was handed in."""
        super().undo(trainer, pl_module)
        self._unfreeze()
        self._modules = []

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for module in self._modules for parameter in module.parameters(recurse=False))

    def _freeze(self) -> None:
        for module in self._modules:
            if self.train_norm and is_norm(module):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen.append(parameter)
            if is_norm(module) or any(True for _ in module.buffers(recurse=False)):
                self._kept_in_eval.append(_StaysInEval(module))

    def _unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for stand_in in self._kept_in_eval:
            stand_in.undo()
        self._frozen, self._kept_in_eval = [], []
