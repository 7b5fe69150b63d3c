"""A step of several batches is that of one large batch of all they hold, and everybody knows how many steps there are."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch import nn
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_speedups import (
    AutoMicroBatch,
    EffectiveBatchSize,
    ExactResume,
    ProgressiveResizing,
    SubsetTraining,
    WarmupLRScaler,
)
from lightning_speedups.attach.run_length import facts, run_length
from zoo import (
    CLASSES,
    Batches,
    Classifier,
    Manual,
    ReplayLoader,
    assert_same_weights,
    endless,
    fit_interrupted,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)

IGNORED = -100


def EXAMPLE():
    return {"callbacks": [EffectiveBatchSize({0: 8, 4: 16})]}


class Linear(LightningModule):
    """Classifies rows, or each token of a row; notes its weights after each step, and the rate of each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(6, CLASSES)
        self.steps, self.rates = [], []

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self.layer(inputs).flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.5, momentum=0.9)
        optimizer.register_step_pre_hook(lambda *_: self.rates.append(optimizer.param_groups[0]["lr"]))
        optimizer.register_step_post_hook(lambda *_: self.steps.append(self.layer.weight.detach().clone()))
        return optimizer


def rows(count=42):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 6, generator=generator), labels)


def tokens(count=42):
    """Rows of five tokens, of which the later rows have ever fewer with a label."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(CLASSES, (count, 5), generator=generator)
    labels[torch.rand(count, 5, generator=generator) < torch.linspace(0, 0.6, count).unsqueeze(1)] = IGNORED
    return TensorDataset(torch.randn(count, 5, 6, generator=generator), labels)


def fit(data, batch_size, *tricks, module=None, **options):
    """The weights after each step."""
    module = module or Linear()
    run = trainer(callbacks=[*tricks], **({"max_epochs": 2} | options))
    run.fit(module, DataLoader(data, batch_size=batch_size) if isinstance(data, TensorDataset) else data)
    assert len(module.steps) == run.global_step
    return torch.stack(module.steps)


def assert_near(one, other, within=1e-6):
    assert one.shape == other.shape
    assert (one - other).norm() < within * other.norm()


# ---- the gradient of a step


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}], ids=str)
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_steps_are_those_of_the_plain_large_batch_also_at_a_ragged_end(batches, options):
    whole = fit(rows(), 4 * batches, **options)
    assert_near(fit(rows(), 4, EffectiveBatchSize(4 * batches), **options), whole)
    if batches > 1 and not options:  # what is clipped anyway has lost its size
        lightnings = fit(rows(), 4, accumulate_grad_batches=batches)
        assert (lightnings - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}], ids=str)
def test_under_a_grad_scaler_too(options):
    whole = fit(rows(), 12, plugins=[scaled()], **options)
    assert_near(fit(rows(), 4, EffectiveBatchSize(12), plugins=[scaled()], **options), whole, 2e-3)


@pytest.mark.parametrize("count", [None, lambda batch: 1])
def test_a_step_of_equal_batches_is_lightnings_own_to_the_bit(count):
    ours = fit(rows(40), 4, EffectiveBatchSize(8, count=count))
    assert torch.equal(ours, fit(rows(40), 4, accumulate_grad_batches=2))


@pytest.mark.parametrize("batches", [2, 3])
def test_tokens_weigh_the_same_in_whatever_batch_they_are(batches):
    whole = fit(tokens(), 4 * batches)
    by_tokens = EffectiveBatchSize(4 * batches, count=lambda batch: (batch[1] != IGNORED).sum())
    assert_near(fit(tokens(), 4, by_tokens), whole)
    by_samples = fit(tokens(), 4, EffectiveBatchSize(4 * batches))
    assert (by_samples - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_batch_that_is_skipped_does_not_count(skipped):
    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    (inputs, labels), kept = rows(16).tensors, slice(4, 8) if skipped == 0 else slice(0, 4)
    whole = fit(Batches((inputs[kept], labels[kept]), (inputs[8:], labels[8:])), 0, max_epochs=1)
    assert_near(fit(rows(16), 4, EffectiveBatchSize(8), module=Skips(), max_epochs=1), whole)


def test_gradients_are_the_mean_when_callbacks_look_at_them():
    class Looks(Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen.append(pl_module.layer.weight.grad.clone())

    ours, whole = Looks(), Looks()
    fit(rows(), 4, ours, EffectiveBatchSize(12))
    fit(rows(), 12, whole)
    for one, other in zip(ours.seen, whole.seen, strict=True):
        assert_near(one, other, 1e-5)


class RunsOut(Linear):
    """Has no memory for more than two samples, which shows once the gradients are there."""

    def training_step(self, batch, batch_idx):
        self.size = len(batch[1])
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        if self.size > 2:
            raise torch.OutOfMemoryError


def test_batches_in_parts_and_such_as_are_tried_again_count_once():
    whole = fit(rows(), 12)
    assert_near(fit(rows(), 4, EffectiveBatchSize(12), AutoMicroBatch(start=3)), whole)
    assert_near(fit(rows(), 4, AutoMicroBatch(), EffectiveBatchSize(12), module=RunsOut()), whole)


# ---- how many steps there are


def test_the_size_may_change_over_the_run():
    class Reloads(Linear):
        def train_dataloader(self):
            return DataLoader(rows(), batch_size=(8, 12, 12, 4)[self.trainer.current_epoch])

    whole = fit(None, 0, module=Reloads(), max_epochs=4, reload_dataloaders_every_n_epochs=1)
    length = Notes(lambda run: run_length(run).steps)
    ours = fit(rows(), 4, EffectiveBatchSize({0: 8, 1: 12, 3: 4}), length, max_epochs=4)
    assert length.seen == [len(whole)] == [6 + 4 + 4 + 11]
    assert_near(ours, whole)


class Notes(Callback):
    """What is known of the run when it starts."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_start(self, trainer, pl_module):
        self.seen.append(self.look(trainer))


