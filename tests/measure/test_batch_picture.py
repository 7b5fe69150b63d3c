"""The picture shows the pixels and the labels that training_step gets."""

import matplotlib.figure
import numpy as np
import pytest
import torch

from lightning_speedups import MixupCallback, plot_batch
from lightning_speedups.core.mixing import Mixture
from zoo import images

NAMES = ["ant", "bee", "cat", "dog"]


def shown(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


class Fixed:
    """A trick whose mixture is known."""

    inputs, labels = 0, 1

    def __init__(self, mixture, changed):
        self.mixture, self.changed = mixture, changed

    def mix(self, batch, generator):
        return self.changed, self.mixture


def test_each_row_stands_over_what_becomes_of_it():
    x, y = torch.rand(5, 3, 6, 4), torch.tensor([0, 1, 2, 3, 0])
    callback = MixupCallback(alpha=1.0)
    figure = plot_batch((x, y), callback, columns=3, class_names=NAMES, seed=4)
    (mixed, labels), mixture = callback.mix((x, y), torch.Generator().manual_seed(4))
    assert isinstance(figure, matplotlib.figure.Figure)
    expected = [*x[:3], *mixed[:3], *x[3:], *mixed[3:]]
    for drawn, image in zip(shown(figure), expected, strict=True):
        np.testing.assert_array_equal(drawn, image.movedim(0, -1).numpy())
    lam, written = float(mixture.lam), titles(figure)
    assert [*written[:3], *written[6:8]] == ["ant", "bee", "cat", "dog", "ant"]
    for i, title in enumerate([*written[3:6], *written[8:]]):
        own, other = NAMES[y[i]], NAMES[y[mixture.partner[i]]]
        first, second = (own, other) if lam >= 0.5 else (other, own)
        share = max(lam, 1 - lam)
        parts = own if own == other else f"{share:.0%} {first} + {1 - share:.0%} {second}"
        assert title == f"mixup λ = {lam:.2f}\n{parts}"
    assert labels.reads.count == 0
    figure.savefig("batch.png")


def test_nothing_is_changed_by_the_picture():
    x, y = images(8)
    before, callback = (x.clone(), y.clone()), MixupCallback(alpha=1.0, cutmix_alpha=1.0, per_element=True)
    state, own = torch.get_rng_state(), dict(vars(callback))
    one, again, other = (plot_batch((x, y), callback, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(callback) == own
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert titles(one) == titles(again) != titles(other)


def test_each_sample_has_its_own_method_in_the_title():
    mixture = Mixture(
        "both", torch.tensor([0.25, 0.5, 1.0]), torch.tensor([1, 2, 0]), ((0, 2, 0, 3), *[(0, 0, 0, 0)] * 2), (2, 4)
    )
    batch = (torch.rand(3, 1, 2, 4), torch.tensor([0.5, 1234.5, -2.0]))
    assert titles(plot_batch(batch, Fixed(mixture, batch)))[3:] == [
        "cutmix λ = 0.25\n0.5",
        "mixup λ = 0.50\n1.23e+03",
        "-2",
    ]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.tensor([3, -100]), ["dog", "-100"]),
        (torch.tensor([7, 1], dtype=torch.uint8), ["7", "bee"]),
        (torch.tensor([[0, 1], [2, 3]]), ["ant, bee", "cat, dog"]),
        (torch.tensor([[0.3, 0.0, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0]]), ["70% cat + 30% ant", "bee"]),
        (torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0] * 4]), ["ant + cat", ""]),
        (torch.tensor([[0.5, -3.25, 0.0, 9.0], [1.0] * 4]).bfloat16(), ["0.5, -3.25, 0", "ant + bee + cat"]),
        (torch.zeros(2, 5, 5, dtype=torch.int64), ["", ""]),
        (["a", "b"], ["", ""]),
        (None, ["", ""]),
    ],
)
def test_labels_of_every_kind_are_named(labels, told):
    batch = [torch.rand(2, 3, 5, 5)] if labels is None else [torch.rand(2, 3, 5, 5), labels]
    assert titles(plot_batch(batch, class_names=NAMES)) == told
    if labels is None:
        with pytest.raises(ValueError, match=r"plot_batch\(labels=1\): no part 1"):
            plot_batch(batch, labels=1)


