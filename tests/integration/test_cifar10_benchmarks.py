"""The CIFAR-10 benchmarks run, in little: on a few images that look like theirs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, *options):
    """Run a benchmark on 256 images, and return what it wrote."""
    draw = np.random.default_rng(0)
    images = {f"x_{part}": draw.integers(256, size=(256, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(256) % 10 for part in ("train", "test")}
    np.savez("images.npz", **images, **labels)
    command = [sys.executable, BENCHMARKS / script, "images.npz", "--epochs", "1", "--out", "out.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path("out.json").read_text()), done.stdout


@pytest.mark.slow
def test_on_a_cpu_each_arm_runs_and_what_was_run_is_not_run_again():
    first, _ = run("cifar10_cpu.py", "--seeds", "1", "--few-seeds", "1", "--arms", "plain,tuned,fast,raw")
    assert sorted(row["arm"] for row in first["runs"]) == ["fast", "plain", "raw", "tuned"]
    assert all(len(row["points"]) == 1 and row["points"][0][0] > 0 for row in first["runs"])
    again, said = run("cifar10_cpu.py", "--seeds", "1", "--few-seeds", "1", "--arms", "plain,tuned,fast,raw")
    assert again["runs"] == first["runs"]
    assert "fast" in said
    assert Path("out.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_gpus_runs_on_a_cpu_too():
    small = ["--batch-size", "64", "--width", "8", "--seeds", "1", "--precision", "bf16-mixed", "--no-compile"]
    found, said = run("cifar10_gpu.py", "--accelerator", "cpu", *small)
    assert len(found["runs"]) == 1
    assert found["runs"][0]["seconds"] > 0
    assert "1 seeds" in said
