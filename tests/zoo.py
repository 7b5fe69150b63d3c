"""The small modules, loaders and Trainers that tests share, for those that go through a real fit."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

LIGHTNING = importlib.import_module(os.environ.get("LIGHTNING_PACKAGE", "lightning.pytorch"))
"""Under which of its two names Lightning is tested."""
Callback, LightningModule, Trainer = LIGHTNING.Callback, LIGHTNING.LightningModule, LIGHTNING.Trainer
CLASSES = 4
STOPS = (1, 6, 8, 11)
"""Where a run of three epochs of four steps is interrupted: at the first step, in the middle, at an epoch's last, before the last."""


def made_of(thing: Any, above: tuple[int, ...] = ()) -> Any:
    """What a fresh object consists of, its own objects' parts included, as plain values that can be compared."""
    if isinstance(thing, dict):
        return {key: made_of(value, above) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, set)):
        return [made_of(value, above) for value in thing]
    if isinstance(thing, partial):
        return [made_of(part, above) for part in (thing.func, thing.args, thing.keywords)]
    if id(thing) in above or isinstance(thing, type) or not hasattr(thing, "__dict__"):
        return type(thing).__name__ if id(thing) in above else thing
    if inspect.isfunction(thing):
        return thing.__qualname__, made_of([cell.cell_contents for cell in thing.__closure__ or ()], above)
    return type(thing), made_of(vars(thing), (*above, id(thing)))


def images(count: int = 32, channels: int = 2, side: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    inputs = torch.randn(count, channels, side, side, generator=generator)
    return inputs + labels.view(-1, 1, 1, 1) * 0.3, labels


def loader(count: int = 32, batch_size: int = 8, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(count, seed=seed)), batch_size=batch_size)


class Batches:
    """A loader that hands out ready batches; Lightning takes a mere list for several loaders."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Endless(IterableDataset[Any]):
    """A dataset of unknown length, though it ends."""

    def __iter__(self):
        yield from zip(*images(), strict=True)


def endless() -> DataLoader[Any]:
    return DataLoader(Endless(), batch_size=8)


class OrderOfEpoch(Sampler[int]):
    """Shuffles by the epoch alone."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(1000 * self.epoch)).tolist())


