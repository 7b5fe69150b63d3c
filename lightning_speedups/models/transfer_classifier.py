"""A ready classifier on any of timm's networks: transfer learning (survey: Zhuang et al., arXiv:1911.02685) for people
who start from nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_speedups.core.arguments import check_choice, check_number, plain
from lightning_speedups.models.weight_files import load_weights
from lightning_speedups.modules.weights import shortened
from lightning_speedups.tricks.labels.label_smoothing_loss import LabelSmoothingLoss

Optimizer = Literal["adamw", "sgd"]
OWN_OPTIONS = {"pretrained", "checkpoint_path", "num_classes", "in_chans", "drop_rate"}
WAYS_OUT = "Use `weights=None` for random ones, or the path of a local file."
KEYS = (("images", "image", "pixel_values", "inputs"), ("labels", "label", "targets", "target"))
"""Under which keys datasets give images and labels."""
WEIGHT_DECAY: Mapping[str, float] = {"adamw": 0.05, "sgd": 5e-4}


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch read files as data for a while, whatever it is asked for: older timm does not ask everywhere."""
    force, unforce = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (force, unforce) if name in os.environ}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update(before)


def _check_name(model: str, pretrained: bool) -> None:
    """Refuse what timm does not know; a name with a source (``"hf-hub:..."``) is left to timm."""
    import timm

    name, _, tag = str(model).partition(".")
    if ":" in name:
        return
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.rpartition("/")[2], timm.list_models(), n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "timm.list_models() lists them."
        raise ValueError(
            f"Expected `model` to be the name of a timm network, but got {model!r}. {hint} Names on a hub begin with "
            "'hf-hub:'."
        )
    is_unknown = tag and model not in timm.list_models(f"{name}.*", include_tags=True)
    if is_unknown or (pretrained and not timm.is_model_pretrained(model)):
        known = shortened(timm.list_pretrained(f"{name}.*")) or "none for it"
        raise ValueError(f"timm has no pretrained weights for {model!r}; for {name} it knows {known}. {WAYS_OUT}")


def _create_network(
    model: str, pretrained: bool, own: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, str, dict[str, Any]]:
    """Create one of timm's networks; return with it the name and the options that do so without a hub."""
    import timm

    _check_name(model, pretrained)
    try:
        with _weights_only():
            name, options = _without_hub(model, options)
            return timm.create_model(name, pretrained=pretrained, **own, **options), name, dict(options)
    except Exception as error:  # timm, hub and network fail in more ways than can be listed
        at_fault = "its options"
        if ":" in model:
            at_fault += ", or its files on the hub"
        elif pretrained:
            at_fault += ", or its pretrained weights"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"timm can't create {model!r} ({reason}). At fault: {at_fault}. {WAYS_OUT}") from error


