"""The range test as a user calls it: right rates, and a fit afterwards that does not know of it."""

import dataclasses
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_speedups.measure as measure
from lightning_speedups.core.range_test import smooth, suggest
from lightning_speedups.measure.lr_range_test import LRRangeTest, RangeTestResult
from zoo import Classifier, assert_same_weights, images, loader, trainer, weights


class Bowl(LightningModule):
    """A quadratic of one curvature: plain SGD contracts below 2 / curvature and diverges above."""

    def __init__(self, curvature=4.0, lr=123.0):
        super().__init__()
        self.curvature, self.place, self.lr = curvature, nn.Parameter(torch.tensor([3.0, -2.0])), lr

    def training_step(self, batch, batch_idx):
        return 1.0 + self.curvature / 2 * self.place.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(torch.zeros(4), batch_size=2)


@pytest.mark.parametrize("method", ["valley", "steepest"])
@pytest.mark.parametrize("curvature", [0.4, 4.0, 40.0])
def test_the_suggestion_trains_and_follows_the_curvature(method, curvature):
    result = LRRangeTest(1e-4, 100.0, method=method).run(trainer(), Bowl(curvature))
    assert 0.003 / curvature < result.suggestion < 2 / curvature
    assert result.rates[-1] > 2 / curvature
    assert len(result.rates) < 100  # stopped where it diverged
    assert result.smoothed[-1] > 4 * min(result.smoothed)


def test_the_result_holds_the_curve_and_its_pick():
    result = LRRangeTest(1e-3, 1.0, steps=40, beta=0.9).run(trainer(), Bowl())
    count = len(result.rates)
    np.testing.assert_allclose(result.rates, np.geomspace(1e-3, 1.0, 40)[:count], rtol=1e-12)
    place, losses = np.array([3.0, -2.0]), []
    for rate in result.rates:
        losses.append(1 + 2 * (place**2).sum())
        place = place - rate * 4 * place
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    assert list(result.smoothed) == smooth(result.losses, 0.9)
    assert result.suggestion == suggest(result.rates, result.smoothed, result.method)
    assert result.suggestion in result.rates
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.suggestion = 1.0


@pytest.mark.parametrize(
    ("lr", "low", "high"),
    [
        (1e-3, 0.8e-3, 1.2e-2),  # up to ten times the module's own
        (0.3, 0.5, 0.7),  # no lower than twice it
        (123.0, 0.003, 0.5),  # a placeholder: the sweep knows better
        (1e-9, 0.003, 0.5),
    ],
)
def test_the_suggestion_is_bounded_by_the_rate_that_the_module_has_itself(lr, low, high):
    assert low < LRRangeTest(1e-5, 100.0, beta=0.5).run(trainer(), Bowl(lr=lr)).suggestion < high


class Guesses(LightningModule):
    """Its labels are drawn anew in each batch, and it starts at the best that can be had."""

    def __init__(self, optimizer):
        super().__init__()
        self.layer, self.optimizer = nn.Linear(8, 5), optimizer
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch), torch.randint(5, (len(batch),)))

    def train_dataloader(self):
        return DataLoader(torch.randn(256, 8), batch_size=16, shuffle=True)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


@pytest.mark.parametrize("method", ["minimum", "valley", "steepest"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_loss_of_noise_alone_is_told_with_the_way_out(method, optimizer):
    with pytest.raises(ValueError, match=r"(more than its noise|to fall somewhere) .* give a learning rate yourself"):
        LRRangeTest(method=method).run(trainer(), Guesses(optimizer))


class Data(LightningDataModule):
    def setup(self, stage):
        order = torch.randperm(32)
        self.set = TensorDataset(*(part[order] for part in images(32)))

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=8, shuffle=True)


def own():
    return DataLoader(TensorDataset(*images()), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2))


class WithLoader(Classifier):
    def train_dataloader(self):
        return own()


@pytest.mark.parametrize("given", ["loader", "datamodule", "datamodule first", "hook"])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_fit_after_the_test_is_the_fit_without_it_to_the_bit(given, same_trainer):
    def fit(test):
        torch.manual_seed(3)
        module = (WithLoader if given == "hook" else Classifier)()
        args, kwargs = (
            ([own()], {})
            if given == "loader"
            else ([], {"datamodule": Data()})
            if given == "datamodule"
            else ([Data()], {})
            if given == "datamodule first"
            else ([], {})
        )
        user = trainer()
        if test:
            before = weights(module)
            result = LRRangeTest(1e-3, 1.0, steps=40).run(user if same_trainer else trainer(), module, *args, **kwargs)
            assert len(result.rates) > 10
            assert_same_weights(before, weights(module))
        user.fit(module, *args, **kwargs)
        return module

    one, other = fit(test=True), fit(test=False)
    assert_same_weights(weights(one), weights(other))
    assert one.losses == other.losses


