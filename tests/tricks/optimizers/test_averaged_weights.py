"""The average in closed form; who sees it, and when; what checkpoints hold of it."""

import copy
import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from two_processes import Regressor, two

from lightning_speedups import AveragedWeights, FreezeProgressively, ProgressiveResizing
from zoo import (
    STOPS,
    Classifier,
    FreezesBackbone,
    Interrupted,
    Manual,
    Memory,
    ReplayLoader,
    SometimesInfinite,
    TwoOptimizers,
    assert_same_weights,
    endless,
    fit_interrupted,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [AveragedWeights(horizon=3)]}


def floats(module):
    return {name: one for name, one in weights(module).items() if one.is_floating_point()}


class Records(Callback):
    """Notes the weights that the module has after each step, in validation, and when it is over."""

    def __init__(self):
        self.steps, self.validated, self.after = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(floats(pl_module))

    def on_validation_start(self, trainer, pl_module):
        self.validated.append(floats(pl_module))

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.after.append(floats(pl_module))


def by_hand(steps, horizon, every=1):
    """The average after each step, in double precision, as a weighted sum of the weights of all steps."""
    averages = [None] * len(steps)
    for end in range(len(steps)):
        times = [t for t in range(every, end + 2, every)]
        shares = [1.0]  # the first update takes the weights as they are
        for t in times[1:]:
            decay = (1 - 1 / min(horizon, (10 + t) / 9)) ** every
            shares = [share * decay for share in shares] + [1 - decay]
        if times:
            averages[end] = {
                name: sum(s * np.asarray(steps[t - 1][name], np.float64) for s, t in zip(shares, times, strict=True))
                for name in steps[0]
            }
    return averages


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("horizon", "every", "seen"), [(4, 1, (4, 1)), (1.0, 3, (12, 3)), ("50%", 1, (6, 1))])
def test_validation_and_the_end_have_the_average_in_closed_form_and_training_the_raw_weights(horizon, every, seen):
    records, plain, module = Records(), Records(), Classifier()
    twin = copy.deepcopy(module)
    trainer(callbacks=[AveragedWeights(horizon, every, refresh_batches=0), records]).fit(
        module, ReplayLoader(), loader()
    )
    trainer(callbacks=[plain]).fit(twin, ReplayLoader(), loader())
    for one, other in zip(records.steps, plain.steps, strict=True):
        assert_same_weights(one, other)
    expected = by_hand(plain.steps, *seen)
    for epoch in range(3):
        assert_close(records.validated[epoch], expected[4 * epoch + 3])
    assert_close(floats(module), expected[-1])
    assert module.backbone[1].num_batches_tracked == 12


def test_with_a_long_past_it_is_torchs_own_average(monkeypatch):
    monkeypatch.setattr("lightning_speedups.tricks.optimizers.averaged_weights.share_kept", lambda *_: 0.75)
    module, reference = Classifier(), []

    class Theirs(Callback):
        def on_fit_start(self, trainer, pl_module):
            reference.append(
                AveragedModel(nn.ModuleList(pl_module.children()), multi_avg_fn=get_ema_multi_avg_fn(0.75))
            )

        def on_train_batch_end(self, trainer, pl_module, *_):
            reference[0].update_parameters(nn.ModuleList(pl_module.children()))

    trainer(callbacks=[AveragedWeights(4), Theirs()]).fit(module, ReplayLoader())
    ours, theirs = list(module.parameters()), list(reference[0].parameters())
    assert len(ours) == len(theirs) == 6
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("horizon", "steps", "expected"), [(0.01, 12, (1, 1)), (0.5, 12, (6, 1)), (40, 12, (40, 5)), (10, 12, (10, 2))]
)
@pytest.mark.parametrize("make", [Classifier, Manual])
def test_horizon_and_updates_follow_from_the_length_of_the_run(make, horizon, steps, expected, caplog):
    trick, seen = AveragedWeights(horizon, refresh_batches=0), []

    class Looks(Callback):
        def on_train_end(self, *_):
            seen.append((trick.run.horizon, trick.run.every))

    trainer(callbacks=[trick, Looks()]).fit(make(), ReplayLoader())
    assert seen == [expected]


