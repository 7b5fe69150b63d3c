"""The house: who may import whom, and who may touch Lightning's private parts."""

import ast
import sys
from pathlib import Path

import pytest

import lightning_speedups

ROOT = Path(lightning_speedups.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TRICKS = {"callbacks", "mixins", "strategies", "losses", "data", "defaults"}
STOREYS = ["core", "attach", TRICKS, "models", "recipes", "measure", "cli"]
LIBRARIES = {"core": {"torch"}, "losses": {"torch"}, "cli": {"rich"}}


BASES = [
    "packages",
    "stations",
    "trick",
    "randomness",
    "copies",
    "run_length",
    "steps",
    "batches",
    "loaders",
    "wrapping",
]  # of attach/, each may be built on those before it


def grip(name):
    return BASES.index(name) if name in BASES else len(BASES)


def room(parts):
    return parts[0] if parts else "lightning_speedups"


def storey(name):
    return next((i for i, rooms in enumerate(STOREYS) if name == rooms or name in rooms), None)


def imports(path):
    """All modules a file imports, functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            yield node.module


def forbidden(path):
    here = path.relative_to(ROOT).with_suffix("").parts
    mine = room(here)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "lightning_speedups":
            theirs = room(rest)
            if mine in ("__init__", "__main__") or theirs == "lightning_speedups":
                allowed = mine not in TRICKS | {"core", "attach"}
            elif mine == theirs:  # trick files do not know each other; grips stand on their bases and on nothing else
                allowed = mine in ("core", "models", "measure", "recipes") or (
                    mine == "attach" and rest[1:] and rest[1] in BASES and BASES.index(rest[1]) < grip(here[1])
                )
            else:
                allowed = storey(theirs) is not None and storey(mine) is not None and storey(theirs) < storey(mine)
        else:
            allowed = top in sys.stdlib_module_names or top in LIBRARIES.get(mine, {top})
        if not allowed:
            yield f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_house_only(path):
    assert not list(forbidden(path))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("core/x.py", "import lightning.pytorch"),
        ("core/x.py", "from lightning_speedups.attach.trick import Trick"),
        ("losses/x.py", "from lightning.pytorch import Trainer"),
        ("callbacks/x.py", "from lightning_speedups.callbacks.mixup_callback import MixupCallback"),
        ("callbacks/x.py", "from lightning_speedups.losses.label_smoothing_loss import LabelSmoothingLoss"),
        ("callbacks/x.py", "from lightning_speedups import MixupCallback"),
        ("callbacks/x.py", "def f():\n    from lightning_speedups.measure import compare"),
        ("attach/x.py", "from lightning_speedups.attach.schedules import ScheduleTrick"),
        ("attach/trick.py", "from lightning_speedups.attach.steps import OptimizerTrick"),
        ("cli.py", "import torch"),
    ],
)
def test_the_check_itself_finds_a_forbidden_import(place, line, tmp_path, monkeypatch):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert list(forbidden(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lightnings_private_parts_are_touched_in_attach_only(path):
    if path.relative_to(ROOT).parts[0] == "attach":
        return
    tree = ast.parse(path.read_text())
    touched = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and any(word in ast.unparse(node.value).split(".") for word in ("trainer", "strategy", "pl_module"))
    ]
    touched += [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning.")
        for alias in node.names
        if alias.name.startswith("_") or "._" in (node.module or "")
    ]
    assert not touched


def test_every_file_stands_in_a_room_of_the_house():
    rooms = {room(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    assert rooms - {"__init__", "__main__"} <= {
        name for names in STOREYS for name in ([names] if isinstance(names, str) else names)
    }


def test_the_tests_mirror_the_package():
    tests = Path(__file__).parent
    for path in FILES:
        if path.name != "__init__.py" and path.relative_to(ROOT).parts[0] != "measure":
            mirrored = tests / path.relative_to(ROOT).with_name(f"test_{path.name}")
            assert mirrored.exists(), f"{path.relative_to(ROOT)} has no {mirrored.relative_to(tests)}"