class ReplayLoader(DataLoader[Any]):
    """A DataLoader whose batches depend on epoch and position alone, and that goes on where a checkpoint stood."""

    def __init__(self, batches: int = 4, batch_size: int = 8, **options: Any) -> None:
        size = batches * batch_size
        super().__init__(
            TensorDataset(*images(size)), **{"batch_size": batch_size, "sampler": OrderOfEpoch(size), **options}
        )
        self.position = 0

    def __iter__(self):
        begin, last, batches = self.position, len(self) - 1, super().__iter__()

        def rest():
            for position, batch in enumerate(batches):
                if position >= begin:
                    # Before the last yield: nobody asks the generator again after it.
                    self.position = 0 if position == last else position + 1
                    yield batch

        return rest()

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Classifier(LightningModule):
    """Backbone with BatchNorm, head, and a training_step that knows of no trick."""

    def __init__(self, criterion: nn.Module | None = None, lr: float = 0.05, optimizer: str = "sgd") -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(6, CLASSES)
        self.criterion, self.lr, self.optimizer = criterion, lr, optimizer
        self.seen: list[Any] = []
        self.losses: list[float] = []
        self.values: list[list[dict[str, Any]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        self.seen.append((inputs, labels))
        loss = (F.cross_entropy if self.criterion is None else self.criterion)(self.head(self.backbone(inputs)), labels)
        self.losses.append(loss.item())
        if not torch.distributed.is_initialized():  # there the average would be an extra exchange
            self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", F.cross_entropy(self.head(self.backbone(inputs)), labels))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            optimizer: Any = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.01)
        optimizer.register_step_pre_hook(self._note)
        return optimizer

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.values.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


class Seer(LightningModule):
    """Keeps what its steps receive."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def photos(count: int = 128, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noise that is brighter from class to class, uint8."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    inputs = torch.randint(0, 60, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return inputs + 48 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels


class Convolutions(LightningModule):
    """Two convolutions with BatchNorm, as a user writes them: normalises bytes itself, steps its scheduler each step."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.05, scheduled: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 24, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
            nn.Linear(24, CLASSES),
        )
        self.optimizer, self.lr, self.scheduled = optimizer, lr, scheduled
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net((inputs.float() - 100) / 60 if inputs.dtype == torch.uint8 else inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer]
        optimizer = kind(self.parameters(), lr=self.lr, weight_decay=0.1)
        if not self.scheduled:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def some_text(tokens: int = 4000, kinds: int = 32) -> Tensor:
    """Token numbers of which each tells the next but for some noise."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.where(torch.rand(tokens, generator=generator) < 0.1, torch.arange(tokens) % 7, 5)
    return steps.cumsum(0) % kinds


class WritesText(LightningModule):
    """A small language model of torch's own layers, as a user writes it; masks and places go by the batch's length."""

    def __init__(
        self, optimizer: str = "adamw", lr: float = 1e-3, scheduled: bool = False, tied: bool = False, kinds: int = 32
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(kinds, 32), nn.Parameter(torch.zeros(128, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, kinds, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.optimizer, self.lr, self.scheduled = optimizer, lr, scheduled
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        length = batch[0].shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=self.device)
        logits = self.head(self.blocks(self.embed(batch[0]) + self.place[:length], mask=mask, is_causal=True))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        self.losses.append(loss.item())
        return loss

    configure_optimizers = Convolutions.configure_optimizers


class Wrapper(torch.optim.Optimizer):
    """Around another optimizer, without torch's hooks: `Optimizer.__init__` never ran."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = base.state

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


class SometimesInfinite(Classifier):
    """Its loss is infinite in some batches, so that GradScaler skips their steps."""

    def __init__(self, bad: Any) -> None:
        super().__init__()
        self.bad, self.batch = bad, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.batch += 1
        return loss * float("inf") if self.batch - 1 in self.bad else loss


class TwoGroups(Classifier):
    """The backbone and the head have a parameter group each, with a rate of its own."""

    def __init__(self, lr: tuple[float, float] = (0.01, 0.3), momentum: float = 0.9) -> None:
        super().__init__()
        self.rates, self.momentum = lr, momentum

    def configure_optimizers(self) -> Any:
        parts = zip((self.backbone, self.head), self.rates, strict=True)
        optimizer = SGD([{"params": part.parameters(), "lr": lr} for part, lr in parts], momentum=self.momentum)
        optimizer.register_step_pre_hook(self._note)
        return optimizer


class Joins(Classifier):
    """The backbone joins in the second epoch, at a quarter of the head's rate."""

    def configure_optimizers(self) -> Any:
        self.own = torch.optim.SGD(self.head.parameters(), lr=0.4, momentum=0.9)
        self.own.register_step_pre_hook(self._note)
        return self.own

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.own.add_param_group({"params": self.backbone.parameters(), "lr": 0.1})


def scheduled(
    make: Callable[[Any], Any], interval: str = "step", kind: type[Classifier] = Classifier, **arguments: Any
) -> Classifier:
    """A module whose optimizer comes with a scheduler."""

    class Scheduled(kind):  # type: ignore[valid-type,misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": make(optimizer), "interval": interval, "monitor": "val_loss"}]

    return Scheduled(**arguments)


class Manual(Classifier):
    """Steps by hand."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class TwoOptimizers(Classifier):
    """Head and backbone have an optimizer each, of which the second steps on every third batch only, as in a GAN.

    Notes the groups of each one in its steps.
    """

    def __init__(
        self, every: int = 3, lr: tuple[float, float] = (0.1, 0.02), kinds: tuple[type, type] = (SGD, SGD)
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every, self.own_rates, self.kinds = every, lr, kinds

    def configure_optimizers(self) -> Any:
        self.notes: tuple[list[list[dict[str, Any]]], ...] = ([], [])
        made = [
            kind(part.parameters(), lr=lr, **({"momentum": 0.9} if kind is SGD else {}))
            for kind, part, lr in zip(self.kinds, (self.head, self.backbone), self.own_rates, strict=True)
        ]
        for optimizer, notes in zip(made, self.notes, strict=True):
            optimizer.register_step_pre_hook(lambda o, *_, notes=notes: notes.append([{**g} for g in o.param_groups]))
        return made

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        first.zero_grad()
        if batch_idx % self.every == self.every - 1:
            second.step()
            second.zero_grad()

    @property
    def rates(self) -> tuple[list[float], ...]:
        """The rates of each one's steps."""
        return tuple([step[0]["lr"] for step in notes] for notes in self.notes)


class Timm(LightningModule):
    """A network of timm; notes in each step which of its parameters train."""

    def __init__(self, name: str, **options: Any) -> None:
        import timm  # here, since it takes a second

        super().__init__()
        torch.manual_seed(3)
        size = {"img_size": 32} if "vit" in name else {}
        self.model = timm.create_model(name, num_classes=CLASSES, in_chans=2, **size, **options)
        self.trained: list[set[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append({name for name, p in self.model.named_parameters() if p.requires_grad})
        return F.cross_entropy(self.model(F.interpolate(batch[0], 32)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    @property
    def of_classifier(self) -> set[str]:
        """Names of the classifier's parameters."""
        own = {id(parameter) for parameter in self.model.get_classifier().parameters()}
        return {name for name, parameter in self.model.named_parameters() if id(parameter) in own}


class FreezesBackbone(Callback):
    """Keeps the backbone frozen to the bit, norms included, for the whole fit."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.backbone.requires_grad_(False).eval()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.backbone.requires_grad_(True)
        for module in pl_module.backbone.modules():  # past whoever else keeps it from training
            module.training = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in ("log", "log_dict"):  # Lightning leaves the module's there
            vars(self).pop(name, None)


class Memory(LIGHTNING.loggers.logger.Logger):
    """A logger that keeps what it is given."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getitem__(self, name: str) -> list[Any]:
        return [metrics[name] for metrics in self.metrics if name in metrics]


class OneHot(nn.Module):
    """Hands class labels to a loss as a yes or no for each class; here, so that it pickles."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.loss(scores, F.one_hot(labels, CLASSES).float())


class Interrupted(Exception):
    """Ends a fit in the middle."""


class NotesGroups(Callback):
    """Which optimizer steps, and what its groups hold then."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(self.note)

    def note(self, optimizer, *_):
        self.steps.append((type(optimizer), [{**group} for group in optimizer.param_groups]))


class InterruptAt(Callback):
    """Saves a checkpoint after a step (or at the end of its epoch), as a ModelCheckpoint would, and ends the run."""

    def __init__(self, step: int, epoch_end: bool = False) -> None:
        self.step, self.epoch_end = step, epoch_end

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self.epoch_end:
            self.interrupt(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.interrupt(trainer)

    def interrupt(self, trainer: Trainer) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint("at.ckpt")
            raise Interrupted


def fit_interrupted(
    module: LightningModule, data: Any, step: int, callbacks: list[Any], epoch_end: bool = False, **arguments: Any
) -> None:
    with pytest.raises(Interrupted):
        trainer(callbacks=[*callbacks, InterruptAt(step, epoch_end)], **arguments).fit(module, data)


def resume(module: LightningModule, data: Any, callbacks: list[Callback], **arguments: Any) -> Trainer:
    resumed = trainer(callbacks=callbacks, **arguments)
    resumed.fit(module, data, ckpt_path="at.ckpt", weights_only=True)
    return resumed


class Clock:
    """Stands in for the clock of a module; it stands still unless it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        self.now = 1000.0
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: self.now))


def scaled(scale: float = 8.0) -> Any:
    """Half precision on a CPU; its scaler skips the steps whose gradients are infinite."""
    return LIGHTNING.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"these differ: {different}"


def twins(
    shapes: list[tuple[int, ...]], layout: torch.memory_format = torch.contiguous_format
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters twice, filters of the first in that layout."""
    torch.manual_seed(0)
    one = [
        nn.Parameter(torch.randn(shape).to(memory_format=layout if len(shape) == 4 else torch.contiguous_format))
        for shape in shapes
    ]
    return one, [nn.Parameter(p.detach().clone().contiguous()) for p in one]


def give_gradients(step: int, *sides: list[nn.Parameter]) -> None:
    """The same gradients for parameters that stand at the same place, others in each step."""
    generator = torch.Generator().manual_seed(100 + step)
    for group in zip(*sides, strict=True):
        gradient = torch.randn(group[0].shape, generator=generator)
        for p in group:
            p.grad = gradient.clone()


def trainer(package: Any = LIGHTNING, **arguments: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 3,
        "num_sanity_val_steps": 0,
    }
    return package.Trainer(**(quiet | arguments))