class Asks(Linear):
    """Asks the Trainer for the length of the run, and may have a scheduler that counts on it."""

    def __init__(self, scheduled=False):
        super().__init__()
        self.scheduled = scheduled

    def configure_optimizers(self):
        self.told, optimizer = self.trainer.estimated_stepping_batches, super().configure_optimizers()
        if not self.scheduled:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.told)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_the_trainer_knows_the_length_of_the_run_when_optimizers_are_made():
    module = Asks(scheduled=True)
    steps = fit(rows(), 4, EffectiveBatchSize(12), module=module)
    assert module.told == len(steps) == 2 * 4
    assert module.rates[-1] == pytest.approx(0.25 * (1 + math.cos(7 * math.pi / 8)))


def test_a_scheduler_that_counts_on_the_first_size_is_told_the_true_number_of_steps():
    module = Asks(scheduled=True)
    expected = "EffectiveBatchSize: the run has 18 optimizer steps, where `trainer.estimated_stepping_batches` says 24"
    with pytest.warns(UserWarning, match=expected):
        steps = fit(rows(), 4, EffectiveBatchSize({0: 8, 1: 12}), module=module, max_epochs=4)
    assert (len(steps), module.told) == (18, 24)


def test_the_rate_follows_the_size_and_warms_up_in_true_epochs():
    growing = EffectiveBatchSize({0: 8, 1: 12})
    module = Linear()
    fit(rows(), 4, WarmupLRScaler(base_batch_size=4, warmup_steps=0), growing, module=module)
    assert module.rates == pytest.approx([0.5 * 2] * 6 + [0.5 * 3] * 4)
    module = Linear()
    fit(rows(), 4, WarmupLRScaler(scale=3.0, warmup_epochs=1.5), growing, module=module)
    assert module.rates == pytest.approx([0.5 * (1 + 2 * min(step, 8) / 8) for step in range(10)])