def test_several_validations_in_an_epoch_each_have_the_average_and_training_goes_on_from_the_raw_weights():
    records, module = Records(), Classifier()
    run = trainer(callbacks=[AveragedWeights(4, refresh_batches=0), records], val_check_interval=2, max_epochs=2)
    run.fit(module, ReplayLoader(), loader())
    expected = by_hand(records.steps, 4)
    assert len(records.validated) == 4
    for found, step in zip(records.validated, (2, 4, 6, 8), strict=True):
        assert_close(found, expected[step - 1])
    for before, after in zip(records.steps, records.after[1:], strict=False):
        assert_same_weights(before, after)


def test_the_average_has_the_statistics_of_its_own_weights_on_the_last_batches():
    """Against torch's own, by `update_bn` on a network with the averaged weights."""
    seen, module = [], Classifier()

    class Computes(Callback):
        def on_validation_start(self, trainer, pl_module):
            network = copy.deepcopy(nn.Sequential(*pl_module.backbone))
            update_bn(pl_module.seen[-3:], network)
            theirs = [buffer.clone() for buffer in network.buffers()][:2]
            seen.append(list(zip((one.clone() for one in pl_module.backbone.buffers()), theirs, strict=False)))

    records = Records()
    run = trainer(callbacks=[AveragedWeights(4, refresh_batches=3), records, Computes()])
    run.fit(module, ReplayLoader(), loader())
    assert len(seen) == 3
    for one, other in itertools.chain(*seen):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(module.backbone[1].running_mean, seen[-1][0][0])
    for before, after in zip(records.steps, records.after[1:], strict=False):
        assert_same_weights(before, after)


