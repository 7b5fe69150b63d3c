"""Measure the tricks: paired runs on real images, as a function and as ``lightning-speedups compare``."""

from lightning_speedups.measure.arms import ARMS, Arm, Ingredients, Situation
from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import ImageData
from lightning_speedups.measure.results import Comparison, Run, Summary
from lightning_speedups.measure.runner import compare
from lightning_speedups.measure.settings import Settings

__all__ = [
    "ARMS",
    "Arm",
    "CompareError",
    "Comparison",
    "ImageData",
    "Ingredients",
    "Run",
    "Settings",
    "Situation",
    "Summary",
    "compare",
]