def test_a_compiled_model_may_be_given():
    model = torch.compile(Bowl(), backend="eager")
    assert LRRangeTest(1e-3, 1.0, method="steepest").run(trainer(), model).suggestion < 0.5


def test_without_any_loader_lightning_says_so():
    with pytest.raises(MisconfigurationException, match="`train_dataloader"):
        LRRangeTest().run(trainer(), Classifier())


def test_a_range_in_which_the_loss_only_rises_is_told():
    with pytest.raises(ValueError, match="Expected 10 points or more"):
        LRRangeTest(10.0, 1000.0).run(trainer(), Bowl())
    with pytest.raises(ValueError, match="Expected the loss to fall somewhere"):
        LRRangeTest(0.51, 0.52, stop_factor=1e9).run(trainer(), Bowl())


def test_what_is_no_trainer_of_lightnings_is_refused():
    class Trainer:
        __module__ = "elsewhere.trainer"

    with pytest.raises(MisconfigurationException, match=r"Trainer of `elsewhere\.trainer`"):
        LRRangeTest().run(Trainer(), Classifier(), loader())


@pytest.fixture
def result():
    return LRRangeTest(1e-4, 100.0).run(trainer(), Bowl())


def test_the_figure_shows_curve_and_suggestion(result, tmp_path):
    figure = result.figure()
    (axes,) = figure.axes
    raw, smoothed, _, mark = axes.lines
    assert axes.get_xscale() == "log"
    assert raw.get_alpha() < 0.5
    np.testing.assert_array_equal(raw.get_xydata(), np.stack([result.rates, result.losses], axis=1))
    np.testing.assert_array_equal(smoothed.get_xydata(), np.stack([result.rates, result.smoothed], axis=1))
    np.testing.assert_array_equal(mark.get_xdata(), [result.suggestion])
    assert any(f"{result.suggestion:.2g}" in text.get_text() for text in axes.get_legend().get_texts())
    low, high = axes.get_ylim()
    assert low < min(result.smoothed)
    assert result.smoothed[0] < high < 2 * result.smoothed[0]
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_the_figure_goes_where_one_asks_and_not_to_pyplot(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    backend = matplotlib.rcParams._get("backend")
    figure = Figure()
    _, right = figure.subplots(1, 2)
    assert result.figure(ax=right) is figure
    assert len(right.lines) == 4
    assert result.figure() is not figure
    assert matplotlib.rcParams._get("backend") == backend


def test_a_curve_that_ends_in_infinity_can_be_drawn(result):
    spoilt = dataclasses.replace(
        result, losses=(*result.losses[:-1], float("inf")), smoothed=(*result.smoothed[:-1], float("inf"))
    )
    spoilt.figure().savefig("spoilt.png")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"min_lr": 0.0}, "`min_lr` to be a number above 0, but got 0.0"),
        ({"max_lr": float("inf")}, "`max_lr`"),
        ({"min_lr": 1.0, "max_lr": 1.0}, "`max_lr` to be above `min_lr`, which is 1.0, but got 1.0"),
        ({"steps": 9}, "`steps` to be a whole number of 10 or more, but got 9"),
        ({"method": "deepest"}, "`method` to be .*valley.*steepest.* but got 'deepest'"),
        ({"beta": 1.0}, "`beta`"),
        ({"stop_factor": 1.0}, "`stop_factor` to be a number above 1, but got 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        LRRangeTest(**arguments)


@pytest.mark.slow
def test_it_needs_none_of_the_extras():
    code = """
import sys
import lightning.pytorch, pytorch_lightning, timm, torchmetrics  # they may use what is there

extras = ("rich", "matplotlib", "sklearn", "torchvision", "PIL")
for name in [name for name in sys.modules if name.split(".")[0] in extras]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(extras))

import lightning_speedups.measure as measure
from lightning_speedups.measure import LRRangeTest
from lightning_speedups.measure.lr_range_test import RangeTestResult

assert RangeTestResult is measure.RangeTestResult
LRRangeTest()
heavy = {"digits", "loading", "networks", "progress", "report", "results", "runner", "training"}
assert not heavy & {name.rpartition(".")[2] for name in sys.modules if name.startswith("lightning_speedups.measure.")}
try:
    measure.compare
except ImportError as error:
    print("needs", error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("needs ")


def test_the_rooms_names_are_there_and_others_are_not():
    assert measure.LRRangeTest is LRRangeTest
    assert measure.RangeTestResult is RangeTestResult
    assert set(measure._FILES) < set(measure.__all__)
    assert set(measure.__all__) <= set(dir(measure))
    for name in measure.__all__:
        assert name in ("ARMS", "TASKS") or getattr(measure, name).__module__.startswith("lightning_speedups.measure.")
    with pytest.raises(AttributeError, match=r"measure' has no attribute 'nothing'"):
        _ = measure.nothing
