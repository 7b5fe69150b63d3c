import pytest

from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.settings import Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "--seeds must be a whole number from 1 to 100, got 0"),
        ({"seeds": 101}, "--seeds"),
        ({"seeds": 1.5}, "--seeds must be a whole number"),
        ({"epochs": -3}, "--epochs"),
        ({"epochs": True}, "--epochs"),
        ({"batch_size": 1}, "--batch-size"),
        ({"samples": 9}, "--samples must"),
        ({"test_samples": 0}, "--test-samples"),
        ({"width": 3}, "--width"),
        ({"image_size": 7}, "--image-size"),
        ({"image_size": 513}, "--image-size"),
        ({"pretrain_epochs": 0}, "--pretrain-epochs"),
        ({"threads": 0}, "--threads"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr"),
        ({"lr": 11.0}, "--lr"),
        ({"target": 0.0}, "--target must be a fraction"),
        ({"target": 90.0}, r"got 90 \(write 0.9\)"),
        ({"target": float("nan")}, "--target"),
        ({"weights": "pretrained"}, "--weights pretrained needs a timm --model; convnet takes the path"),
        ({"weights": "w.pt", "pretrain_epochs": 2}, "--weights and --pretrain-epochs are two sources"),
        ({"accelerator": "abacus"}, "--accelerator must be one of auto, cpu.*got 'abacus'"),
    ],
)
def test_nonsense_is_refused_by_name(options, message):
    with pytest.raises(CompareError, match=message):
        Settings(**options)


def test_quick_is_smaller_and_what_is_asked_for_wins():
    full, quick = Settings(), Settings(quick=True)
    assert len(quick.run_seeds) < len(full.run_seeds)
    assert quick.run_epochs < full.run_epochs
    assert quick.collages < full.collages
    asked = Settings(quick=True, seeds=4, epochs=9, samples=777, test_samples=55, pretrain_epochs=3)
    assert (list(asked.run_seeds), asked.run_epochs, asked.collages) == ([0, 1, 2, 3], 9, (777, 55))
    assert asked.run_pretrain_epochs == 3
    assert Settings(epochs=1).run_pretrain_epochs == 1
