import signal
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.networks import build_network
from lightning_speedups.measure.stopwatch import Stopwatch
from lightning_speedups.measure.training import Classifier, loaders, seeded, train


@pytest.fixture(scope="module")
def data():
    return digit_collages(50, 20)


def module(data, seed=0, **options):
    with seeded(seed):
        return Classifier(build_network("convnet", data, width=4), data, lr=0.02, **options)


def fit(module, data, **options):
    return train(
        module, data, **({"batch_size": 16, "epochs": 2, "seed": 0, "trainer": {"accelerator": "cpu"}} | options)
    )


class Ticks:
    """A clock that only moves when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_the_stopwatch_counts_training_and_hooks_but_no_evaluation(data):
    clock = Ticks()

    class Slow(Callback):
        def on_train_start(self, *_):
            clock.now += 1000

        def on_train_epoch_start(self, *_):
            clock.now += 100

        def on_train_batch_start(self, *_):
            clock.now += 10

        def on_train_batch_end(self, *_):
            clock.now += 1

        def on_validation_start(self, *_):
            clock.now += 50_000

        def on_validation_batch_end(self, *_):
            clock.now += 20_000

        def on_validation_end(self, *_):
            clock.now += 0.25  # the trick's own hook after the clock has started again

    points = fit(module(data), data, callbacks=[Slow()], watch=Stopwatch(clock=clock))
    # 50 images in batches of 16 with the rest dropped: 3 batches an epoch
    assert [point.seconds for point in points] == [1000 + 100 + 33, 1000 + 0.25 + 2 * (100 + 33)]
    assert [point.samples for point in points] == [48, 96]
    assert [point.epoch for point in points] == [1, 2]


def test_points_hold_what_an_independent_evaluation_gives(data):
    trained = module(data)
    last = fit(trained, data)[-1]
    trained.eval()
    mean, std = data.statistics()
    with torch.no_grad():
        logits = trained.model((data.x_test.float() - mean) / std)
    assert last.accuracy == pytest.approx(float((logits.argmax(1) == data.y_test).float().mean()), abs=1e-6)
    assert last.test_loss == pytest.approx(float(nn.functional.cross_entropy(logits, data.y_test)), rel=1e-4)


def test_train_loss_is_the_mean_over_the_epoch(data):
    class Constant(nn.Module):
        calls = 0

        def forward(self, logits, labels):
            self.calls += 1
            return 0 * logits.sum() + self.calls

    points = fit(module(data, criterion=Constant()), data)
    assert [point.train_loss for point in points] == [2.0, 5.0]


def test_callers_of_the_stopwatch_hear_of_batches_and_points(data):
    batches, points = [], []
    watch = Stopwatch(lambda samples: batches.append((len(points), samples)), points.append)
    fit(module(data), data, batch_size=2, epochs=2, watch=watch)
    assert batches == 25 * [(0, 2)] + 25 * [(1, 2)]
    assert [point.epoch for point in points] == [1, 2]


def test_the_stopwatch_counts_the_samples_of_each_batch(data):
    uneven = DataLoader(TensorDataset(data.x_train[:20], data.y_train[:20]), 8)
    counts = []
    points = fit(module(data), data, epochs=1, watch=Stopwatch(counts.append), loader=uneven)
    assert counts == [8, 8, 4]
    assert points[0].samples == 20


def test_a_loader_of_its_own_takes_the_place_of_the_usual_one(data):
    seen = []

    class Watching(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(batch[1])

    own = DataLoader(TensorDataset(data.x_train, data.y_train), 25)
    fit(module(data), data, epochs=1, callbacks=[Watching()], loader=own)
    assert torch.equal(torch.cat(seen), data.y_train)


def test_bytes_are_normalised_by_the_module_and_other_images_taken_as_they_are(data):
    trained = module(data).eval()
    mean, std = data.x_train[:1000].double().mean(), data.x_train[:1000].double().std()
    by_hand = ((data.x_test.double() - mean) / std).float()
    expected = trained.model(by_hand)
    assert torch.allclose(trained(data.x_test), expected, atol=1e-4)
    assert torch.equal(trained(by_hand), expected)
    assert not {"mean", "std"} & trained.state_dict().keys()


def test_one_cycle_is_torchs_own_over_the_whole_run(data):
    rates = []

    class Watching(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(module(data, one_cycle=True), data, callbacks=[Watching()])
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.02, momentum=0.9)
    schedule, expected = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, 6), []
    for step in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 5:
            schedule.step()
    assert rates == pytest.approx(expected)
    rates.clear()
    fit(module(data), data, callbacks=[Watching()])
    assert rates == 6 * [0.02]


def test_loaders_give_normalised_whole_batches_in_an_order_of_the_seed(data):
    train_loader, test_loader = loaders(data, 16, seed=3)
    batches = list(train_loader)
    assert [len(labels) for _, labels in batches] == [16, 16, 16]
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (48, 1, 24, 24)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.1
    again, other = loaders(data, 16, seed=3)[0], loaders(data, 16, seed=4)[0]
    assert torch.equal(torch.cat([labels for _, labels in again]), torch.cat([labels for _, labels in batches]))
    assert not torch.equal(torch.cat([labels for _, labels in other]), torch.cat([labels for _, labels in batches]))
    assert torch.equal(torch.cat([labels for _, labels in test_loader]), data.y_test)


def test_global_generators_are_left_alone(data):
    before = torch.get_rng_state()
    fit(module(data), data, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("before", [True, False])
def test_autotuning_starts_off_and_is_put_back(data, monkeypatch, before):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    seen = []

    class Watching(Callback):
        def on_train_start(self, *_):
            seen.append(torch.backends.cudnn.benchmark)

    fit(module(data), data, callbacks=[Watching()], trainer={"accelerator": "cpu", "benchmark": True})
    fit(module(data), data, callbacks=[Watching()])
    assert seen == [True, False]
    assert torch.backends.cudnn.benchmark is before


def test_the_same_seed_trains_the_same_network_to_the_bit(data):
    first, again, other = (module(data, seed) for seed in (1, 1, 2))
    for one, seed in ((first, 1), (again, 1), (other, 2)):
        fit(one, data, seed=seed)
    flat = [torch.cat([p.flatten() for p in one.parameters()]) for one in (first, again, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_lightning_is_silent_and_leaves_no_files(data, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(module(data), data)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("lightning")]
    assert list(tmp_path.iterdir()) == []


def test_a_warning_of_a_trick_comes_through(data):
    class Warns(Callback):
        def on_train_start(self, *_):
            warnings.warn("nothing to do here", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="nothing to do here"):
        fit(module(data), data, epochs=1, callbacks=[Warns()])


def test_ctrl_c_is_an_interrupt_again_and_keeps_the_points(data):
    class Bomb(Callback):
        def on_train_epoch_start(self, trainer, *_):
            if trainer.current_epoch == 1:
                signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    watch = Stopwatch()
    with pytest.raises(KeyboardInterrupt):
        fit(module(data), data, epochs=3, callbacks=[Bomb()], watch=watch)
    assert [point.epoch for point in watch.points] == [1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_works_again_after_one_in_setup(data):
    class Bomb(Callback):
        def setup(self, trainer, module, stage):
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(module(data), data, callbacks=[Bomb()])
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, handler)


def test_any_other_exit_is_passed_on(data):
    class Quits(Callback):
        def on_train_start(self, *_):
            raise SystemExit(7)

    with pytest.raises(SystemExit) as caught:
        fit(module(data), data, callbacks=[Quits()])
    assert caught.value.code == 7
