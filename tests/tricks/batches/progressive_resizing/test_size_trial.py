"""Which sizes are tried, and whose fault an error is."""

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_speedups import ProgressiveResizing
from lightning_speedups.attach.copies import NoCopyError
from lightning_speedups.tricks.batches.progressive_resizing.size_trial import try_sizes
from zoo import Classifier, ReplayLoader, TwoOptimizers, trainer


class Tries(Callback):
    """Tries sizes that are the batch itself, as long as a size is not among the wrong ones."""

    def __init__(self, trick, sizes, wrong=(), full=32):
        self.trick, self.sizes, self.wrong, self.full, self.tried = trick, sizes, wrong, full, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        def resized(size):
            self.tried.append(size[0])
            if size[0] in self.wrong:
                raise ZeroDivisionError("no such size")
            return batch

        try_sizes(trainer, self.trick, (self.full, self.full), [(side, side) for side in self.sizes], resized)


def tried(sizes, wrong=(), module=None):
    trick = ProgressiveResizing(probe=False)
    callback = Tries(trick, sizes, wrong)
    trainer(callbacks=[trick, callback], max_steps=1).fit(module or Classifier(), ReplayLoader())
    return callback.tried


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ([*range(8, 33)], [8, 9, 20, 31]), ([8, 16, 32], [8, 16]), ([8, 32], [8]), ([32], []), ([], []),
        ([8, 16, 24], [8, 16, 24]),
    ],
)  # fmt: skip
def test_the_ends_the_middle_and_two_neighbours_are_tried(sizes, chosen):
    assert tried(sizes) == chosen


def test_a_size_that_fails_where_the_full_one_does_not_is_refused():
    with pytest.raises(MisconfigurationException, match=r"32 × 32 pixels and not of 16 × 16 \(no such size\)") as error:
        tried([8, 16, 24, 32], wrong=[16])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_where_full_images_fail_too_the_first_step_says_it():
    assert tried([8, 16, 32], wrong=[8, 16, 32]) == [8, 32, 16, 32]


def test_a_module_that_optimizes_manually_cannot_be_tried():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(NoCopyError, match="optimizes manually"):
        tried([8, 32], module=Manual())


def test_what_cannot_be_tried_is_said_before_the_first_step(caplog):
    class OneSize(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), caplog.at_level("INFO"):
        trainer(callbacks=[ProgressiveResizing()], max_steps=4).fit(OneSize(), ReplayLoader())
    assert (
        "cannot try beforehand whether the model takes images of other sizes: OneSize optimizes manually" in caplog.text
    )
