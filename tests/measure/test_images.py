import pytest
import torch

from lightning_speedups.measure.images import ImageData, quarter_turns


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 8, 8), generator=g, dtype=torch.uint8)
    labels = torch.arange(60) % 3
    return ImageData("noise", images, labels, images[:9], labels[:9], 3)


def test_limited_keeps_pairs_together_and_repeats_itself(data):
    few = data.limited(20, 5)
    assert len(few.x_train) == len(few.y_train) == 20
    assert len(few.x_test) == len(few.y_test) == 5
    rows = [next(i for i in range(60) if torch.equal(data.x_train[i], image)) for image in few.x_train]
    assert len(set(rows)) == 20
    assert rows != sorted(rows)
    assert torch.equal(few.y_train, data.y_train[rows])
    assert torch.equal(few.x_train, data.limited(20, None).x_train)


def test_a_limit_above_the_count_keeps_all_and_shuffles_what_was_sorted(data):
    whole = data.limited(1000, None)
    rows = [next(i for i in range(60) if torch.equal(data.x_train[i], image)) for image in whole.x_train]
    assert sorted(rows) == list(range(60))
    assert rows != sorted(rows)


def test_statistics_of_data_sorted_by_class_are_not_those_of_its_first_class():
    images = torch.zeros(4000, 1, 2, 2, dtype=torch.uint8)
    images[2000:] = 200
    data = ImageData("sorted", images, torch.arange(4000) // 2000, images[:2], torch.tensor([0, 1]), 2)
    mean, std = data.limited(None, None).statistics()
    assert mean.item() == pytest.approx(100, abs=10)
    assert std.item() == pytest.approx(100, abs=5)


def test_chance_is_the_share_of_the_commonest_test_class(data):
    labels = torch.tensor([0, 1, 1, 1, 2])
    assert ImageData("x", data.x_train, data.y_train, data.x_test[:5], labels, 3).chance == 0.6


def test_statistics_are_those_of_the_pixels(data):
    mean, std = data.statistics()
    assert mean.shape == std.shape == (1, 3, 1, 1)
    assert mean[0, 1, 0, 0] == pytest.approx(float(data.x_train[:, 1].float().mean()), rel=1e-5)


def test_quarter_turns_label_the_turns(data):
    task = quarter_turns(data, seed=4)
    assert task.num_classes == 4
    assert set(task.y_train.tolist()) == {0, 1, 2, 3}
    for image, turned, label in zip(data.x_train, task.x_train, task.y_train, strict=True):
        back = turned
        for _ in range(int(label)):
            back = back.flip(1).transpose(1, 2)  # a quarter turn clockwise, written without rot90
        assert torch.equal(back, image)
    assert torch.equal(task.y_train, quarter_turns(data, seed=4).y_train)
    assert not torch.equal(task.y_train, quarter_turns(data, seed=5).y_train)


def test_quarter_turns_keep_the_shape_of_oblong_images(data):
    oblong = ImageData("x", data.x_train[..., :6], data.y_train, data.x_test[..., :6], data.y_test, 3)
    assert quarter_turns(oblong, 0).x_train.shape == (60, 3, 8, 6)
    assert quarter_turns(oblong, 0).x_train.dtype == torch.uint8