def test_a_norm_that_does_not_train_any_more_keeps_its_own_statistics():
    class Later(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.backbone.eval()

    records, module = Records(), Classifier()
    trainer(callbacks=[AveragedWeights(4), Later(), records], max_epochs=2).fit(module, ReplayLoader(), loader())
    for name in ("backbone.1.running_mean", "backbone.1.running_var"):
        assert torch.equal(records.validated[1][name], records.steps[7][name])
        assert not torch.equal(records.validated[0][name], records.steps[3][name])


def test_where_no_step_can_be_run_on_a_copy_the_running_statistics_are_averaged_and_that_is_said():
    class Locked(Classifier):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    records, module = Records(), Locked()
    with pytest.warns(UserWarning, match=r"takes the average of its running statistics: Locked cannot be copied"):
        trainer(callbacks=[AveragedWeights(4), records]).fit(module, ReplayLoader(), loader())
    assert_close(floats(module), by_hand(records.steps, 4)[-1])


def test_frozen_parameters_stay_to_the_bit_and_tied_ones_are_one():
    module = Classifier()
    module.tied = module.head
    before = weights(module.backbone)
    trainer(callbacks=[FreezesBackbone(), AveragedWeights(3)]).fit(module, ReplayLoader(), loader())
    after = weights(module.backbone)
    assert_same_weights(before, after)
    assert module.tied.weight is module.head.weight
    trainer(callbacks=[AveragedWeights(3), ModelCheckpoint(".", filename="tied", save_weights_only=True)],
            enable_checkpointing=True, max_epochs=1).fit(module, ReplayLoader(), loader())  # fmt: skip
    state = torch.load("tied.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["tied.weight"], state["head.weight"])


@pytest.mark.parametrize("refresh", [0, 1, 4])
@pytest.mark.parametrize(("stop", "epoch_end"), [*((stop, False) for stop in STOPS), (8, True)])
def test_a_resumed_run_has_the_average_and_the_raw_weights_of_the_whole_one(stop, epoch_end, refresh):
    records, later = Records(), Records()
    whole, parted = Classifier(), Classifier()
    parted.load_state_dict(whole.state_dict())

    def trick():
        return AveragedWeights(5, 2, refresh)

    trainer(callbacks=[trick(), records]).fit(whole, ReplayLoader(), loader())
    fit_interrupted(parted, ReplayLoader(), stop, [trick()], epoch_end)
    resumed = trainer(callbacks=[trick(), later])
    resumed.fit(Classifier(), ReplayLoader(), loader(), ckpt_path="at.ckpt", weights_only=True)
    one, other = weights(whole), weights(resumed.lightning_module)
    if stop > 12 - refresh:  # which is said: fewer batches for the statistics
        one, other = ({k: v for k, v in state.items() if "running" not in k} for state in (one, other))
    assert_same_weights(one, other)
    for one, other in zip(records.steps[stop:], later.steps, strict=True):
        assert_same_weights(one, other)


def test_skipped_steps_update_nothing_and_a_resume_with_the_scaler_is_exact():
    def tricks(*more):
        return {"callbacks": [AveragedWeights(4), *more], "plugins": scaled()}

    records, whole, later = Records(), SometimesInfinite({2, 6}), SometimesInfinite({0})  # of those after a stop at 6
    parted = SometimesInfinite({2, 6})
    parted.load_state_dict(whole.state_dict())
    trainer(**tricks(records)).fit(whole, ReplayLoader())
    done = [step for t, step in enumerate(records.steps) if t not in (2, 6)]
    expected = by_hand(done, 4)[-1]
    found = {name: one.detach() for name, one in whole.named_parameters()}
    assert_close(found, {name: expected[name] for name in found})
    fit_interrupted(parted, ReplayLoader(), 6, **tricks())
    resume(later, ReplayLoader(), **tricks())
    assert_same_weights(weights(whole), weights(later))


def test_accumulation_counts_optimizer_steps():
    records, module = Records(), Classifier()
    trainer(callbacks=[AveragedWeights(3), records], accumulate_grad_batches=2).fit(module, ReplayLoader())
    expected = by_hand(records.steps[1::2], 3)[-1]
    found = {name: one.detach() for name, one in module.named_parameters()}
    assert_close(found, {name: expected[name] for name in found})


def test_after_an_exception_in_validation_the_training_weights_are_back():
    class Fails(Classifier):
        def validation_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1 and batch_idx == 1:
                raise Interrupted

    records, module = Records(), Fails()
    run = trainer(callbacks=[AveragedWeights(4), records])
    with pytest.raises(Interrupted):
        run.fit(module, ReplayLoader(), loader())
    assert_same_weights(records.steps[-1], floats(module))
    assert patched(run) == set()
    assert "run" not in vars(run.fit_loop.epoch_loop.val_loop)


def losses_of(module):
    return trainer().validate(module, loader(seed=1), verbose=False)[0]["val_loss"]


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("when", [{}, {"every_n_train_steps": 4}, {"monitor": "val_loss"}])
def test_a_file_has_what_was_evaluated(weights_only, when):
    memory, module = Memory(), Classifier()
    keeper = ModelCheckpoint(".", filename="best", save_weights_only=weights_only, **when)
    run = trainer(callbacks=[keeper, AveragedWeights(4)], enable_checkpointing=True, logger=memory, log_every_n_steps=1)
    run.fit(module, ReplayLoader(), loader(seed=1))
    loaded = Classifier.load_from_checkpoint("best.ckpt", weights_only=True)
    best = min(memory["val_loss"]) if "monitor" in when else memory["val_loss"][-1]
    assert losses_of(loaded) == pytest.approx(float(best), abs=0)


def test_the_best_file_is_tested_as_it_was_validated_and_the_last_one_has_the_end():
    module = Classifier()
    module.test_step = module.validation_step
    keeper = ModelCheckpoint(".", filename="{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    stopper = EarlyStopping("val_loss", min_delta=10.0, patience=2)
    run = trainer(callbacks=[stopper, keeper, AveragedWeights(4)], enable_checkpointing=True, max_epochs=6)
    run.fit(module, ReplayLoader(), loader(seed=1))
    assert run.current_epoch == 3
    last = torch.load("last.ckpt", weights_only=True)
    assert_same_weights(last["state_dict"], weights(module))
    tested = run.test(module, loader(seed=1), verbose=False, ckpt_path="best")
    assert tested[0]["val_loss"] == float(keeper.best_model_score)


def test_weights_that_move_to_other_memory_in_the_middle_of_a_run_are_still_averaged():
    class Moves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for one in pl_module.parameters():
                one.data = one.data.clone()

    moved, still = Classifier(), Classifier()
    moved.load_state_dict(still.state_dict())
    trainer(callbacks=[AveragedWeights(4), Moves()]).fit(moved, ReplayLoader(), loader())
    trainer(callbacks=[AveragedWeights(4)]).fit(still, ReplayLoader(), loader())
    assert_same_weights(weights(moved), weights(still))


def test_what_is_saved_in_validation_has_the_average_too_and_goes_on_exactly():
    class Saves(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            trainer.save_checkpoint(f"in{trainer.current_epoch}.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(f"end{trainer.current_epoch}.ckpt")

    whole = Classifier()
    trainer(callbacks=[AveragedWeights(4), Saves()]).fit(whole, ReplayLoader(), loader())
    one, other = (torch.load(f"{when}1.ckpt", weights_only=True) for when in ("in", "end"))
    assert_same_weights(one["state_dict"], other["state_dict"])
    (mine, its) = (next(v for k, v in file["callbacks"].items() if "AveragedWeights" in k) for file in (one, other))
    assert mine["holds_raw"]
    assert its["holds_raw"]
    assert_same_weights(mine["held"], its["held"])
    assert not torch.equal(mine["held"]["head.weight"], one["state_dict"]["head.weight"])


def test_validation_and_test_after_the_fit_have_the_average():
    memory, module = Memory(), Classifier()
    module.test_step = module.validation_step
    run = trainer(callbacks=[AveragedWeights(4)], logger=memory, log_every_n_steps=1)
    run.fit(module, ReplayLoader(), loader())
    last = memory["val_loss"][-1]
    assert run.validate(module, loader(), verbose=False)[0]["val_loss"] == last
    assert run.test(module, loader(), verbose=False)[0]["val_loss"] == last
    run.save_checkpoint("after.ckpt")
    fresh = Classifier()
    fresh.test_step = fresh.validation_step
    tested = trainer(callbacks=[AveragedWeights(4)]).test(fresh, loader(), verbose=False, ckpt_path="after.ckpt")
    assert tested[0]["val_loss"] == last


def test_a_run_that_goes_on_without_it_starts_from_the_average_and_one_that_begins_with_it_from_the_file():
    whole, plain = Classifier(), Classifier()
    fit_interrupted(whole, ReplayLoader(), 4, [AveragedWeights(4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of the missing callback
        resume(plain, ReplayLoader(), [Starts(first := [])])
    assert_same_weights(first[0], torch.load("at.ckpt", weights_only=True)["state_dict"])
    fit_interrupted(Classifier(), ReplayLoader(), 4, [])
    trick, began = AveragedWeights(1), []
    resume(Classifier(), ReplayLoader(), [trick, Starts(began)])
    assert_same_weights(began[0], torch.load("at.ckpt", weights_only=True)["state_dict"])
    assert trick.steps_done == [12]


class Starts(Callback):
    def __init__(self, seen):
        self.seen = seen

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.seen.append(weights(pl_module))


@pytest.mark.parametrize("first", [True, False])
def test_beside_progressive_resizing_training_gets_its_own_statistics_back(first):
    records, module = Records(), Classifier()
    tricks = [AveragedWeights(4), ProgressiveResizing(start=0.5, grow_from=0.9, full_from=1.0)]
    trainer(callbacks=[*(tricks if first else tricks[::-1]), records]).fit(module, ReplayLoader(), loader())
    for before, after in zip(records.steps, records.after[1:], strict=False):
        assert_same_weights(before, after)
    expected = by_hand(records.steps, 4)
    for name in ("head.weight", "backbone.0.weight"):
        np.testing.assert_allclose(records.validated[1][name], expected[7][name], rtol=1e-4, atol=1e-6)


def test_layers_that_freeze_in_the_middle_of_a_run_resume_exactly():
    def tricks():
        return [AveragedWeights(4), FreezeProgressively(backbone="backbone", start=0.3)]

    whole, parted = Classifier(), Classifier()
    parted.load_state_dict(whole.state_dict())
    trainer(callbacks=tricks()).fit(whole, ReplayLoader(), loader())
    fit_interrupted(parted, ReplayLoader(), 8, tricks())
    trainer(callbacks=tricks()).fit(parted, ReplayLoader(), loader(), ckpt_path="at.ckpt", weights_only=True)
    assert_same_weights(weights(whole), weights(parted))


def test_a_finder_in_the_middle_of_the_run_leaves_raw_weights_and_average():
    class FindsLater(LearningRateFinder):
        def on_fit_start(self, *_):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)
                trainer.optimizers[0].param_groups[0]["lr"] = pl_module.lr = 0.05

    records, plain, module = Records(), Records(), Classifier()
    twin = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of its own files
        finder = FindsLater(num_training_steps=3, min_lr=1e-4, max_lr=1e-2, early_stop_threshold=None)
        trainer(callbacks=[AveragedWeights(4, refresh_batches=0), finder, records]).fit(module, loader())
    trainer(callbacks=[plain]).fit(twin, loader())
    assert len(records.steps) == len(plain.steps)
    for one, other in zip(records.steps, plain.steps, strict=True):
        assert_same_weights(one, other)
    assert_close(floats(module), by_hand(plain.steps, 4)[-1])


def test_a_compiled_part_is_averaged():
    records, module = Records(), Classifier()
    module.backbone = torch.compile(module.backbone, backend="eager")
    keeper = ModelCheckpoint(".", filename="compiled", save_weights_only=True)
    run = trainer(
        callbacks=[AveragedWeights(4, refresh_batches=0), records, keeper], enable_checkpointing=True, max_epochs=1
    )
    run.fit(module, ReplayLoader(), loader())
    assert_close(floats(module), by_hand(records.steps, 4)[-1])
    state = torch.load("compiled.ckpt", weights_only=True)["state_dict"]
    assert_same_weights(state, weights(module))


class FitsInTwo(Regressor):
    def __init__(self):
        super().__init__()
        self.backbone.insert(1, nn.BatchNorm1d(7))


def test_two_processes_have_one_average():
    class Notes(Callback):
        def on_train_end(self, trainer, pl_module):
            state = trainer.strategy.lightning_module_state_dict()
            torch.save([state, weights(pl_module)], f"rank{trainer.global_rank}.pt")

    two([AveragedWeights(4), Notes()], max_epochs=2).fit(FitsInTwo())
    (one, its_weights), (other, their_weights) = (torch.load(f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert_same_weights(one, its_weights)
    parameters = [name for name, _ in FitsInTwo().named_parameters()]
    assert_same_weights({n: one[n] for n in parameters}, {n: other[n] for n in parameters})
    single = FitsInTwo()
    trainer(max_epochs=2).fit(single)
    assert not torch.equal(single.head.weight, one["head.weight"])
    assert their_weights.keys() == its_weights.keys()


def refused(what, module=None, callbacks=(), data=None, **options):
    with pytest.raises(MisconfigurationException, match=what):
        trainer(callbacks=[AveragedWeights(**options), *callbacks]).fit(module or Classifier(), data or ReplayLoader())


def test_what_cannot_be_averaged_is_refused_at_the_start():
    refused("by the steps of one optimizer, but this module has 2. Leave it out", TwoOptimizers())
    refused(r"`backbone.0.weight` is in torch.bfloat16. Use `Trainer\(precision", Classifier().bfloat16())
    refused("averages weights, and so does EMAWeightAveraging. Use one", callbacks=[EMAWeightAveraging()])
    with pytest.raises(MisconfigurationException, match=r"horizon=0.01.*Give `horizon` in optimizer steps"):
        trainer(callbacks=[AveragedWeights()], max_epochs=-1).fit(Classifier(), endless())
    split = FSDPStrategy()
    split.optimizers = [torch.optim.SGD(Classifier().parameters(), 0.1)]
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy may split. Use `strategy='ddp'`"):
        AveragedWeights().on_fit_start(SimpleNamespace(strategy=split), Classifier())


@pytest.mark.parametrize("horizon", [0, 0.0, -1, 1.5, "many", "0 steps"])
def test_a_horizon_must_be_a_part_of_a_run(horizon):
    with pytest.raises(ValueError, match="Expected `horizon` to be"):
        AveragedWeights(horizon)


def test_updates_must_be_a_whole_number_of_steps_apart():
    with pytest.raises(ValueError, match=r"Expected `every` to be a whole number of 1 or more, or None, but got 0\."):
        AveragedWeights(every=0)
