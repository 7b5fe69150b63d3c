"""The page for users with a problem names nothing that is not there, and its beginnings run."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from projects import char_gpt

import lightning_speedups
from zoo import LIGHTNING, Convolutions, photos, trainer, weights

PAGE = (Path(__file__).parents[1] / "docs" / "which_trick.md").read_text()
BEFORE, _, TABLES = PAGE.partition("## I come from")
OURS = re.sub(r"```.*?```", "", BEFORE, flags=re.DOTALL) + re.sub(r"^\| .*? \|", "|", TABLES, flags=re.MULTILINE)
"""The page without code, and without the columns that name what others have."""


def meaning(name):
    """What a name stands for: something of this package, of Lightning or of torch, or a module."""
    for home in (lightning_speedups, LIGHTNING, LIGHTNING.callbacks, torch.optim.lr_scheduler):
        if hasattr(home, name.split(".")[0]):
            return functools.reduce(getattr, name.split("."), home)
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last) if module else importlib.import_module(name)


def test_all_that_is_named_exists_and_takes_the_arguments_it_is_shown_with():
    spans = [re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", span) for span in re.findall(r"`([^`]+)`", OURS)]
    shown = [(one[1], re.findall(r"(\w+)=", one[2] or "")) for one in spans if one]
    assert len(shown) > 80
    for name, arguments in shown:
        meant = meaning(name)
        missing = set(arguments) - set(inspect.signature(meant).parameters if arguments else ())
        assert not missing, f"{name} takes no {missing}"


def test_every_trick_of_a_table_elsewhere_is_lightnings_where_it_is_said_so():
    lightnings = TABLES.partition("| Lightning's callback |")[2]
    for name in re.findall(r"`(\w+)`", "".join(re.findall(r"^\| .*? \|", lightnings, re.MULTILINE))):
        assert hasattr(LIGHTNING.callbacks, name)


def above_text():
    """What stands above the example for text in a user's project."""
    module, loader, *_ = char_gpt.project(LIGHTNING, block_size=128)
    tokens = torch.tensor([loader.dataset.stoi[character] for character in char_gpt.TEXT])
    return {"model": module, "tokens": tokens.repeat(30)}


def above_images():
    """What stands above the other examples."""
    images, labels = photos(64, side=32)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = Path("photos", f"class{label}", f"{index}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)

    class Data(LIGHTNING.LightningDataModule):
        def train_dataloader(self):
            dataset = torch.utils.data.TensorDataset(images.float(), labels)
            return torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)

    return {"model": Convolutions(), "data": Data()}


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_a_beginning_runs_as_it_stands(code):
    names = {"Trainer": trainer, **(above_text() if "text-fast" in code else above_images())}
    before = weights(names["model"])
    exec(compile(code, "which_trick.md", "exec"), names)
    assert not any(torch.equal(before[name], p) for name, p in names["model"].named_parameters() if p.ndim > 1)