def _without_hub(model: str, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Look up a network's description on a hub, and return the name and the options that create it without that."""
    source, separator, place = model.partition(":")
    if not separator:
        return model, options
    from timm.models import _hub

    load = _hub.load_model_config_from_path if source == "local-dir" else _hub.load_model_config_from_hf
    config, name, described = load(place)
    described = {option: value for option, value in described.items() if option not in OWN_OPTIONS}
    return name, {**described, **options, "pretrained_cfg": config}


def _parts(batch: Any, count: int = 2) -> list[Any]:
    """Return the images of a batch, and with a count of 2 its labels."""
    if isinstance(batch, Mapping):
        found = [[batch[key] for key in keys if key in batch] for keys in KEYS[:count]]
        parts = [each[0] for each in found if len(each) == 1]
    else:
        parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        parts = parts if count == 2 else parts[:1]
    if len(parts) == count and isinstance(parts[0], Tensor):
        return parts
    kind = type(batch).__name__
    held = [*batch] if isinstance(batch, Mapping) else [type(part).__name__ for part in parts]
    raise ValueError(
        f"TransferClassifier takes batches of {' and '.join(('images', 'labels')[:count])}: tensors in a pair, or in a "
        f"dict under {' and '.join(repr(keys[0]) for keys in KEYS[:count])}. It got a {kind} of {shortened(held)}. Let "
        "the dataset or the loader's `collate_fn` give these."
    )


class Transfer(LightningModule if TYPE_CHECKING else object):  # type: ignore[misc]  # each package has one of its own
    """A classifier of images on any of timm's networks, with pretrained weights and a new head, ready to train.

    The network is ``self.model``, so that ``FreezeBackboneFinetune(None)`` finds its backbone. Logs ``train_loss``,
    ``val_loss``, ``val_accuracy``, ``test_loss`` and ``test_accuracy``; validation and test losses are cross-entropies
    without smoothing. ``predict`` gives class probabilities. A batch is ``(images, labels)``, or a dict that
    has them under usual names (`KEYS`), images float32 ``(N, C, H, W)`` normalised as `transforms` does, labels int64
    ``(N,)``; labels mixed by ``MixupCallback`` work.
    Checkpoints load without the hub and without the weight file. For a Trainer of ``pytorch_lightning`` import it from
    ``lightning_speedups.pytorch_lightning``.

    When not to use it: where you have a LightningModule already: the tricks work with any.

    Args:
        model: Name of a timm network (``"resnet18"``, ``"mobilenetv3_small_100"``, ``"efficientnet_b0"``,
            ``"vit_tiny_patch16_224"``, ``"convnext_atto"``, ...), with or without the tag of its weights
            (``"resnet18.a1_in1k"``), or on a hub (``"hf-hub:timm/resnet18.a1_in1k"``).
        num_classes: Classes to tell apart, 2 or more; must be given.
        weights: ``"pretrained"``: those that timm knows for the name, from its hub or the local cache; a path: see
            `load_weights`; None: random ones.
        in_chans: Channels of the images, 1 or more.
        lr: Learning rate, above 0.
        weight_decay: Weight decay, 0 or more, of all but norms, biases and what the network exempts. None: 0.05 for
            AdamW, 5e-4 for SGD.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum.
        momentum: Momentum of SGD, in [0, 1).
        smoothing: Label smoothing ε in [0, 1) of the training loss.
        drop_rate: Dropout before the classifier, in [0, 1).
        model_options: Further arguments of ``timm.create_model``, such as ``{"img_size": 96}``.

    Raises:
        ValueError: If an argument is out of range, timm has no such network or no weights for it, the weights can't be
            fetched, or the file is not of this network.
        FileNotFoundError: If there is no such weight file.

    Source:
        timm (Wightman, 2019); Zhuang et al., arXiv:1911.02685.

    Example:
        >>> import torch
        >>> module = TransferClassifier("test_resnet", num_classes=5, weights=None)
        >>> module(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        model: str = "resnet18",
        num_classes: int | None = None,
        *,
        weights: str | Path | None = "pretrained",
        in_chans: int = 3,
        lr: float = 1e-3,
        weight_decay: float | None = None,
        optimizer: Optimizer = "adamw",
        momentum: float = 0.9,
        smoothing: float = 0.0,
        drop_rate: float = 0.0,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        num_classes = check_number("num_classes", num_classes, 2, whole=True)
        in_chans = check_number("in_chans", in_chans, 1, whole=True)
        lr = check_number("lr", lr, 0, above=True)
        weight_decay = check_number("weight_decay", weight_decay, 0, optional=True)
        momentum = check_number("momentum", momentum, 0, 1, below=True)
        smoothing = check_number("smoothing", smoothing, 0, 1, below=True)
        drop_rate = check_number("drop_rate", drop_rate, 0, 1, below=True)
        check_choice("optimizer", optimizer, get_args(Optimizer))
        if weights is not None and not (isinstance(weights, (str, Path)) and str(weights)):
            raise ValueError(f"Expected `weights` to be 'pretrained', the path of a file or None, but got {weights!r}.")
        options = plain(dict(model_options or {}))
        if double := OWN_OPTIONS & options.keys():
            raise ValueError(
                f"Expected `model_options` without {shortened(sorted(double))}: there are arguments for that."
            )
        pretrained = weights == "pretrained"
        own = {"num_classes": num_classes, "in_chans": in_chans, "drop_rate": drop_rate or None}  # not all take it
        self.model, name, options = _create_network(model, pretrained, own, options)
        if not pretrained and weights is not None:
            load_weights(self.model, weights)
        self.criterion = LabelSmoothingLoss(smoothing)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.lr, self.momentum, self.optimizer = lr, momentum, optimizer
        self.weight_decay = WEIGHT_DECAY[optimizer] if weight_decay is None else weight_decay
        self.save_hyperparameters()
        # A checkpoint has all weights in it: what made the first ones must not be fetched again.
        self.hparams.update(model=name, weights=None, model_options=options)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, ``(N, num_classes)``, of images, ``(N, C, H, W)``."""
        return self.model(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images, labels = _parts(batch)
        loss: Tensor = self.criterion(self(images), labels)
        self.log("train_loss", loss, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy of one batch."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy of one batch."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities, ``(N, num_classes)``, of a batch with or without labels."""
        images: Tensor = _parts(batch, 1)[0]
        return self(images).float().softmax(1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or SGD; norms and biases without weight decay."""
        from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]

        exempt: set[str] = getattr(self.model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=exempt)
        groups = [group for group in groups if group["params"]]
        # What timm calls "sgd" has Nesterov's momentum, which cannot be 0.
        kind = "momentum" if self.optimizer == "sgd" and self.momentum == 0 else self.optimizer
        return create_optimizer_v2(groups, kind, self.lr, self.weight_decay, self.momentum)

    def transforms(self, train: bool = False) -> Callable[[Any], Tensor]:
        """Make the torchvision transform that fits the network's pretrained weights: size, crop, normalisation.

        Args:
            train: Random crops of random size, and flips, instead of the same crop each time. A cache of features
                (``FeatureCache``) needs the same each time.

        Returns:
            From a PIL image to a float32 tensor, ``(C, H, W)``.

        Raises:
            ModuleNotFoundError: If torchvision is missing.
            ValueError: If the network takes neither grey nor RGB images.

        Example:
            >>> from PIL import Image
            >>> module = TransferClassifier("test_resnet", num_classes=5, weights=None)
            >>> module.transforms()(Image.new("RGB", (300, 200))).shape
            torch.Size([3, 160, 160])
        """
        try:
            from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]
            from torchvision.transforms import Compose, Grayscale
        except ImportError as error:
            raise ModuleNotFoundError(
                "TransferClassifier.transforms needs torchvision and pillow: pip install 'lightning-speedups[bench]'"
            ) from error
        channels = self.hparams["in_chans"]
        if channels not in (1, 3):
            raise ValueError(f"There are transforms for images of 1 or 3 channels, but `in_chans` is {channels}.")
        config = resolve_model_data_config(self.model)  # type: ignore[no-untyped-call]
        size = self.hparams["model_options"].get("img_size", config["input_size"][1:])
        config["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
        if channels == 1:
            config.update({name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")})
        transform = create_transform(**config, is_training=train, color_jitter=None)  # type: ignore[arg-type]
        return Compose([Grayscale(), transform]) if channels == 1 else transform  # type: ignore[no-any-return]

    def _evaluate(self, batch: Any, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = _parts(batch)
        logits = self(images).float()
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(images))
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True, batch_size=len(images))


class TransferClassifier(Transfer, LightningModule):  # noqa: D101
    __doc__ = Transfer.__doc__
