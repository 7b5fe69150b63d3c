"""The embedded text: the same bytes for a version of Python, other files held out, windows of it."""

import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.text import CONTEXT, TextData, coded, library_modules, library_text

FOLDER = Path(sysconfig.get_path("stdlib"))


def read(tensor):
    return bytes(tensor.flatten().tolist())


def test_modules_are_the_first_by_name_and_their_files_to_the_byte():
    modules = library_modules()
    assert list(modules) == sorted(modules)
    assert 100 < len(modules) <= 160
    assert {"abc", "ast", "this"} & modules.keys() == {"abc", "ast", "this"}
    for name in ("abc", "argparse", "typing"):
        if name in modules:
            assert modules[name] == (FOLDER / f"{name}.py").read_bytes()
    assert list(library_modules(5)) == list(modules)[:5]
    assert modules.keys() <= sys.stdlib_module_names  # nothing that somebody put into the folder


def test_every_tenth_module_is_held_out():
    data, sources = library_text(context=32), list(library_modules().values())
    held_out = b"".join(source for i, source in enumerate(sources, 1) if i % 10 == 0)
    rest = b"".join(source for i, source in enumerate(sources, 1) if i % 10)
    assert data.size == len(held_out) + len(rest)
    test = read(data.x_test[data.x_test[:, 0].argsort(stable=True)])
    assert sorted(test) == sorted(held_out[: len(test)])
    for inputs, targets in zip(data.x_test[:5], data.y_test[:5], strict=True):
        assert read(inputs) + read(targets[-1:]) in held_out
    for inputs, targets in zip(data.x_train[:5], data.y_train[:5], strict=True):
        assert read(inputs) + read(targets[-1:]) in rest
    lost = len(rest) - data.x_train.numel()
    assert 0 < lost <= 32


def test_a_limit_keeps_the_same_windows_each_time_and_the_name_tells_of_the_whole():
    whole, some, again = library_text(), library_text(50, 20), library_text(50, 20)
    assert all(map(torch.equal, (some.x_train, some.y_test), (again.x_train, again.y_test)))
    assert (len(some.x_train), len(some.y_train), len(some.x_test), len(some.y_test)) == (50, 50, 20, 20)
    assert some.x_train.shape[1] == CONTEXT
    assert (some.name, some.size) == (whole.name, whole.size)
    assert sys.version.split()[0] in some.name
    assert some.x_train.dtype == some.y_train.dtype == torch.int64


def test_chance_is_the_loss_of_knowing_how_often_each_byte_comes():
    targets = torch.tensor([[1, 1, 2, 7], [1, 1, 2, 1]])
    data = TextData("t", targets, targets, targets, targets)
    scores = torch.full((256,), -1e9)
    scores[[1, 2, 7]] = torch.tensor([5, 2, 1]).log()
    expected = torch.nn.functional.cross_entropy(scores.expand(8, -1), targets.flatten())
    assert data.chance == pytest.approx(float(expected), rel=1e-6)
    assert 2.5 < library_text(10, 500).chance < 4


def test_bytes_become_numbers():
    assert coded([b"\x00\xff", b"A"]).tolist() == [0, 255, 65]


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_speedups.measure.text.sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(CompareError, match="this Python has no sources of its standard library in"):
        library_text()
