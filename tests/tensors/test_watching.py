"""Which steps are judged, how closely, and what is said of them."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from lightning_speedups.tensors.labels import BlendedTargets, MixedLabels
from lightning_speedups.tensors.reads import Reads
from lightning_speedups.tensors.watching import Watch


def labels():
    return MixedLabels.mix(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([0.75]))


def test_batches_are_followed_at_the_start_of_an_epoch_and_ever_more_rarely():
    watch, followed = Watch(), []
    for number in range(1, 41):
        watch.begin(labels(), 0 if number <= 24 else 1)
        followed += [number] if watch.seen.reads.follows else []
        watch.end()
    assert followed == [1, 2, 4, 8, 16, 25, 32]


def test_numbers_are_marked_only_where_they_are_followed():
    watch, targets = Watch(), torch.tensor([0.5])
    assert [type(watch.begin(targets, 0)) is BlendedTargets for _ in range(5)] == [True, True, False, True, False]
    assert watch.end() is None
    whole = torch.tensor([1, 2])
    assert watch.begin(whole, 1) is whole
    assert watch.end() is None


def test_a_copy_may_begin_a_batch_without_a_trace():
    watch = Watch()
    mixed = watch.begin(labels(), 0)
    copy.copy(watch).begin(labels(), 0)
    assert watch.end() is mixed
    assert not mixed.reads.follows


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (lambda s, y: F.cross_entropy(s, y), None),
        (lambda s, y: s.sum(), "reads no labels at all"),
        (lambda s, y: s.sum() + y.sum().item(), "nothing in step read the mixed labels: its loss used .* labels only,"),
        (lambda s, y: s.gather(1, y[:, None]).sum(), r"nothing in step .* only \(through `gather`\), which"),
        (lambda s, y: F.cross_entropy(s, y) + s[y == 1].sum(), r"a part of the loss in step .* `__getitem__`\)"),
    ],
)
def test_the_fault_of_a_first_step(step, told):
    watch, scores = Watch(), torch.randn(2, 3, requires_grad=True)
    step(scores, watch.begin(labels(), 0)).backward()
    fault = watch.fault(watch.end(), "step")
    assert watch.is_right == (told is None)
    if told is None:
        assert fault is None
    else:
        assert re.search(told, fault[0])


def test_after_a_right_step_one_without_labels_is_right_and_one_of_dominant_labels_is_not():
    watch, scores = Watch(is_right=True), torch.randn(2, 3, requires_grad=True)
    watch.begin(labels(), 0)
    assert watch.fault(watch.end(), "step") is None
    scores.gather(1, watch.begin(labels(), 0)[:, None]).sum().backward()
    assert "nothing in step" in watch.fault(watch.end(), "step")[0]


def test_the_fault_of_classes_made_of_numbers():
    watch, targets = Watch(), BlendedTargets.of(torch.tensor([0.5]), Reads())
    assert watch.fault(targets, "step") is None
    targets.reads.misread.append("cross_entropy")
    what, way_out = watch.fault(targets, "step")
    assert what.startswith("blended the targets, but step makes classes of them for its loss (through `cross_entropy`)")
    assert "`.long()` in the dataset" in way_out
