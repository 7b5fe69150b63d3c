"""What all tricks that are callbacks share: the life of a run, and everything put back at the end."""

from __future__ import annotations

import copy
import re
from abc import ABCMeta
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_speedups.attach.packages import Callback, MisconfigurationException, require_served
from lightning_speedups.core.arguments import with_plain_numbers


@dataclass
class Nothing:
    """What belongs to a run of a trick that remembers nothing."""


class ListsOwn(ABCMeta):
    """Lets ``help()`` list what a trick's docstring has as attributes and methods, not what the package calls on it.

    An ABCMeta, so that a trick may have an abstract base beside it.
    """

    def __dir__(cls) -> list[str]:
        """Return the names of a class, without the public ones that are for the package alone."""
        sections = re.findall(r"(?:Attributes|Methods):\n(.+?)\n *\n", cls.__doc__ or "", re.DOTALL)
        shown = re.findall(r"^ *(\w+):", "\n".join(sections), re.MULTILINE)
        return [name for name in super().__dir__() if name.startswith("_") or name in shown]


class Trick(Callback, metaclass=ListsOwn):
    """Base of the callbacks of this package.

    A subclass changes what it must in ``setup`` (for stage ``"fit"``) or later, and puts it back in ``undo``, which
    runs after the fit and also after an exception, when Lightning calls no ``teardown``. What belongs to one run stands
    in two objects: ``saved``, which is what checkpoints hold and lives until the next run begins, and ``run``, which
    is gone after ``undo``. What else than its base it needs of Lightning, it holds by ``grips``.
    """

    saved_as: ClassVar[type[Any]] = Nothing
    """A dataclass of what checkpoints hold: plain values and tensors."""
    run_as: ClassVar[type[Any]] = Nothing
    """A dataclass of what else belongs to a run."""
    saved: Any
    run: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = with_plain_numbers(cls.__init__)  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__()
        self.grips: tuple[Grip, ...] = ()
        self.begin()

    @property
    def name(self) -> str:
        """The trick's name in messages."""
        return type(self).__name__

    @property
    def state_key(self) -> str:
        """The name under which checkpoints hold it; Lightning asks for different ones, also where nothing is held."""
        return super().state_key if fields(self.saved_as) else f"{super().state_key} {id(self)}"

    def begin(self) -> None:
        """Begin a run; the last one is forgotten."""
        self.saved, self.run, self.resumed = self.saved_as(), self.run_as(), False

    def refusal(self, what: str, way_out: str, **given: Any) -> MisconfigurationException:
        """Return the error that says why the trick cannot be used in this run.

        Args:
            what: The rule, and what was found instead.
            way_out: What the user can do, as a sentence.
            **given: The arguments that ask for it.

        Example:
            >>> Trick().refusal("needs an end, but this run has none", "Give `max_epochs`.", stop_after=0.5)
            MisconfigurationException('Trick(stop_after=0.5) needs an end, but this run has none. Give `max_epochs`.')
        """
        shown = ", ".join(f"{argument}={value!r}" for argument, value in given.items())
        return MisconfigurationException(f"{self.name}{shown and f'({shown})'} {what}. {way_out}")

    def is_active(self, trainer: Trainer) -> bool:
        """Tell whether the Trainer runs this trick: Lightning's tuners take the callbacks away for their trial runs."""
        return self in trainer.callbacks  # type: ignore[attr-defined]  # set undeclared; asked at every step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run; refuse what is no Trainer of Lightning's."""
        super().setup(trainer, pl_module, stage)
        require_served(trainer, self.name)
        if stage == "fit":
            self.begin()
            for grip in self.grips:
                grip.join(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the grips."""
        super().on_fit_start(trainer, pl_module)
        for grip in self.grips:
            grip.on_fit_start(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the grips."""
        super().on_train_start(trainer, pl_module)
        for grip in self.grips:
            grip.on_train_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the grips."""
        super().on_train_epoch_start(trainer, pl_module)
        for grip in self.grips:
            grip.on_train_epoch_start(trainer)

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back everything that was changed; may be called twice, or without a fit before it."""
        for grip in self.grips:
            grip.leave(trainer)
        self.run = self.run_as()
        for name in ("log", "log_dict"):  # Lightning leaves the module's there, which would be pickled with the trick
            self.__dict__.pop(name, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        super().teardown(trainer, pl_module, stage)
        self.undo(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        super().on_exception(trainer, pl_module, exception)
        self.undo(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints hold."""
        return copy.deepcopy(vars(self.saved))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint's run stood; what an older version did not save keeps its first value."""
        known = {field.name for field in fields(self.saved_as)}
        self.saved = self.saved_as(**copy.deepcopy({k: v for k, v in state_dict.items() if k in known}))
        self.resumed = True


class Grip:
    """A trick's hold on a part of Lightning, for as long as a fit lasts.

    Args:
        trick: Whose.
    """

    def __init__(self, trick: Trick) -> None:
        self.trick = trick

    def join(self, trainer: Trainer) -> None:
        """Take hold, in ``setup``."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Follow the trick's hook."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Follow the trick's hook."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Follow the trick's hook."""

    def leave(self, trainer: Trainer) -> None:
        """Let go; may be called twice, or without a fit before it."""


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    return callbacks
