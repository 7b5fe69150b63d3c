"""The README's example runs as it stands, and its commands are the ones that work."""

import logging
import re
import tomllib
from pathlib import Path

import pytest
import torch

import lightning_speedups

ROOT = Path(__file__).parents[1]
TEXT, DOCS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "tricks.md").read_text()


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_the_examples_run_as_they_stand(caplog):
    names = {}
    first, second, ordinary, *others = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for code in (ordinary, second, ordinary, first, *others):  # the first lines rest on what an ordinary project has
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            exec(compile(code, "README.md", "exec"), names)
        if code in (first, second):
            with torch.no_grad():
                right = names["model"].eval().net(names["images"]).argmax(1) == names["labels"]
            assert right.float().mean() > (0.95 if code == first else 0.75)
    assert "nothing to do" not in caplog.text
    cache = names["cache"]
    assert re.search(rf"\nprint\(cache\.hits\)  # {cache.hits}: ", TEXT)
    assert f"{cache.hits} of {cache.hits + cache.misses} batches came from the cache" in caplog.text
    assert names["result"].suggestion > 0.01
    assert {Path(name).stat().st_size > 10_000 for name in ("range_test.png", "schedule.png")} == {True}


def test_the_two_commands_stand_there_once_each():
    assert TEXT.count("\npip install '.[bench]' && lightning-speedups compare\n") == 1
    assert TEXT.count("\npip install -e '.[dev]' && pytest\n") == 1


def test_the_version_is_the_same_everywhere():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == lightning_speedups.__version__


def test_every_result_file_that_is_named_exists():
    named = re.findall(r"`(benchmarks/[^`]+)`", TEXT + DOCS)
    assert len(named) > 10
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(
    "name", ["README.md", "docs/tricks.md", "docs/which_trick.md", "CONTRIBUTING.md", "benchmarks/README.md"]
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def rows(text):
    """The tricks of a table, by the first name in each row."""
    return re.findall(r"^\| `(\w+)`.*\|$", text, re.M)


def test_the_short_table_has_the_rows_of_the_whole_one():
    assert rows(TEXT) == rows(DOCS)
