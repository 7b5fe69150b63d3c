"""One stand-in for each method that is patched: who stands there is a list, and may come and go in any order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

Member = TypeVar("Member")


class Station:
    """Stands in for a method of one object, and lets its members act around it.

    Each member is called with what it stands around, and the method's own arguments; those of a lower order stand
    further in, so that they come first to what the method returns. The first member puts the station up, the last one
    takes it down.

    Args:
        owner: The object.
        method: The method's name.

    Example:
        >>> class Clock:
        ...     def time(self):
        ...         return 12
        >>> clock, summer = Clock(), object()
        >>> Station.of(clock, "time").join(summer, lambda time: time() + 1)
        >>> clock.time()
        13
        >>> Station.of(clock, "time").leave(summer)
        >>> clock.time(), vars(clock)
        (12, {})
    """

    def __init__(self, owner: Any, method: str) -> None:
        self.owner, self.method = owner, method
        self.own = vars(owner).get(method)  # what somebody else has put there
        self.members: list[tuple[int, Any, Callable[..., Any]]] = []
        self._call: Callable[..., Any] | None = None

    @staticmethod
    def of(owner: Any, method: str) -> Station:
        """Return the station that stands in for a method, or a new one, which the first member will put up."""
        here = vars(owner).get(method)
        return here if isinstance(here, Station) else Station(owner, method)

    def find(self, kind: type[Member]) -> Member | None:
        """Return the first member of a kind, if there is one."""
        return next((who for _, who, _ in self.members if isinstance(who, kind)), None)

    def join(self, who: Any, act: Callable[..., Any], order: int = 0) -> None:
        """Let a member stand here; one that does so already only once.

        Args:
            who: The member.
            act: Takes what it stands around, and the method's arguments; returns what the method would.
            order: Where among the others; equal ones stand in the order in which they came.
        """
        self._set([*(one for one in self.members if one[1] is not who), (order, who, act)])
        self.owner.__dict__[self.method] = self

    def leave(self, who: Any) -> None:
        """Let a member go; nothing happens if it does not stand here."""
        self._set([one for one in self.members if one[1] is not who])
        if self.members or vars(self.owner).get(self.method) is not self:
            return
        del self.owner.__dict__[self.method]
        if self.own is not None:
            self.owner.__dict__[self.method] = self.own

    @property
    def original(self) -> Callable[..., Any]:
        """The method itself."""
        if self.own is not None:
            return self.own  # type: ignore[no-any-return]
        return getattr(type(self.owner), self.method).__get__(self.owner)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method with all members around it."""
        if self._call is None:  # in a copy
            self._call = self._built()
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return what the method itself carries, as torch's schedulers mark the steps of their optimizers."""
        if name.startswith("__"):  # asked by those who copy and pickle
            raise AttributeError(name)
        return getattr(self.original, name)

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function of a bound method, which torch's schedulers wrap."""
        return lambda owner, *args, **kwargs: self(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds the owner's methods: a copy of the owner has its own."""
        return {**vars(self), "_call": None}

    def _set(self, members: list[tuple[int, Any, Callable[..., Any]]]) -> None:
        self.members = sorted(members, key=lambda one: one[0])
        self._call = self._built()  # at once: torch 2.11 cannot compile a step that looks its method up

    def _built(self) -> Callable[..., Any]:
        call = self.original
        for _, _, act in self.members:
            call = partial(act, call)
        return call
