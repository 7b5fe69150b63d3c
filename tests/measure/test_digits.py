import math

import pytest
import torch

from lightning_speedups.measure import digits
from lightning_speedups.measure.digits import Layout, digit_collages, digit_sources


def test_the_same_seed_gives_the_same_images_and_touches_no_global_generator():
    before = torch.get_rng_state()
    first, again, other = digit_collages(40, 20), digit_collages(40, 20), digit_collages(40, 20, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_images_are_what_a_loader_expects():
    data = digit_collages(300, 100, size=20)
    assert data.x_train.shape == (300, 1, 20, 20)
    assert data.x_train.dtype == torch.uint8
    assert data.y_train.dtype == torch.int64
    assert set(data.y_train.tolist()) == set(range(10)) == set(data.y_test.tolist())
    assert data.x_train.float().std() > 20


def test_train_and_test_digits_come_from_disjoint_scans():
    (train, train_labels), (test, test_labels) = digit_sources()
    assert len(train) + len(test) == 1797
    assert len(train_labels) == len(train)
    assert len(test_labels) == len(test)
    # the scans hold a few true twins of their own; the two parts may share no more than those
    from sklearn.datasets import load_digits

    whole = torch.from_numpy(load_digits().images).float() / 16
    pooled = torch.cat([train, test]).flatten(1).sort(0).values
    assert torch.equal(pooled, whole.flatten(1).sort(0).values)
    seen = {bytes(scan.numpy().tobytes()) for scan in train}
    assert sum(bytes(scan.numpy().tobytes()) in seen for scan in test) <= 1


def test_the_label_is_the_class_of_the_largest_digit(monkeypatch):
    drawn = []
    real = Layout.draw.__func__

    def shuffled(cls, *args, **kwargs):
        layout = real(cls, *args, **kwargs)
        # the largest digit in any place: the label must follow the size, not the place
        order = torch.argsort(torch.rand(layout.side.shape, generator=torch.Generator().manual_seed(3)), 1)
        layout = Layout(
            layout.index.gather(1, order), layout.side.gather(1, order), layout.angle, layout.centre, layout.ink
        )
        drawn.append(layout)
        return layout

    monkeypatch.setattr(Layout, "draw", classmethod(shuffled))
    data = digit_collages(200, 50)
    (_, train_labels), (_, test_labels) = digit_sources()
    for layout, labels, got in ((drawn[0], train_labels, data.y_train), (drawn[1], test_labels, data.y_test)):
        for row in range(len(got)):
            sides = layout.side[row].tolist()
            place = max(range(len(sides)), key=sides.__getitem__)
            assert got[row] == labels[layout.index[row, place]]


def test_the_largest_digit_is_clearly_the_largest_in_pixels_too():
    (scans, _), _ = digit_sources()
    layout = Layout.draw(64, len(scans), torch.Generator().manual_seed(0))
    assert torch.all(layout.side[:, :1] > 1.3 * layout.side[:, 1:])
    solid = torch.ones(1, 8, 8)  # squares in place of digits: their areas are known

    def area(place: int) -> torch.Tensor:
        alone = Layout(*(getattr(layout, name)[:, place : place + 1] for name in ("index", "side", "angle", "centre")),
                       torch.ones(64, 1))  # fmt: skip
        alone.index.zero_()
        image = digits._render(solid, alone, 48, torch.Generator(), noise=0.0)
        return (image.float() / 255).sum((1, 2, 3))

    expected = (layout.side[:, 0] * 48) ** 2
    # a corner may be turned off the canvas, and borders blur
    assert torch.all((area(0) / expected - 1).abs() < 0.2)
    assert torch.all(area(0) > 1.5 * area(1))


def test_an_upright_centred_digit_is_the_scan_itself():
    (scans, _), _ = digit_sources()
    one = torch.ones(1, 1)
    layout = Layout(torch.zeros(1, 1, dtype=torch.int64), one, 0 * one, torch.zeros(1, 1, 2), one)
    image = digits._render(scans[:1], layout, 8, torch.Generator(), noise=0.0)
    torch.testing.assert_close(image[0, 0].float() / 255, scans[0], atol=1 / 255, rtol=0)


def test_a_digit_goes_where_the_layout_says():
    spot = torch.zeros(1, 1, 2)
    spot[..., 0], spot[..., 1] = 0.5, -0.5  # right, up
    one = torch.ones(1, 1)
    layout = Layout(torch.zeros(1, 1, dtype=torch.int64), 0.25 * one, 0 * one, spot, one)
    image = digits._render(torch.ones(1, 8, 8), layout, 32, torch.Generator(), noise=0.0)[0, 0].float()
    assert image[4:12, 20:28].mean() > 250
    assert image.sum() < 1.3 * image[4:12, 20:28].sum()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_turned_digit_stays_where_it_is(turns):
    (scans, _), _ = digit_sources()
    spot = torch.tensor([[[0.5, -0.5]]])  # right, up
    one = torch.ones(1, 1)
    layout = Layout(torch.zeros(1, 1, dtype=torch.int64), 0.25 * one, turns * math.pi / 2 * one, spot, one)
    image = digits._render(scans[:1], layout, 32, torch.Generator(), noise=0.0)[0, 0].float() / 255
    torch.testing.assert_close(image[4:12, 20:28], torch.rot90(scans[0], -turns), atol=0.01, rtol=0)
