"""Lines of every length: their data, their classifier and the comparison of batches of like length."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from lightning_speedups.measure import TASKS, CompareError, compare
from lightning_speedups.measure.lines import LineReader, library_lines, line_loaders, padded
from lightning_speedups.measure.networks import Transformer
from lightning_speedups.measure.text import library_modules

TINY = {"task": "lines", "samples": 200, "test_samples": 40, "batch_size": 16, "width": 8, "accelerator": "cpu"}


def tiny(arms, **options):
    return compare(arms=arms, progress=False, **(TINY | options))


@pytest.fixture(scope="module")
def data():
    return library_lines(300, 100)


def test_each_line_stands_in_its_module(data):
    sources = list(library_modules().values())
    assert data.num_classes == len(sources)
    assert (len(data.x_train), len(data.x_test)) == (300, 100)
    for lines, labels in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        for line, label in zip(lines, labels.tolist(), strict=True):
            assert bytes(line.tolist()) in sources[label]
            assert 8 <= len(line) <= 128
    assert len({len(line) for line in data.x_train}) > 30
    again = library_lines(300, 100)
    assert all(map(torch.equal, data.x_train, again.x_train))
    assert data.chance == max(data.y_test.tolist().count(label) for label in range(200)) / 100


def test_no_line_of_a_module_is_in_both_parts():
    data = library_lines(10**6, 10**5)
    seen = {(bytes(line.tolist()), label) for line, label in zip(data.x_train, data.y_train.tolist(), strict=True)}
    test = {(bytes(line.tolist()), label) for line, label in zip(data.x_test, data.y_test.tolist(), strict=True)}
    assert len(seen) == len(data.x_train) > 5 * len(test)
    assert not seen & test


def test_padding_changes_no_logit(data):
    network = LineReader(Transformer(256, context=128, width=16, depth=2), 7).eval()
    lines = [line for line in data.x_train[:6]]
    with torch.no_grad():
        together = network(padded([(line, torch.tensor(0)) for line in lines])[0])
        alone = torch.cat([network(line[None]) for line in lines])
    assert torch.allclose(together, alone, atol=1e-5)


def test_batches_are_padded_to_their_longest(data):
    train_loader, test_loader = line_loaders(data, 16, seed=1)
    batches = list(train_loader)
    assert len(batches) == 300 // 16
    assert all(bool((lines[:, -1] != 0).any()) for lines, _ in batches)
    known = {bytes(line.tolist()): label for line, label in zip(data.x_train, data.y_train.tolist(), strict=True)}
    lines, labels = batches[0]
    for line, label in zip(lines, labels.tolist(), strict=True):
        assert known[bytes(line[line != 0].tolist())] == label
    assert torch.equal(torch.cat([labels for _, labels in test_loader]), data.y_test)
    again, other = line_loaders(data, 16, seed=1)[0], line_loaders(data, 16, seed=2)[0]
    orders = [torch.cat([labels for _, labels in one]) for one in (batches, again, other)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_a_comparison_from_end_to_end(tmp_path):
    result = tiny(["buckets"], seeds=1, epochs=2, out=tmp_path)
    assert [(run.complete, len(run.points)) for run in result.runs] == [(True, 2), (True, 2)]
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["metric"] == "accuracy"
    assert document["settings"]["classes"] == len(library_modules()) > 100
    assert "lines of the standard library of Python" in document["settings"]["data"]
    assert result.table().row_count == 2


def test_points_hold_what_an_independent_evaluation_gives():
    ends = {}
    original = TASKS["lines"].module

    def module(network, data, **options):
        ends["module"], ends["data"] = original(network, data, **options), data
        return ends["module"]

    task = TASKS["lines"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "lines", type(task)(**{**vars(task), "module": module}))
        result = tiny(["plain"], seeds=1, epochs=1)
    lines, labels = padded(list(zip(ends["data"].x_test, ends["data"].y_test, strict=True)))
    with torch.no_grad():
        logits = ends["module"].eval().model(lines)
    point = result.runs[0].points[-1]
    assert point.test_loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert point.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=1e-6)
    assert point.samples == 192


def test_buckets_have_less_padding():
    shapes = {}

    def note(name, make):
        def build(at):
            class Notes(Callback):
                def on_train_batch_start(self, trainer, module, batch, index):
                    if trainer.limit_train_batches == 1.0:
                        shapes.setdefault(name, []).append(batch[0])

            made = make(at)
            return replace(made, callbacks=[*made.callbacks, Notes()])

        return build

    arms = TASKS["lines"].arms
    with pytest.MonkeyPatch.context() as patch:
        for name, arm in list(arms.items()):
            patch.setitem(arms, name, replace(arm, build=note(name, arm.build)))
        tiny(["buckets"], seeds=1, epochs=1, samples=640)
    padding = {name: sum(int((lines == 0).sum()) for lines in batches) for name, batches in shapes.items()}
    assert padding["buckets"] < 0.5 * padding["plain"]
    assert len(shapes["buckets"]) == len(shapes["plain"]) == 40


def test_what_is_for_images_is_refused():
    with pytest.raises(CompareError, match="`data` is for images; the task lines has a text of its own"):
        tiny(["plain"], data="photos")
    with pytest.raises(CompareError, match="unknown arm 'fast'"):
        tiny(["fast"])
