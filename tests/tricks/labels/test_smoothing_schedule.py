"""Which ε each training step really used, read from the losses of a real fit."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateFinder, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import IterableDataset

from lightning_speedups import BinaryLabelSmoothing, LabelSmoothingLoss, SmoothingSchedule
from lightning_speedups.core.schedules import SHAPES
from lightning_speedups.tricks.labels.smoothing_schedule import factor_at
from zoo import (
    CLASSES,
    Classifier,
    Interrupted,
    OneHot,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    trainer,
    weights,
)


def EXAMPLE():
    return {"criterion": LabelSmoothingLoss(0.1), "callbacks": [SmoothingSchedule(end_factor=0.25)]}


class Noting(LabelSmoothingLoss):
    """Notes the ε of each call, as it shows in the loss of a known sample."""

    def __init__(self, smoothing=0.4):
        super().__init__(smoothing)
        self.seen, self.others = [], []

    def forward(self, input, target):
        scores, label = 8 * torch.eye(CLASSES)[:1], torch.tensor([0])
        plain, half = (F.cross_entropy(scores, label, label_smoothing=epsilon).item() for epsilon in (0.0, 0.5))
        noted = 0.5 * (super().forward(scores, label).item() - plain) / (half - plain)  # the loss is linear in ε
        (self.seen if torch.is_grad_enabled() else self.others).append(noted)
        return super().forward(input, target)


class Validating(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.criterion(self.head(self.backbone(batch[0])), batch[1]))


def fit(schedule, smoothing=0.4, data=None, module=None, **arguments):
    module = module or Classifier(Noting(smoothing))
    trainer(callbacks=[schedule], **arguments).fit(module, ReplayLoader() if data is None else data)
    return module


def check(module, expected):
    np.testing.assert_allclose(module.criterion.seen, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "factors"),
    [
        ({}, lambda p: 1 - p),
        ({"end_factor": 0.5}, lambda p: 1 - 0.5 * p),
        ({"end_factor": 2.0}, lambda p: 1 + p),
        ({"shape": "cosine"}, lambda p: (1 + np.cos(np.pi * p)) / 2),
        ({"shape": "polynomial", "options": {"power": 3.0}}, lambda p: (1 - p) ** 3),
        ({"shape": "exponential"}, lambda p: 0.01**p),
        ({"shape": "step", "options": {"milestones": [0.5], "gamma": 0.1}}, lambda p: np.where(p < 0.5, 1, 0.1)),
        ({"shape": lambda p: p * p}, lambda p: p * p),
        ({"start": 0.5}, lambda p: np.clip(2 - 2 * p, 0, 1)),
        ({"start": 0.25, "stop": 0.75, "end_factor": 0.2}, lambda p: 1 - 0.8 * np.clip((p - 0.25) / 0.5, 0, 1)),
        ({"start": 0.5, "stop": 0.5}, lambda p: np.where(p < 0.5, 1, 0)),
        ({"start": 0.99}, np.ones_like),
        ({"stop": 0.0}, np.zeros_like),
    ],
)
def test_each_step_has_its_place_on_the_curve(arguments, factors):
    check(fit(SmoothingSchedule(**arguments)), 0.4 * factors(np.arange(12) / 12))


@pytest.mark.parametrize(
    "arguments", [{"max_steps": 7}, {"max_epochs": -1, "max_steps": 9}, {"limit_train_batches": 3}]
)
def test_the_run_is_as_long_as_the_trainer_makes_it(arguments):
    module = fit(SmoothingSchedule(), data=loader(), **arguments)
    total = {"max_steps": 7, "max_epochs": 9, "limit_train_batches": 9}[next(iter(arguments))]
    check(module, 0.4 * (1 - np.arange(total) / total))


@pytest.mark.parametrize(
    "accumulating", [{"accumulate_grad_batches": 3}, {"callbacks": GradientAccumulationScheduler({0: 1, 1: 2})}]
)
def test_accumulation_changes_nothing(accumulating):
    module = Classifier(Noting())
    extra = accumulating.pop("callbacks", None)
    trainer(callbacks=[SmoothingSchedule(), *([extra] if extra else [])], **accumulating).fit(module, ReplayLoader())
    check(module, 0.4 * (1 - np.arange(12) / 12))


def test_manual_optimization_goes_by_batches_too():
    class Manual(Classifier):
        def __init__(self, criterion):
            super().__init__(criterion)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    check(fit(SmoothingSchedule(), module=Manual(Noting())), np.repeat(0.4 * (1 - np.arange(12) / 12), 2))


@pytest.mark.parametrize(
    "criterion",
    [
        LabelSmoothingLoss(0.3),
        LabelSmoothingLoss([0.0, 0.1, 0.2, 0.3], torch.rand(4)),
        BinaryLabelSmoothing(0.2),
        BinaryLabelSmoothing([0.0, 0.1, 0.2, 0.3]),
    ],
)
def test_every_loss_is_driven(criterion):
    binary = isinstance(criterion, BinaryLabelSmoothing)
    module = Classifier(OneHot(criterion) if binary else criterion, lr=0.0)
    fit(SmoothingSchedule("cosine"), module=module)
    smoothing = torch.as_tensor(criterion.smoothing)
    for number, ((inputs, labels), loss) in enumerate(zip(module.seen, module.losses, strict=True)):
        now = smoothing * (1 + math.cos(math.pi * number / 12)) / 2
        scores = module.train().head(module.backbone(inputs))
        hot = F.one_hot(labels, CLASSES).float()
        if binary:
            expected = F.binary_cross_entropy_with_logits(scores, hot * (1 - now) + now / 2)
        else:
            own = now.expand(CLASSES)[labels].unsqueeze(1)
            weight = torch.ones(CLASSES) if criterion.weight is None else criterion.weight
            expected = (
                -(((1 - own) * hot + own / CLASSES) * weight * scores.log_softmax(1)).sum() / weight[labels].sum()
            )
        assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own look at its inputs
def test_all_losses_among_the_submodules_are_found_also_compiled_and_made_late():
    class Several(Classifier):
        def configure_model(self):
            self.late = nn.ModuleDict({"binary": BinaryLabelSmoothing(0.2)})
            self.compiled = torch.compile(LabelSmoothingLoss(0.3), backend="eager", fullgraph=True)
            self.noted = []

        def training_step(self, batch, batch_idx):
            self.noted.append(
                [loss.strength.item() for loss in (self.late["binary"], self.criterion) if loss.strength is not None]
            )
            scores = self.head(self.backbone(batch[0]))
            self.losses.append(self.compiled(scores, batch[1]))
            torch.testing.assert_close(
                self.losses[-1],
                F.cross_entropy(scores, batch[1], label_smoothing=0.3 * (1 - (len(self.losses) - 1) / 12)),
            )
            return self.losses[-1]

    torch._dynamo.reset()
    module = Several(LabelSmoothingLoss(0.1))
    with torch._dynamo.config.patch(recompile_limit=2):  # without and with a schedule
        fit(SmoothingSchedule(), module=module)
    assert module.noted[0] == []
    np.testing.assert_allclose(module.noted[1:], [[1 - i / 12] * 2 for i in range(1, 12)], rtol=1e-6)


def test_a_factor_of_one_is_the_same_to_the_bit_as_no_schedule():
    torch.manual_seed(0)
    scheduled = fit(SmoothingSchedule(start=0.99), module=Classifier(LabelSmoothingLoss(0.1)))
    torch.manual_seed(0)
    plain = Classifier(LabelSmoothingLoss(0.1))
    trainer().fit(plain, ReplayLoader())
    assert_same_weights(weights(scheduled), weights(plain))


def test_a_curve_that_comes_back_to_one_gives_the_loss_back_as_it_was():
    class Looks(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            strengths.append(pl_module.criterion.strength)

    strengths = []
    schedule = SmoothingSchedule(lambda p: 0.5 if p < 0.5 else 1.0)
    trainer(callbacks=[schedule, Looks()]).fit(Classifier(LabelSmoothingLoss(0.1)), ReplayLoader())
    assert strengths == [0.5] * 6 + [None] * 6


def test_validation_and_what_comes_after_each_step_see_the_smoothing_that_was_given():
    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            strengths.append(pl_module.criterion.strength)

    strengths = []
    module = Validating(Noting())
    trainer(callbacks=[SmoothingSchedule(), Looks()], val_check_interval=2).fit(module, ReplayLoader(), loader())
    check(module, 0.4 * (1 - np.arange(12) / 12))
    assert module.criterion.others == pytest.approx([0.4] * len(module.criterion.others), rel=1e-4)
    assert module.criterion.others
    assert strengths == [None] * 12


@pytest.mark.parametrize("failing", [None, "training_step", "on_train_batch_end", "validation_step"])
def test_the_smoothing_is_put_back_also_after_an_exception(failing):
    module, schedule = Validating(Noting()), SmoothingSchedule()
    if failing:
        before = getattr(module, failing)

        def fails(*arguments, **named):
            if len(module.criterion.seen) >= 6:
                raise Interrupted
            return before(*arguments, **named)

        setattr(module, failing, fails)
        with pytest.raises(Interrupted):
            trainer(callbacks=[schedule]).fit(module, ReplayLoader(), loader())
    else:
        trainer(callbacks=[schedule]).fit(module, ReplayLoader(), loader())
    assert module.criterion.strength is None
    assert module.criterion.smoothing == 0.4
    assert b"Noting" not in pickle.dumps(schedule)


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_resumed_run_goes_on_where_it_stood(stop):
    whole = fit(SmoothingSchedule("cosine"))
    parted, again = Classifier(Noting()), Classifier(Noting())
    fit_interrupted(parted, ReplayLoader(), stop, [SmoothingSchedule("cosine")])
    resume(again, ReplayLoader(), [SmoothingSchedule("cosine")])
    assert parted.criterion.seen + again.criterion.seen == whole.criterion.seen


def test_a_resumed_run_of_another_length_is_stretched():
    first, longer = Classifier(Noting()), Classifier(Noting())
    fit_interrupted(first, ReplayLoader(), 8, [SmoothingSchedule()])
    resume(longer, ReplayLoader(), [SmoothingSchedule()], max_epochs=5)
    check(longer, 0.4 * (1 - np.arange(8, 20) / 20))


def test_a_checkpoint_holds_nothing_of_it():
    module = Classifier(LabelSmoothingLoss([0.1, 0.2, 0.3, 0.4]))
    fit_interrupted(module, ReplayLoader(), 4, [SmoothingSchedule()])
    saved = torch.load("at.ckpt", weights_only=True)
    assert not saved["callbacks"]
    assert not [name for name in saved["state_dict"] if "criterion" in name]


def test_it_runs_beside_weight_averaging_and_the_rate_finder():
    module = Classifier(Noting())
    others = [WeightAveraging(), LearningRateFinder(num_training_steps=5, update_attr=True)]
    trainer(callbacks=[SmoothingSchedule(), *others]).fit(module, loader())
    check(module, [0.4] * 5 + list(0.4 * (1 - np.arange(12) / 12)))  # the finder's trial run has no callbacks


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("smoothing", [0.2, [0.0, 0.1, 0.2, 0.3]])
def test_it_runs_in_any_precision(precision, smoothing):
    losses = []
    for one in (precision, "32-true"):
        torch.manual_seed(0)
        losses.append(
            fit(SmoothingSchedule(), module=Classifier(LabelSmoothingLoss(smoothing), lr=0.0), precision=one).losses
        )
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def refused(told, module, schedules=None, data=None, **arguments):
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=schedules or [SmoothingSchedule()], **arguments).fit(
            module, ReplayLoader() if data is None else data
        )
    assert not module.losses


@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_module_without_such_a_loss_is_refused(criterion):
    refused("among the submodules of Classifier there are none. Assign one in its `__init__`", Classifier(criterion))


@pytest.mark.parametrize("smoothing", [0, 0.0, [0.0] * CLASSES])
def test_losses_without_smoothing_stay_as_they_are(smoothing):
    ends = []
    for callbacks in ([], [SmoothingSchedule()]):
        torch.manual_seed(0)
        module = Classifier(LabelSmoothingLoss(smoothing))
        trainer(callbacks=callbacks, max_epochs=1).fit(module, loader())
        ends.append(weights(module))
    assert_same_weights(*ends)


@pytest.mark.parametrize("smoothing", [0.5, [0.1, 0.2, 0.5, 0.0]])
def test_a_smoothing_that_would_reach_one_is_refused(smoothing):
    told = r"would take LabelSmoothingLoss\(smoothing=0.5\) up to 1, but ε must stay below 1"
    refused(told, Classifier(LabelSmoothingLoss(smoothing)), [SmoothingSchedule(end_factor=2.0)])


def test_a_run_of_unknown_length_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(2, 8, 8), torch.tensor(0)

    data = torch.utils.data.DataLoader(Endless(), batch_size=4)
    told = r"needs the length of the run, .* Give `Trainer\(max_steps=...\)`"
    refused(told, Classifier(LabelSmoothingLoss(0.1)), data=data, max_epochs=1)
    check(fit(SmoothingSchedule(), data=data, max_epochs=-1, max_steps=3), 0.4 * (1 - np.arange(3) / 3))


def test_two_schedules_are_refused():
    refused(
        "there are two such callbacks", Classifier(LabelSmoothingLoss(0.1)), [SmoothingSchedule(), SmoothingSchedule()]
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"shape": "sine"}, "`shape` to be a function or one of cosine, linear"),
        ({"shape": "linear", "options": {"power": 2.0}}, "options of shape 'linear'"),
        ({"options": [2.0]}, "`options` to be a dict"),
        ({"shape": math.cos, "end_factor": 0.1}, "no `options` or `end_factor` for your own `shape`"),
        ({"shape": lambda p: p - 0.5}, "finite factors of 0 or more"),
        ({"end_factor": -0.1}, "`end_factor` to be a number of 0 or more, or None, but got -0.1"),
        ({"start": 1.1}, r"`start` to be a number in \[0, 1\], but got 1.1"),
        ({"stop": -0.5}, r"`stop` to be a number in \[0, 1\], but got -0.5"),
        ({"start": 0.6, "stop": 0.5}, "`stop` to be `start` or more, but got 0.5 after 0.6"),
        ({"shape": "trapezoid"}, "`shape` 'trapezoid' to change the smoothing, but its factor stays at 1"),
        ({"shape": lambda progress: 1.0}, "but its factor stays at 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        SmoothingSchedule(**arguments)


@given(st.floats(0, 1), st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.sampled_from(sorted(set(SHAPES))))
def test_the_curve_lies_between_start_and_stop(progress, ends, name):
    start, stop = ends
    shape = SHAPES[name]
    factor = factor_at(progress, shape, start, stop)
    assert 0 <= factor <= 1
    if progress < start:
        assert factor == shape(0.0)
    if progress >= stop:
        assert factor == shape(1.0)
