"""Dropout and distorting tricks at a share of their strength, and back."""

import pytest
from torch import nn

from lightning_speedups import BatchAugmentation, MixupCallback, OneCycleMomentum, ProgressiveResizing
from lightning_speedups.tricks.batches.progressive_resizing.regularization import Regularization
from zoo import Classifier, trainer


def parts():
    module = Classifier()
    module.extra = nn.ModuleList([nn.Dropout(0.4), nn.Sequential(nn.Dropout2d(0.2), nn.Linear(2, 2))])
    mixup, crops = MixupCallback(), BatchAugmentation()
    crops.strength = 0.5
    resizing = ProgressiveResizing()
    return module, mixup, crops, resizing, trainer(callbacks=[OneCycleMomentum(0.1), mixup, resizing, crops])


def found_in(one, module, resizing):
    one.strategy.connect(module)
    found = Regularization(resizing, resizing.sizes, 0.5)
    found.on_train_start(one)
    return found


def test_each_gets_a_share_of_its_own_strength_and_has_it_back_in_the_end():
    module, mixup, crops, resizing, one = parts()
    found = found_in(one, module, resizing)
    for share in (0.0, 0.25, 1.0, 0.5):
        found.scale(share)
        assert (mixup.strength, crops.strength) == (share, 0.5 * share)
        assert (module.extra[0].p, module.extra[1][0].p) == (0.4 * share, 0.2 * share)
        assert resizing.strength == 1.0
    found.leave(one)
    assert (module.extra[0].p, module.extra[1][0].p) == (0.4, 0.2)
    assert (mixup.strength, crops.strength) == (1.0, 0.5)
    assert "strength" not in vars(mixup)
    assert vars(crops)["strength"] == 0.5


def test_it_says_whether_there_is_anything():
    module, *_, resizing, one = parts()
    found_in(one, module, resizing)  # a warning would fail the test
    found_in(trainer(callbacks=[resizing]), module, resizing)
    found_in(one, Classifier(), resizing)
    with pytest.warns(UserWarning, match="found nothing to scale"):
        found_in(trainer(callbacks=[resizing, OneCycleMomentum(0.1)]), Classifier(), resizing)


@pytest.mark.parametrize(("full", "share"), [(None, 0.5), ([16, 16], 0.5), ([16, 2], 1.0)])
def test_the_share_at_the_start_follows_the_size_where_that_is_known(full, share):
    module, *_, resizing, one = parts()
    found = found_in(one, module, resizing)
    resizing.saved.full = full  # the side of 2 is below the multiple, and so has no smaller size
    assert found.share(one) == share
