"""Which part of a run is over, in each of its units, and the sizes that follow."""

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_speedups import ProgressiveResizing
from zoo import Batches, Classifier, ReplayLoader, images, trainer


class Notes(Callback):
    """The progress and the size that the next batch finds; and what was promised for its epoch and for the rest."""

    def __init__(self, sizes):
        self.sizes, self.progress, self.now, self.promised, self.rest = sizes, [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.fit_loop.epoch_loop.batch_progress.current.ready -= 1  # as it was when the batch came
        trainer.fit_loop.epoch_loop.batch_progress.total.ready -= 1
        self.progress.append(self.sizes.progress(trainer))
        self.now.append(self.sizes.now(trainer, (32, 32)))
        self.rest.append(self.sizes.to_come(trainer, (32, 32)))
        self.promised.append(self.sizes.largest_in(trainer.current_epoch, (32, 32)))
        trainer.fit_loop.epoch_loop.batch_progress.current.ready += 1
        trainer.fit_loop.epoch_loop.batch_progress.total.ready += 1


def noted(trick, epochs=4, data=None, **options):
    notes = Notes(trick.sizes)
    trainer(callbacks=[trick, notes], max_epochs=epochs, **options).fit(Classifier(), data or ReplayLoader())
    return notes


def test_by_batches_the_part_of_them_is_over():
    notes = noted(ProgressiveResizing())
    assert notes.progress == [i / 16 for i in range(16)]


def test_by_epochs_the_part_of_these_is_over():
    notes = noted(ProgressiveResizing(by="epoch"))
    assert notes.progress == [epoch / 4 for epoch in range(4) for _ in range(4)]


def test_in_epochs_of_different_lengths_each_counts_alike():
    notes = noted(ProgressiveResizing(fill_batch=True, grow_from=0, full_from=1))
    begins = [i for i, progress in enumerate(notes.progress) if progress in (0, 0.25, 0.5, 0.75)]
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], len(notes.progress)], strict=True)]
    assert len(set(lengths)) > 1
    assert notes.progress == [(epoch + i / n) / 4 for epoch, n in enumerate(lengths) for i in range(n)]


@pytest.mark.parametrize("options", [{}, {"by": "epoch"}, {"fill_batch": True}, {"stages": 3}])
def test_no_batch_of_an_epoch_is_larger_than_promised_and_all_sizes_to_come_are_known(options):
    notes = noted(ProgressiveResizing(multiple=1, **options))
    assert all(now <= promised for now, promised in zip(notes.now, notes.promised, strict=True))
    for i, rest in enumerate(notes.rest):
        assert set(notes.now[i:]) <= set(rest)
        assert rest[0] == notes.now[i]


def test_a_run_of_unknown_length_is_refused():
    x, y = images(8)
    trick = ProgressiveResizing(by="epoch")
    with pytest.raises(MisconfigurationException, match=r"whose length is unknown here. Give .*max_epochs"):
        trainer(callbacks=[trick], max_epochs=-1).fit(Classifier(), Batches((x, y)))