OTHERS = {
    "by batch": lambda: ProgressiveResizing(multiple=2, probe=False),
    "SubsetTraining": lambda: SubsetTraining(0.5, method="random"),
    "ProgressiveResizing": lambda: ProgressiveResizing(fill_batch=True, multiple=2, probe=False),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_beside_tricks_that_plan_epochs_the_length_is_known(name, first):
    tricks, eye = [EffectiveBatchSize(16), OTHERS[name]()], Notes(lambda run: run_length(run).steps)
    run = trainer(callbacks=[*(tricks if first else tricks[::-1]), eye], max_epochs=8)
    run.fit(Classifier(), loader(64, 8))
    assert eye.seen == [run.global_step]
    assert (run.global_step < 8 * 4) is (name != "by batch")


@pytest.mark.parametrize("own", [False, True])
def test_filled_batches_make_larger_steps_at_a_larger_rate(own):
    data = loader(128, 8)
    if own:
        data = DataLoader(data.dataset, batch_sampler=BatchSampler(SequentialSampler(data.dataset), 8, False))
    module, resizing = Classifier(), ProgressiveResizing(0.5, 0.0, 0.6, 2, stages=2, fill_batch=True, probe=False)
    trainer(callbacks=[EffectiveBatchSize(16), resizing], max_epochs=2).fit(module, data)
    sizes = [len(inputs) for inputs, _ in module.seen]
    assert (set(sizes[:4]), sizes[4:]) == ({32}, [8] * 16)
    rates = [groups[0]["lr"] for groups in module.values]
    assert rates == pytest.approx([4 * 0.05] * 2 + [0.05] * 8)


def test_a_loader_must_tell_the_size_of_its_batches():
    batches = Batches(*zip(*(part.split(4) for part in rows(16).tensors), strict=True))
    with pytest.raises(MisconfigurationException, match=r"samples=8\) needs the batch size.*Give the loader that"):
        fit(batches, 0, EffectiveBatchSize(8))
    batches.batch_size = 4
    module, eye = Linear(), Notes(lambda run: facts(run, run.lightning_module).batch_size)
    tricks = [WarmupLRScaler(base_batch_size=4, warmup_steps=0), EffectiveBatchSize(8), eye]
    ours = fit(batches, 0, *tricks, module=module, max_epochs=1)
    assert (len(ours), eye.seen, module.rates) == (2, [8], [1.0, 1.0])


def test_a_loader_without_a_length_steps_at_its_end_too():
    run = trainer(callbacks=[EffectiveBatchSize(24)], max_epochs=2)
    run.fit(Classifier(), endless())
    assert run.global_step == 2 * 2


def test_several_loaders_have_no_one_batch_size():
    class Two(Linear):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    loaders = {name: DataLoader(rows(16), batch_size=4) for name in "ab"}
    with pytest.raises(MisconfigurationException, match="only a single training DataLoader"):
        fit(loaders, 0, EffectiveBatchSize(8), module=Two())


def test_a_rate_finder_has_its_trial_and_the_run_its_accumulation():
    module = Classifier()
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=6, early_stop_threshold=None)
    eye = Notes(lambda run: run_length(run).steps)
    run = trainer(callbacks=[eye, finder, EffectiveBatchSize(16)], max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(32, 8))
    assert eye.seen == [run.global_step] == [4]
    assert len(module.seen) == 6 + 2 * 4


# ---- resume, and what is put back


def seeded():
    torch.manual_seed(0)
    return Classifier()


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_resumed_anywhere_goes_on_with_the_size_of_its_epoch(stop):
    def tricks():
        return [EffectiveBatchSize({0: 16, 1: 24})]

    whole, parted = seeded(), seeded()
    trainer(callbacks=tricks()).fit(whole, ReplayLoader(5))
    fit_interrupted(parted, ReplayLoader(5), stop, tricks())
    assert resume(parted, ReplayLoader(5), tricks()).global_step == 3 + 2 + 2
    assert_same_weights(weights(whole), weights(parted))