def test_a_batch_that_is_mixed_already_shows_its_shares():
    batch, mixture = MixupCallback(alpha=1.0).mix((torch.rand(2, 3, 5, 5), torch.tensor([0, 1])), torch.Generator())
    written = titles(plot_batch(batch, class_names=NAMES))
    assert all(" + " in title for title in written) == (mixture.partner.tolist() == [1, 0])


def test_a_normalisation_is_undone():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    x = torch.rand(2, 3, 4, 4)
    normal = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    for drawn, image in zip(shown(plot_batch([normal], mean=mean, std=std)), x, strict=True):
        np.testing.assert_allclose(drawn, image.movedim(0, -1).numpy(), atol=1e-6)
    for drawn, image in zip(shown(plot_batch([(x - 0.5) / 0.25], mean=0.5, std=0.25)), x, strict=True):
        np.testing.assert_allclose(drawn, image.movedim(0, -1).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8), [[0, 1], [0.2, 0.4]]),
        (torch.tensor([[[[-1.0, 3.0], [0.0, 1.0]]]]), [[0, 1], [0.25, 0.5]]),
        (torch.tensor([[[[0.0, 0.5], [0.25, 1.0]], [[9.0] * 2] * 2]]) / 9, [[0, 0.5 / 9], [0.25 / 9, 1 / 9]]),
        (torch.tensor([[[0.5, 0.5], [0.5, 1.0]]]).bfloat16(), [[0.5, 0.5], [0.5, 1.0]]),
        (torch.full((1, 1, 2, 2), 7.0), [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_bytes_grey_and_unknown_ranges(x, expected):
    (drawn,) = shown(plot_batch([x]))
    np.testing.assert_allclose(drawn, expected, atol=1e-6)


def test_before_and_after_are_scaled_alike():
    before, after = torch.tensor([-1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    figure = plot_batch([before, torch.zeros(2)], Fixed(Mixture("none"), [after, torch.zeros(2)]))
    assert [float(image[0, 0]) for image in shown(figure)] == [0.0, 1.0, 0.25, 0.5]


def test_only_so_many_and_at_the_places_of_the_trick():
    x, y = images(12)
    callback = MixupCallback(inputs=[("views", 1), ("views", 0)], labels="y", cutmix_alpha=1.0)
    batch = {"views": (torch.zeros(12, 1, 4, 4), x), "y": y}
    figure = plot_batch(batch, callback, count=5, columns=4)
    assert len(figure.axes) == 10
    assert shown(figure)[0].shape == (8, 8)
    assert len(plot_batch(batch, inputs=[("views", 0), 3], labels="y", count=100).axes) == 12


@pytest.mark.parametrize(
    ("batch", "options", "told"),
    [
        ([torch.rand(2, 3)], {}, r"images \(N, C, H, W\) or \(N, H, W\), but got the shape \(2, 3\)"),
        ([torch.rand(0, 3, 4, 4)], {}, "but got the shape"),
        ({"x": 1}, {}, r"plot_batch\(inputs=0\): no part 0 in a batch of type dict"),
        (["a"], {}, "expected a tensor, but found str"),
        ([torch.rand(2, 3, 4, 4)], {"mean": [0.5, 0.5]}, "`mean` to be a number or 3 of them"),
        ([torch.rand(2, 3, 4, 4)], {"mean": float("nan")}, "`mean`"),
        ([torch.rand(2, 3, 4, 4)], {"std": 0.0}, "`std` to be above 0, but got 0.0"),
        ([torch.rand(2, 3, 4, 4)], {"count": 0}, "`count`"),
        ([torch.rand(2, 3, 4, 4)], {"columns": 0}, "`columns`"),
        ([torch.rand(2, 3, 4, 4)], {"seed": 0.5}, "`seed`"),
        ([torch.rand(2, 3, 4, 4)], {"inputs": [0.5]}, "`inputs` to be an index"),
        ([torch.rand(2, 3, 4, 4)], {"trick": object()}, "`trick` to be a trick with a method `mix`"),
    ],
)
def test_what_cannot_be_drawn_is_refused(batch, options, told):
    with pytest.raises(ValueError, match=told):
        plot_batch(batch, **options)
