"""The files of the room import each other in one direction."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_speedups.measure

ROOM = Path(lightning_speedups.measure.__file__).parent
PREFIX = "lightning_speedups.measure."


def imported(path):
    """Files of the room that a file imports, within functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        yield from (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def test_no_file_imports_one_that_imports_it_back():
    graph = {path.stem: set(imported(path)) for path in ROOM.glob("*.py")}
    assert graph["runner"] >= {"results", "settings"}
    TopologicalSorter(graph).prepare()  # raises CycleError
