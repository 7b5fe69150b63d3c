"""Ready combinations of tricks that were measured together, each a function; the same as YAML for LightningCLI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_speedups.core.arguments import check_choice
from lightning_speedups.recipes.stack import Stack
from lightning_speedups.recipes.text_fast import text_fast
from lightning_speedups.recipes.vision_fast import vision_fast

__all__ = ["RECIPES", "Stack", "config_file", "recipe"]

RECIPES: Mapping[str, Callable[..., Stack]] = {"vision-fast": vision_fast, "text-fast": text_fast}


def recipe(name: str, data: Any, **options: Any) -> Stack:
    """Return a combination of tricks that was measured, ready for an unmodified LightningModule.

    Args:
        name: ``"vision-fast"``: images to a good accuracy in a few epochs, see `vision_fast`. ``"text-fast"``: a
            language model to a good loss in few steps, see `text_fast`.
        data: The training data, as the recipe wants it.
        **options: The recipe's own.

    Raises:
        ValueError: If there is no such recipe, or an option is out of range.

    Example:
        >>> import torch
        >>> images, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
        >>> stack = recipe("vision-fast", (images, labels), epochs=4)
        >>> stack.trainer["max_epochs"], len(stack.loader)
        (4, 3)
    """
    check_choice("name", name, tuple(RECIPES))
    return RECIPES[name](data, **options)


def config_file(name: str) -> Path:
    """Return the path of a recipe's configuration for LightningCLI: Trainer arguments and callbacks.

    Args:
        name: As in `recipe`.

    Raises:
        ValueError: If there is no such recipe.

    Example:
        >>> config_file("vision-fast").name
        'vision_fast.yaml'
    """
    check_choice("name", name, tuple(RECIPES))
    return Path(__file__).with_name(f"{name.replace('-', '_')}.yaml")
