"""What is chosen on each kind of hardware, and that a Trainer takes it."""

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision

from lightning_speedups import trainer_defaults
from lightning_speedups.tricks.hardware import trainer_defaults as defaults
from lightning_speedups.tricks.hardware.trainer_defaults import choose_precision
from zoo import Classifier, loader


def EXAMPLE():
    return {"trainer": trainer_defaults(accelerator="cpu")}


@pytest.mark.parametrize(
    ("asked", "kind", "native", "chosen"),
    [
        ("16-mixed", "cuda", False, "16-mixed"),
        ("16-mixed", "cuda", True, "16-mixed"),
        ("auto", "cuda", False, "16-mixed"),
        ("auto", "cuda", True, "bf16-mixed"),
        ("16-mixed", "cpu", True, "bf16-mixed"),
        ("auto", "cpu", True, "bf16-mixed"),
        ("16-mixed", "cpu", False, "32-true"),
        ("auto", "cpu", False, "32-true"),
        ("auto", "tpu", False, "32-true"),
        ("64-true", "cpu", True, "64-true"),
        ("bf16-mixed", "cpu", False, "bf16-mixed"),
        (16, "cpu", False, "32-true"),
        ("16", "cuda", True, "16-mixed"),
    ],
)
def test_the_precision_fits_the_hardware(asked, kind, native, chosen):
    assert choose_precision(asked, kind, native)[0] == chosen


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def test_an_old_gpu_gets_float16_and_autotuning(gpu):
    assert trainer_defaults("auto") == {
        "accelerator": "auto",
        "devices": "auto",
        "precision": "16-mixed",
        "benchmark": True,
    }


def test_an_accelerator_object_is_known_by_its_class(monkeypatch):
    monkeypatch.setattr(defaults, "_native_bf16", lambda kind: kind == "cpu")
    assert trainer_defaults(accelerator=CPUAccelerator())["precision"] == "bf16-mixed"


def test_no_autotuning_for_a_deterministic_run_or_without_a_gpu(gpu):
    assert "benchmark" not in trainer_defaults(deterministic=True)
    assert "benchmark" not in trainer_defaults(accelerator="cpu")


def test_every_override_wins(gpu):
    settings = trainer_defaults("32-true", accelerator="gpu", devices=2, benchmark=False, max_epochs=7)
    assert settings == {"accelerator": "gpu", "devices": 2, "precision": "32-true", "benchmark": False, "max_epochs": 7}


def test_a_precision_plugin_takes_the_place_of_the_precision():
    plugin = MixedPrecision("bf16-mixed", "cpu")
    settings = trainer_defaults(accelerator="cpu", plugins=[plugin], logger=False, enable_checkpointing=False)
    assert "precision" not in settings
    assert Trainer(**settings).precision_plugin is plugin


def test_an_unknown_override_is_refused_with_the_name_that_was_meant():
    with pytest.raises(ValueError, match="no argument `max_epoch`; did you mean `max_epochs`"):
        trainer_defaults(max_epoch=3)


@pytest.mark.parametrize("native", [True, False])
def test_a_trainer_takes_it_and_trains_in_that_precision(native, monkeypatch):
    monkeypatch.setattr(defaults, "_native_bf16", lambda kind: native)
    seen = []

    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append(self.head(self.backbone(batch[0])).dtype)
            return super().training_step(batch, batch_idx)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(**trainer_defaults(accelerator="cpu", max_steps=2, **quiet)).fit(Module(), loader())
    assert set(seen) == {torch.bfloat16 if native else torch.float32}


def test_it_says_once_what_it_chose_and_why(caplog, monkeypatch):
    monkeypatch.setattr(defaults, "_native_bf16", lambda kind: False)
    with caplog.at_level(logging.INFO):
        trainer_defaults(accelerator="cpu")
    told = [record.getMessage() for record in caplog.records if "trainer_defaults" in record.getMessage()]
    assert told == ["trainer_defaults: cpu, precision 32-true (this CPU has no fast half precision)."]
