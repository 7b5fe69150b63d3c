import pytest

from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.settings import OPTIONS, Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, r"Expected `seeds` to be a whole number in \[1, 100\], but got 0\."),
        ({"seeds": 101}, "`seeds`"),
        ({"seeds": 1.5}, "`seeds` to be a whole number"),
        ({"epochs": -3}, "`epochs`"),
        ({"epochs": True}, "`epochs`"),
        ({"batch_size": 1}, r"Expected `batch_size` to be a whole number in \[2, 65536\], but got 1\."),
        ({"samples": 9}, "`samples` to be"),
        ({"test_samples": 0}, "`test_samples`"),
        ({"width": 3}, "`width`"),
        ({"image_size": 7}, "`image_size`"),
        ({"image_size": 513}, "`image_size`"),
        ({"pretrain_epochs": 0}, "`pretrain_epochs`"),
        ({"threads": 0}, "`threads`"),
        ({"lr": 0.0}, r"`lr` to be a number in \(0, 10\]"),
        ({"lr": float("nan")}, "`lr`"),
        ({"lr": 11.0}, "`lr`"),
        ({"lr": "0.1"}, "`lr`"),
        ({"target": "0.9"}, "`target`"),
        ({"target": 0.0}, r"`target` to be a number in \(0, 1\]"),
        ({"target": 90.0}, r"`target` to be a number in \(0, 1\], but got 90.0"),
        ({"target": float("nan")}, "`target`"),
        ({"weights": "pretrained"}, "`weights` pretrained needs a timm `model`; convnet takes the path"),
        ({"weights": "w.pt", "pretrain_epochs": 2}, "`weights` and `pretrain_epochs` are two sources"),
        ({"accelerator": "abacus"}, "`accelerator` to be 'auto', 'cpu'.*but got 'abacus'"),
    ],
)
def test_nonsense_is_refused_by_name(options, message):
    with pytest.raises(CompareError, match=message):
        Settings(**options)


def test_quick_is_smaller_and_what_is_asked_for_wins():
    full, quick = Settings(), Settings(quick=True)
    assert len(quick.run_seeds) < len(full.run_seeds)
    assert quick.run_epochs < full.run_epochs
    assert quick.embedded < full.embedded
    assert (list(full.run_seeds), full.embedded) == ([0, 1], (8000, 2000))
    assert (list(quick.run_seeds), quick.embedded) == ([0], (3000, 1000))
    asked = Settings(quick=True, seeds=4, epochs=9, samples=777, test_samples=55, pretrain_epochs=3)
    assert (list(asked.run_seeds), asked.run_epochs, asked.embedded) == ([0, 1, 2, 3], 9, (777, 55))
    assert asked.run_pretrain_epochs == 3
    assert Settings(epochs=1).run_pretrain_epochs == 1


def test_every_setting_is_told_of():
    for name, option in OPTIONS.items():
        assert f"    {name}: {option.meaning}" in Settings.__doc__
    assert "seeds: runs of each arm, 1 to 100 (default: 2, quick 1)." in Settings.__doc__
    assert "lr: constant rate of plain, above 0 to 10 (default: 0.02, text 0.001, lines 0.002)." in Settings.__doc__
