"""Dropout and distorting tricks at a share of their strength, and back."""

from torch import nn

from lightning_speedups import BatchAugmentation, MixupCallback, OneCycleMomentum, ProgressiveResizing
from lightning_speedups.attach.regularization import Regularization
from zoo import Classifier, trainer


def parts():
    module = Classifier()
    module.extra = nn.ModuleList([nn.Dropout(0.4), nn.Sequential(nn.Dropout2d(0.2), nn.Linear(2, 2))])
    mixup, crops = MixupCallback(), BatchAugmentation()
    crops.strength = 0.5
    resizing = ProgressiveResizing()
    return module, mixup, crops, resizing, trainer(callbacks=[OneCycleMomentum(0.1), mixup, resizing, crops])


def test_each_gets_a_share_of_its_own_strength_and_has_it_back_in_the_end():
    module, mixup, crops, resizing, one = parts()
    found = Regularization(one, module, leave_out=resizing)
    for share in (0.0, 0.25, 1.0, 0.5):
        found.scale(share)
        assert (mixup.strength, crops.strength) == (share, 0.5 * share)
        assert (module.extra[0].p, module.extra[1][0].p) == (0.4 * share, 0.2 * share)
        assert resizing.strength == 1.0
    found.put_back()
    assert (module.extra[0].p, module.extra[1][0].p) == (0.4, 0.2)
    assert (mixup.strength, crops.strength) == (1.0, 0.5)
    assert "strength" not in vars(mixup)
    assert vars(crops)["strength"] == 0.5


def test_it_says_whether_there_is_anything():
    module, *_, resizing, one = parts()
    assert Regularization(one, module, resizing).has_parts
    assert Regularization(trainer(callbacks=[resizing]), module, resizing).has_parts
    assert Regularization(one, Classifier(), resizing).has_parts
    assert not Regularization(trainer(callbacks=[resizing, OneCycleMomentum(0.1)]), Classifier(), resizing).has_parts
