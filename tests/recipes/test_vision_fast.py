"""The recipe through a real Trainer, on ordinary modules: what it does to a run, and what it leaves as it was."""

import copy
import itertools
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from patches import patched
from torch.utils.data import TensorDataset

from lightning_speedups import (
    AllocatorTuning,
    BatchAugmentation,
    ChannelsLast,
    FastStart,
    LRCurve,
    Muon,
    MuonCallback,
    ProgressiveResizing,
    SubsetTraining,
)
from lightning_speedups.recipes.vision_fast import batch_size_for, images_and_labels, vision_fast
from zoo import Convolutions, NotesGroups, assert_same_weights, photos, trainer, weights


class Notes(NotesGroups):
    """What an optimizer is and holds at each step, and what a batch looks like there."""

    def __init__(self):
        super().__init__()
        self.sides, self.labels = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sides.append(batch[0].shape[-1])
        self.labels.append(batch[1].clone())


def fitted(module, data=None, **options):
    stack = vision_fast(photos() if data is None else data, **({"batch_size": 32, "seed": 0} | options))
    notes = Notes()
    arguments = stack.trainer | {"callbacks": [*stack.trainer["callbacks"], notes]}
    run = trainer(**arguments)
    run.fit(module, stack.loader)
    return run, notes


def of(stack, kind):
    return next((callback for callback in stack.trainer["callbacks"] if type(callback) is kind), None)


# ---- what a run with it is


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_learns_with_muon_whatever_the_module_configures(optimizer, dtype):
    images, labels = photos()
    images = images if dtype == torch.uint8 else (images.float() - 100) / 60
    module = Convolutions(optimizer)
    run, notes = fitted(module, (images, labels), epochs=8)
    assert {kind for kind, _ in notes.steps} == {Muon}
    assert run.global_step == len(notes.steps) > 8
    early, late = torch.tensor(module.losses[:4]).mean(), torch.tensor(module.losses[-4:]).mean()
    assert late < 0.6 * early
    with torch.no_grad():
        assert (module.eval()(images).argmax(1) == labels).float().mean() > 0.8


@pytest.mark.parametrize(
    "other", [{"optimizer": "adamw"}, {"scheduled": True}, {"optimizer": "adamw", "scheduled": True}]
)
def test_the_run_is_the_same_to_the_bit_whatever_optimizer_and_schedule_the_module_has(other):
    module = Convolutions()
    twin = Convolutions(**other)
    twin.load_state_dict(module.state_dict())
    fitted(module, epochs=3)
    fitted(twin, epochs=3)
    assert_same_weights(weights(module), weights(twin))


def test_rates_fall_on_a_line_and_the_rest_is_under_sgd():
    muon = of(vision_fast(photos()), MuonCallback)
    peaks = {"muon": muon.lr, "norm biases": muon.norm_bias_factor * muon.rest_lr}
    peaks |= dict.fromkeys(("head", "head biases"), muon.head_lr)
    _, notes = fitted(Convolutions("adamw"), epochs=2)
    assert len(notes.steps) == 8
    shares = [groups[0]["lr"] / muon.lr for _, groups in notes.steps]
    assert shares[0] == pytest.approx(1)
    assert [a - b for a, b in itertools.pairwise(shares)] == pytest.approx([shares[0] - shares[1]] * 7)
    assert 0 <= shares[-1] < 1 / 7
    for share, (_, groups) in zip(shares, notes.steps, strict=True):
        assert len(groups) == 5
        for group in groups:
            assert group["rule"] == ("muon" if group["name"] == "muon" else "sgd")
            assert group["weight_decay"] == 0
            assert group["lr"] == pytest.approx(share * peaks.get(group["name"], muon.rest_lr))


def test_images_grow_and_the_middle_epochs_have_fewer_samples():
    _, notes = fitted(Convolutions(), epochs=5, start=0.5, keep=0.5)
    assert notes.sides == sorted(notes.sides)
    assert (notes.sides[0], notes.sides[-1]) == (8, 16)
    assert len(notes.sides) < 5 * 4
    _, notes = fitted(Convolutions(), epochs=5, start=1, keep=1)
    assert notes.sides == 20 * [16]


def test_orders_and_draws_follow_the_seed_alone():
    module = Convolutions()
    again, other = copy.deepcopy(module), copy.deepcopy(module)
    for one, seed, start in ((module, 1, 10), (again, 1, 20), (other, 2, 10)):
        torch.manual_seed(start)
        fitted(one, seed=seed, epochs=3)
    assert_same_weights(weights(module), weights(again))
    assert not torch.equal(weights(module)["net.9.weight"], weights(other)["net.9.weight"])


def test_without_a_seed_they_follow_torchs():
    module = Convolutions()
    again = copy.deepcopy(module)
    for one in (module, again):
        torch.manual_seed(3)
        fitted(one, seed=None, epochs=1)
    assert_same_weights(weights(module), weights(again))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    module = Convolutions(scheduled=True)
    before = {name: (p.requires_grad, p.is_contiguous()) for name, p in module.named_parameters()}
    own = set(vars(module))
    stack = vision_fast(photos(), epochs=2, seed=0)

    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if fails and trainer.global_step == 2:
                raise RuntimeError("on purpose")

    run = trainer(**stack.trainer | {"callbacks": [*stack.trainer["callbacks"], Fails()]})
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            run.fit(module, stack.loader)
    else:
        run.fit(module, stack.loader)
    assert patched(run) == set()
    assert {name: (p.requires_grad, p.is_contiguous()) for name, p in module.named_parameters()} == before
    assert [part.momentum for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)] == [0.1, 0.1]
    assert {name for name in set(vars(module)) - own if not name.startswith("_")} == set()


