"""What averages of the weights bring: `AveragedWeights` at a constant rate and on a one-cycle, in whole and in shorter runs; Lookahead
(Zhang et al., arXiv:1907.08610) as airbench has it; and BatchNorm's statistics averaged, or computed anew for the average.

One network, paired by seed and interleaved; digit collages, or images of a file as `lightning-speedups compare --data` takes it. Run nothing beside
it: with two threads and the defaults it takes about an hour.

    python benchmarks/averages.py [--seeds 8] [--epochs 8] [--shorter 6] [--lr 0.05] [--peak 0.1] [--horizons 0.01,0.05] [--validation 500]
        [--data cifar10.npz --samples 8000 --test-samples 2000]

`--validation N` holds N training images out and tests on those: for choosing rates and horizons, which the test images must not.
The row `update` is the time of one update of the average and of one lerp of torch's, for 11 million parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import track
from scipy.stats import ttest_1samp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_speedups import AveragedWeights, LRCurve
from lightning_speedups.core.throughput import paired_speedup
from lightning_speedups.measure import Comparison, Run
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.loading import load_npz
from lightning_speedups.measure.machine import machine_facts, versions
from lightning_speedups.measure.networks import build_network
from lightning_speedups.measure.runner import interleaved
from lightning_speedups.measure.training import Classifier, seeded, train


class Lookahead(Callback):
    """Every five steps an average takes a part of the weights, and they take its place; the part shrinks over the run."""

    def __init__(self, every=5):
        self.every, self.average = every, None

    def on_train_start(self, trainer, pl_module):
        self.average = copy.deepcopy(pl_module.state_dict())

    @torch.no_grad()
    def update(self, pl_module, decay):
        for mean, own in zip(self.average.values(), pl_module.state_dict().values(), strict=True):
            if own.is_floating_point():
                mean.lerp_(own, 1 - decay)
                own.copy_(mean)

    def on_train_batch_end(self, trainer, pl_module, *_):
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        if step == steps:
            self.update(pl_module, 1.0)
        elif step % self.every == 0:
            self.update(pl_module, 0.95**self.every * (step / steps) ** 3)


class FreshStatistics(Callback):
    """Gives BatchNorm, for the time of a validation, the statistics of the weights that are in the module then."""

    def __init__(self, batches=16):
        self.batches = batches

    def on_validation_start(self, trainer, pl_module):
        self.norms = [part for part in pl_module.modules() if isinstance(part, _BatchNorm)]
        self.before = [(norm.momentum, *(b.clone() for b in norm.buffers())) for norm in self.norms]
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        data = trainer.train_dataloader.dataset
        rows = torch.arange(self.batches * trainer.train_dataloader.batch_size) % len(data)
        for part in rows.chunk(self.batches):
            pl_module.model(data.__getitems__(part.tolist())[0])
        for norm in self.norms:
            norm.eval()

    def on_validation_end(self, trainer, pl_module):
        for norm, (momentum, *values) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            for buffer, value in zip(norm.buffers(), values, strict=True):
                buffer.copy_(value)


def arms(args):
    """Callbacks, rate, epochs and the arm to compare with, by name."""

    def cycle():
        return LRCurve("linear", warmup=0.25, warmup_factor=0.05)

    made = {
        "constant": (lambda: [], args.lr, args.epochs, None),
        "one-cycle": (lambda: [cycle()], args.peak, args.epochs, "constant"),
        "one-cycle, shorter": (lambda: [cycle()], args.peak, args.shorter, "one-cycle"),
        "one-cycle + lookahead": (lambda: [cycle(), Lookahead()], args.peak, args.epochs, "one-cycle"),
        "one-cycle + lookahead, shorter": (lambda: [cycle(), Lookahead()], args.peak, args.shorter, "one-cycle"),
    }
    for h in map(float, args.horizons.split(",")):
        average = f"average over {100 * h:g} %"
        for name, start, rate in (("constant", [], args.lr), ("one-cycle", [cycle], args.peak)):
            tricks = [*start, lambda h=h: AveragedWeights(h)]
            for when, epochs in (("", args.epochs), (", shorter", args.shorter)):
                made[f"{name} + {average}{when}"] = (lambda t=tricks: [one() for one in t], rate, epochs, name)
        fresh = [lambda h=h: AveragedWeights(h), FreshStatistics]
        name = f"constant + {average}"
        made[f"{name}, fresh statistics"] = (lambda t=fresh: [one() for one in t], args.lr, args.epochs, name)
    return {name: one for name, one in made.items() if not args.arms or name in args.arms.split(";")}


def update_seconds(rounds):
    """Median seconds of an update of the average of 11 million parameters in 60 tensors, and of torch's lerp by itself."""
    from lightning_speedups.tricks.optimizers.averaged_weights import Run as Averaging

    module, trick = nn.ParameterList(torch.randn(184_000) for _ in range(60)), AveragedWeights(1000)
    trick.saved.steps_done, trick.run = [100], Averaging(horizon=1000.0)  # an update at each step
    holder = nn.Module()
    holder.weights = module
    trick._settle(holder)
    others = [one.detach().clone() for one in module]
    times = {"update": [], "lerp": []}
    for _ in range(rounds):
        for name, act in (
            ("update", lambda: trick.stepped(0)),
            ("lerp", lambda: torch._foreach_lerp_(others, [one.detach() for one in module], 0.1)),
        ):
            started = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"seeds": 8, "epochs": 8, "shorter": 6, "batch-size": 64, "samples": 4000, "test-samples": 2000}
    for name, default in {**whole, "rounds": 50, "validation": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=0.05, help="the constant rate")
    parser.add_argument("--peak", type=float, default=0.1, help="the one-cycle's highest rate")
    parser.add_argument("--horizons", default="0.01,0.05", help="fractions of the run")
    parser.add_argument("--arms", default="", help="some of the arms, separated by semicolons, each with its baseline")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "averages.json")
    args = parser.parse_args()
    data = digit_collages(args.samples, args.test_samples)
    if args.data:
        data = load_npz(args.data).limited(args.samples, args.test_samples)
    if n := args.validation:
        x, y = data.x_train, data.y_train
        data = replace(data, x_train=x[:-n], y_train=y[:-n], x_test=x[-n:], y_test=y[-n:])
    chosen = arms(args)

    def fit(arm, seed, **trainer):
        callbacks, rate, epochs, _ = chosen[arm]
        with seeded(seed):
            network = build_network("convnet", data)
        module = Classifier(network, data, lr=rate)
        run = {"batch_size": args.batch_size, "epochs": epochs, "seed": seed, "callbacks": callbacks()}
        return train(module, data, trainer={"accelerator": "cpu", **trainer}, **run)

    settings = {**vars(args), "out": args.out.name, "model": "convnet", "data": data.name}
    baselines = {arm: one[3] if one[3] in chosen else None for arm, one in chosen.items()}
    result = Comparison(baselines, settings, machine_facts(), versions(), data.chance)
    for arm in chosen:  # what torch prepares once is prepared
        fit(arm, args.seeds, limit_train_batches=2, limit_val_batches=1)
    for seed, arm in track(interleaved(list(chosen), range(args.seeds)), "runs"):
        result.runs.append(Run(arm, seed, fit(arm, seed), complete=True))
    ends = {arm: [run.points[-1] for run in sorted(result.complete(arm), key=lambda run: run.seed)] for arm in chosen}
    found = {}
    for arm, baseline in baselines.items():
        own = [100 * point.accuracy for point in ends[arm]]
        found[arm] = {"accuracy": own, "mean": sum(own) / len(own)}
        if baseline and len(own) > 1:
            points = [one - 100 * other.accuracy for one, other in zip(own, ends[baseline], strict=True)]
            interval = tuple(map(float, ttest_1samp(points, 0).confidence_interval(0.95)))
            times = paired_speedup([p.seconds for p in ends[baseline]], [p.seconds for p in ends[arm]])
            found[arm] |= {"baseline": baseline, "gain": sum(points) / len(points), "confidence_95": interval}
            found[arm] |= {"speed_up": asdict(times)}
    cost = update_seconds(args.rounds)
    args.out.write_text(json.dumps({"found": found, "seconds": cost, **json.loads(result.to_json())}, indent=1) + "\n")
    Console().print(result.table())
    for arm, one in found.items():
        beside = ""
        if "gain" in one:
            low, high = one["confidence_95"]
            faster = one["speed_up"]["median"]
            beside = (
                f"; beside {one['baseline']} {one['gain']:+.2f} points (95 %: {low:+.2f} to {high:+.2f}), {faster:.2f}×"
            )
        print(f"{arm}: {one['mean']:.2f} %{beside}")
    print(f"an update takes {1000 * cost['update']:.2f} ms, torch's lerp by itself {1000 * cost['lerp']:.2f} ms")


if __name__ == "__main__":
    main()