class SavesAt(Callback):
    """Saves a checkpoint after a batch, counted from 1 over all epochs."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            trainer.save_checkpoint("at.ckpt")


def by_tokens():
    return EffectiveBatchSize(12, count=lambda batch: (batch[1] != IGNORED).sum())


@pytest.mark.parametrize(("data", "make"), [(rows, lambda: EffectiveBatchSize(12)), (tokens, by_tokens)])
def test_a_resume_within_a_step_makes_it_of_the_batches_that_are_left(data, make):
    first, trick, module = make(), make(), Linear()
    fit(data(24), 4, first, SavesAt(4), max_epochs=1)
    with warnings.catch_warnings():  # that the loader begins its epoch anew
        warnings.simplefilter("ignore")
        resume(module, DataLoader(data(24), batch_size=4), [trick], max_epochs=1)
    assert trick.saved.unit == first.saved.unit
    inputs, labels = data(24).tensors
    # Of the second step the batch before the checkpoint is lost, and the two after it are the loader's first.
    whole = fit(Batches((inputs[:12], labels[:12]), (inputs[:8], labels[:8])), 0, max_epochs=1)
    assert_near(torch.stack(module.steps), whole[1:])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [lambda: EffectiveBatchSize(12), by_tokens])
def test_beside_exact_resume_that_step_has_all_its_batches(make, first):
    def tricks():
        return [make(), ExactResume()][:: 1 if first else -1]

    whole = fit(tokens(), 4, *tricks())
    for batch in (1, 5, 12, 20):
        fit(tokens(), 4, *tricks(), SavesAt(batch))
        module = Linear()
        resume(module, DataLoader(tokens(), batch_size=4), tricks(), max_epochs=2)
        assert torch.equal(torch.stack(module.steps), whole[-len(module.steps) :])


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_accumulates_as_before_when_the_fit_is_over(fails):
    class Fails(Asks):
        def on_train_batch_end(self, *_):
            assert not fails

    module, run = Fails(), trainer(callbacks=[EffectiveBatchSize(8)], max_epochs=1)
    for _ in range(2):
        if fails:
            with pytest.raises(AssertionError):
                run.fit(module, DataLoader(rows(), batch_size=4))
        else:
            run.fit(module, DataLoader(rows(), batch_size=4))
        assert run.accumulate_grad_batches == 1
        assert patched(run) == set()


# ---- what is refused, and what is warned of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "Expected `samples` to be a whole number of 1 or more, or a dict"),
        ({"samples": {1: 8}}, "with one for epoch 0"),
        ({"samples": 8, "count": 3}, "Expected `count` to be a function of a batch, or None, but got 3"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        EffectiveBatchSize(**arguments)


@pytest.mark.parametrize(
    ("name", "others", "options"),
    [
        (r"Trainer\(accumulate_grad_batches=2\)", [], {"accumulate_grad_batches": 2}),
        ("GradientAccumulationScheduler", [GradientAccumulationScheduler({0: 2})], {}),
        ("StochasticWeightAveraging", [StochasticWeightAveraging(0.1)], {}),
    ],
)
def test_what_else_accumulates_is_refused_and_left_alone(name, others, options):
    run = trainer(callbacks=[EffectiveBatchSize(8), *others], **options)
    with pytest.raises(MisconfigurationException, match=rf"samples=8\) sets how many .*, and so does {name}\. Use one"):
        run.fit(Linear(), DataLoader(rows(), batch_size=4))
    assert run.accumulate_grad_batches == options.get("accumulate_grad_batches", 1)
    assert patched(run) == set()


def test_a_size_that_batches_do_not_make_is_refused_at_the_start_also_for_a_later_epoch():
    module = Linear()
    message = r"\(a batch of 4\): 16 or 20, but got 18\. Or change the loader's `batch_size`\."
    with pytest.raises(MisconfigurationException, match=message):
        fit(rows(), 4, EffectiveBatchSize({0: 8, 5: 18}), module=module)
    assert not module.steps


def test_manual_optimization_and_gradients_in_parts_are_refused():
    with pytest.raises(MisconfigurationException, match="Manual optimizes manually"):
        trainer(callbacks=[EffectiveBatchSize(16)]).fit(Manual(), loader())
    with pytest.raises(MisconfigurationException, match="needs whole gradients, which FSDPStrategy may split"):
        EffectiveBatchSize(16).on_fit_start(SimpleNamespace(strategy=FSDPStrategy()), Classifier())


def test_an_optimizer_that_computes_gradients_several_times_a_step_is_refused():
    class Searches(Linear):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    with pytest.raises(MisconfigurationException, match="LBFGS computes them more than once a step"):
        fit(rows(), 4, EffectiveBatchSize(8), module=Searches())


def test_a_batch_without_a_tensor_needs_a_count():
    class Reads(Linear):
        def training_step(self, batch, batch_idx):
            return self.layer.weight.square().sum()

    texts = DataLoader(["text"] * 12, batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"finds no tensor in it\. Give `count=`"):
        fit(texts, 0, EffectiveBatchSize(8), module=Reads())
    assert len(fit(texts, 0, EffectiveBatchSize(8, count=len), module=Reads(), max_epochs=1)) == 2


def test_a_step_longer_than_an_epoch_is_said():
    told = "a step of 64 samples takes 16 batches of each process, but an epoch has only 11"
    with pytest.warns(UserWarning, match=told):
        whole = fit(rows(), 4, EffectiveBatchSize(64))
    assert_near(whole, fit(rows(), 42))


def test_a_batch_of_the_size_named_is_a_step_without_a_word(recwarn):
    assert torch.equal(fit(rows(), 4, EffectiveBatchSize(4)), fit(rows(), 4))
    assert not [one for one in recwarn if "EffectiveBatchSize" in str(one.message)]