# ---- what it is made of


def test_options_reach_their_parts():
    stack = vision_fast(photos(), epochs=7, batch_size=17, crop=1, flip="random", keep=0.6, seed=9)
    assert stack.trainer["max_epochs"] == 7
    assert (stack.loader.batch_size, stack.loader.drop_last, stack.loader.seed) == (17, True, 9)
    assert (of(stack, BatchAugmentation).crop, of(stack, BatchAugmentation).flip) == (1, "random")
    assert of(stack, BatchAugmentation).seed == of(stack, SubsetTraining).seed == 9
    assert of(stack, SubsetTraining).keep == 0.6
    assert of(vision_fast(photos(), flip=None), BatchAugmentation).flip is None


def test_growth_and_subsets_are_left_out_where_they_do_nothing():
    always = [MuonCallback, LRCurve, FastStart, BatchAugmentation, ChannelsLast, AllocatorTuning]
    for options, more in (
        ({"start": 1, "keep": 1}, set()),
        ({"keep": 1}, {ProgressiveResizing}),
        ({"start": 1}, {SubsetTraining}),
        ({"epochs": 2}, {ProgressiveResizing}),
    ):
        kinds = [type(callback) for callback in vision_fast(photos(), **options).trainer["callbacks"]]
        assert [kind for kind in kinds if kind in always] == always
        assert set(kinds) - set(always) == more


def test_the_loss_is_torchs_with_smoothing():
    logits, labels = torch.randn(8, 4), torch.arange(8) % 4
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.allclose(vision_fast(photos()).loss(logits, labels), expected)


@pytest.mark.parametrize("samples", [1, 20, 31, 32, 1599, 1600, 1650, 50_000, 10**6])
def test_an_epoch_has_fifty_steps_within_bounds(samples):
    size = batch_size_for(samples)
    assert 1 <= size <= min(samples, 1000)
    assert size == samples if samples < 32 else size >= 32
    if 1600 <= samples <= 50_000:
        assert 49 <= math.floor(samples / size) <= 51


# ---- data


def test_a_pair_a_list_and_a_dataset_of_tensors_give_the_same_batches():
    images, labels = photos()
    firsts = []
    for data in ((images, labels), [images, labels], TensorDataset(images, labels)):
        found = images_and_labels(data)
        assert found[0] is images
        assert found[1] is labels
        stack = vision_fast(data, batch_size=50, seed=1)
        order = next(iter(stack.loader))
        assert [tuple(part.shape) for part in order] == [(50, 3, 16, 16), (50,)]
        firsts.append(order)
    assert all(torch.equal(one, other) for order in firsts for one, other in zip(order, firsts[0], strict=True))


def test_the_data_stay_where_they_are_and_are_not_copied():
    images, labels = photos()
    stack = vision_fast((images, labels))
    assert all(one is other for one, other in zip(stack.loader.dataset.tensors, (images, labels), strict=True))
    on_meta = vision_fast((images.to("meta"), labels.to("meta")))
    assert {tensor.device.type for tensor in on_meta.loader.dataset.tensors} == {"meta"}


IMAGES, LABELS = photos(40)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (IMAGES, "got Tensor"),
        ((IMAGES,), "got tuple"),
        ((IMAGES, LABELS, LABELS), "got tuple"),
        ({"image": IMAGES, "label": LABELS}, "got dict"),
        ((IMAGES, LABELS.tolist()), "got tuple"),
        ((IMAGES[0], LABELS), r"shapes \[\(3, 16, 16\), \(40,\)\]"),
        ((IMAGES, torch.nn.functional.one_hot(LABELS)), r"\(40, 4\)"),
        ((IMAGES, LABELS[:5]), r"\(5,\)"),
        ((IMAGES[:0], LABELS[:0]), r"\(0,\)"),
        (TensorDataset(IMAGES), "got TensorDataset"),
        (torch.utils.data.Subset(TensorDataset(IMAGES, LABELS), [0]), "got Subset"),
    ],
)
def test_what_is_no_images_and_labels_is_refused(data, shown):
    with pytest.raises(ValueError, match=f"Expected `data` to be images .N, C, H, W. and labels.*{shown}"):
        vision_fast(data)


@pytest.mark.parametrize(
    "options",
    [
        *({"epochs": value} for value in (0, 1.5, None)),
        *({"batch_size": value} for value in (0, 41, 2.5)),
        *({"crop": value} for value in (-1, 1.5)),
        {"flip": "mirror"},
        *({"start": value} for value in (0, 1.1, -1, "1", None)),
        *({"keep": value} for value in (0, 1.1, -1, None)),
        {"keep": 2, "epochs": 1},
        {"seed": 0.5},
    ],
)
def test_what_is_out_of_range_is_refused_by_its_name(options):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(options))}` to be"):
        vision_fast((IMAGES, LABELS), **options)
