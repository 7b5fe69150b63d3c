"""The batch size and the rate of filled batches, and who stands at the optimizers for them."""

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_speedups import ProgressiveResizing
from lightning_speedups.attach.steps import Driver
from lightning_speedups.tricks.batches.progressive_resizing.filled_batches import FilledBatches
from zoo import Classifier, ReplayLoader, trainer


class Members(Callback):
    def on_train_start(self, trainer, pl_module):
        self.kinds = [type(member) for member in Driver.of(trainer).members]


@pytest.mark.parametrize(("fills", "kinds"), [(False, []), (True, [FilledBatches])])
def test_it_stands_at_the_optimizers_only_where_batches_are_filled(fills, kinds):
    noted = Members()
    one = trainer(callbacks=[ProgressiveResizing(fill_batch=fills), noted], max_epochs=1)
    one.fit(Classifier(), ReplayLoader())
    assert noted.kinds == kinds
    assert not Driver.of(one).members


def filled(rule="linear"):
    trick = ProgressiveResizing(fill_batch=True, rule=rule, by="epoch", grow_from=0, full_from=1, multiple=1)
    return next(grip for grip in trick.grips if isinstance(grip, FilledBatches))


def test_the_batch_has_as_many_images_as_have_the_pixels_of_full_ones():
    grip = filled()
    assert grip.batch_size_in_epoch(0, 8) == 8  # no image was seen
    grip.full, grip.sizes.length = (16, 16), 4
    assert [grip.batch_size_in_epoch(epoch, 8) for epoch in range(5)] == [32, 20, 14, 10, 8]


def test_the_rate_is_multiplied():
    grip = filled()
    assert grip.values_now(0, 0, {"lr": 0.1}) == {}
    grip.factors = [4.0, 1.0]
    assert grip.values_now(0, 0, {"lr": 0.5}) == {"lr": 2.0}
    assert grip.values_now(1, 0, {"lr": 0.5}) == {}


def test_an_optimizer_without_a_rate_is_refused():
    class Without(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.param_groups[0]["lr"] = None
            return optimizer

    with pytest.raises(MisconfigurationException, match=r"ProgressiveResizing drives `lr`.*fill_batch=False"):
        trainer(callbacks=[ProgressiveResizing(fill_batch=True)], max_epochs=1).fit(Without(), ReplayLoader())


def test_a_second_fit_looks_at_its_own_images():
    trick = ProgressiveResizing(fill_batch=True)
    trainer(callbacks=[trick], max_epochs=1).fit(Classifier(), ReplayLoader())
    grip = next(grip for grip in trick.grips if isinstance(grip, FilledBatches))
    assert (grip.full, grip.factors) == (None, [])
