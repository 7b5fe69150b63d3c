"""The tricks and their test files, found and not listed."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning_speedups

TESTS, PACKAGE = Path(__file__).parent, Path(lightning_speedups.__file__).parent
ROOM = "tricks"


def source(trick: Any) -> Path:
    """The file of a trick, in the package."""
    return Path(inspect.getsourcefile(trick)).relative_to(PACKAGE)


TRICKS = {
    name: trick
    for name in lightning_speedups.__all__
    if source(trick := getattr(lightning_speedups, name)).parts[0] == ROOM
}


@functools.cache
def own_tests(name: str) -> ModuleType:
    """The test file of a trick, with its ``EXAMPLE``."""
    path = TESTS / source(TRICKS[name]).with_name(f"test_{source(TRICKS[name]).name}")
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
