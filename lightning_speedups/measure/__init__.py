"""Measure the tricks: paired runs on real images and text, as a function and as ``lightning-speedups compare``; and the
learning-rate range test.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_speedups.measure.arms import ARMS, Arm, Ingredients, Situation
from lightning_speedups.measure.batch_picture import plot_batch
from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import ImageData
from lightning_speedups.measure.lr_range_test import LRRangeTest, RangeTestResult
from lightning_speedups.measure.runs import Run, Summary
from lightning_speedups.measure.settings import Settings
from lightning_speedups.measure.text import TextData

if TYPE_CHECKING:
    from lightning_speedups.measure.results import Comparison
    from lightning_speedups.measure.runner import compare
    from lightning_speedups.measure.tasks import TASKS

__all__ = [
    "ARMS",
    "TASKS",
    "Arm",
    "CompareError",
    "Comparison",
    "ImageData",
    "Ingredients",
    "LRRangeTest",
    "RangeTestResult",
    "Run",
    "Settings",
    "Situation",
    "Summary",
    "TextData",
    "compare",
    "plot_batch",
]

# Imported on demand: these need the extra ``bench``.
_FILES = {"Comparison": "results", "TASKS": "tasks", "compare": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
