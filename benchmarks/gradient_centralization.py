"""Whether gradient centralization (Yong et al., arXiv:2004.01461) brings anything: SGD on gradients as they are, and on centralized ones.

One network, the digit collages and the recipe of `lightning-speedups compare`, paired by seed and interleaved. Run nothing beside it.

    python benchmarks/gradient_centralization.py [--seeds 5] [--epochs 8] [--lr 0.02] [--centralized-lr 0.02] [--validation 500]

`--validation N` holds N training images out and tests on those: for choosing rates, which the test images must not.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import track
from scipy.stats import ttest_1samp

from lightning_speedups.core.throughput import paired_speedup
from lightning_speedups.measure import Comparison, Run
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.machine import machine_facts, versions
from lightning_speedups.measure.networks import build_network
from lightning_speedups.measure.runner import interleaved
from lightning_speedups.measure.training import Classifier, seeded, train


class Centralizes(Callback):
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for gradient in (parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None):
            if gradient.ndim > 1:
                gradient.sub_(gradient.mean(tuple(range(1, gradient.ndim)), keepdim=True))


ARMS = {"plain": lambda: [], "centralized": lambda: [Centralizes()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"seeds": 5, "epochs": 8, "batch-size": 64, "samples": 2000, "test-samples": 1000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--validation", type=int, default=0, help="training images to hold out and to test on")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--centralized-lr", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gradient_centralization.json")
    args = parser.parse_args()
    data = digit_collages(args.samples, args.test_samples)
    if n := args.validation:
        x, y = data.x_train, data.y_train
        data = replace(data, x_train=x[:-n], y_train=y[:-n], x_test=x[-n:], y_test=y[-n:])
    rates = {"plain": args.lr, "centralized": args.centralized_lr}

    def fit(arm, seed, epochs=args.epochs, **trainer):
        with seeded(seed):
            network = build_network("convnet", data)
        module = Classifier(network, data.num_classes, lr=rates[arm])
        run = {"batch_size": args.batch_size, "epochs": epochs, "seed": seed, "callbacks": ARMS[arm]()}
        return train(module, data, trainer={"accelerator": "cpu", **trainer}, **run)

    settings = {**vars(args), "out": args.out.name, "model": "convnet", "data": data.name}
    baselines = {"plain": None, "centralized": "plain"}
    result = Comparison(baselines, settings, machine_facts(), versions(), data.chance)
    for arm in ARMS:  # what torch prepares once is prepared
        fit(arm, args.seeds, 1, limit_train_batches=8)
    for seed, arm in track(interleaved(list(ARMS), range(args.seeds)), "runs"):
        result.runs.append(Run(arm, seed, fit(arm, seed), complete=True))
    plain, centralized = (sorted(result.complete(arm), key=lambda run: run.seed) for arm in ARMS)
    pairs = [(one.points[-1], other.points[-1]) for one, other in zip(plain, centralized, strict=True)]
    points = [100 * (other.accuracy - one.accuracy) for one, other in pairs]
    low, high = map(float, ttest_1samp(points, 0).confidence_interval(0.95))
    times = paired_speedup([other.seconds for _, other in pairs], [one.seconds for one, _ in pairs])
    mean = sum(points) / len(points)
    found = {"points": points, "mean": mean, "confidence_95": [low, high], "time_ratio": asdict(times)}
    args.out.write_text(json.dumps({"difference": found, **json.loads(result.to_json())}, indent=1) + "\n")
    Console().print(result.table())
    print(f"accuracy {mean:+.2f} points (95 %: {low:+.2f} to {high:+.2f})")
    print(f"training time {times.median:.3f} of plain's ({times.low:.3f} to {times.high:.3f})")


if __name__ == "__main__":
    main()
