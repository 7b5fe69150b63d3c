"""What a step of Muon costs beside timm's Muon, SGD and fused AdamW, and its share of the training step.

ResNet-18 and ViT-tiny (64 pixels, batches of 32, float32) and the network of the CIFAR-10 proof (32 pixels, batches of 1000 and 128, bfloat16 and
channels_last). All optimizers step with the same gradients, in a shuffled order within each round, and a forward and backward pass is timed in
each round too. Launches are the operators in a step that compute something, one for each list of tensors as on a GPU, counted by torch's
profiler. Run nothing beside it.

    python benchmarks/muon_step.py [--rounds 20] [--networks resnet18,vit_tiny,testbed_1000,testbed_128]
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from pathlib import Path

import timm
import timm.optim
import torch
from convnet import convnet
from rich.progress import track
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_speedups import Muon
from lightning_speedups.measure.machine import machine_facts, versions

# Leaves that launch nothing on a GPU; and what is one launch there, whatever a CPU does within.
BOOKKEEPING = {"as_strided", "view", "_unsafe_view", "_reshape_alias", "resolve_conj", "empty", "empty_like", "empty_strided", "resize_",
               "result_type", "lift_fresh", "to", "_local_scalar_dense"}  # fmt: skip
WHOLE = ("aten::_foreach", "aten::_fused", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


NETWORKS = {
    "resnet18": (lambda: timm.create_model("resnet18", num_classes=10), 32, 64, False),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64), 32, 64, False),
    "testbed_1000": (convnet, 1000, 32, True),
    "testbed_128": (convnet, 128, 32, True),
}


def timms(net: nn.Module, steps: int) -> torch.optim.Optimizer:
    """timm's, with the same matrices under Muon and the same iterations."""
    groups = Muon.groups(net)
    matrices = [p for group in groups if group["rule"] == "muon" for p in group["params"]]
    others = [p for group in groups if group["rule"] != "muon" for p in group["params"]]
    return timm.optim.Muon(
        [{"params": matrices, "use_muon": True}, {"params": others, "use_fallback": True}],
        lr=1e-3, ns_steps=steps, ns_coefficients="original", adjust_lr_fn="original",
    )  # fmt: skip


OPTIMIZERS = {
    "Muon, five": lambda net: Muon(Muon.groups(net, 1e-3, rest="adamw")),
    "Muon, three": lambda net: Muon(Muon.groups(net, 1e-3, rest="adamw"), steps=3),
    "airbench's form": lambda net: Muon(Muon.groups(net, 1e-3), momentum=0.6, steps=3, normalized=True),
    "timm's Muon, five": lambda net: timms(net, 5),
    "timm's Muon, three": lambda net: timms(net, 3),
    "SGD": lambda net: torch.optim.SGD(net.parameters(), 1e-3, 0.9, nesterov=True),
    "AdamW, fused": lambda net: torch.optim.AdamW(net.parameters(), 1e-3, fused=True),
}


def seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def launches(optimizer: torch.optim.Optimizer) -> int:
    """Operators of a step that compute; one for a list of tensors is one, as on a GPU (a CPU goes through the list)."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        optimizer.step()
    return sum(count(event) for event in found.events() if event.cpu_parent is None)


def count(event) -> int:
    if event.name.startswith(WHOLE):
        return 1
    is_one = event.name.startswith("aten::") and event.name.removeprefix("aten::") not in BOOKKEEPING
    return sum(map(count, event.cpu_children)) if event.cpu_children else is_one


def measured(name: str, rounds: int) -> dict:
    make, batch, side, is_half = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
    if is_half:
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)

    def train() -> None:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()

    train()
    optimizers = {}
    for arm, build in OPTIMIZERS.items():
        twin = copy.deepcopy(net)
        for mine, theirs in zip(twin.parameters(), net.parameters(), strict=True):
            mine.grad = theirs.grad.clone()
        optimizers[arm] = build(twin)
        optimizers[arm].step()  # makes the state
    taken: dict[str, list[float]] = {"forward and backward": [], **{arm: [] for arm in optimizers}}
    order = list(taken)
    for i in track(range(rounds), name):
        random.Random(i).shuffle(order)
        for arm in order:
            taken[arm].append(seconds(train if arm not in optimizers else optimizers[arm].step))
    matrices = [list(p.flatten(1).shape) for g in Muon.groups(net) if g["rule"] == "muon" for p in g["params"]]
    counts = {arm: launches(optimizer) for arm, optimizer in optimizers.items()}
    return {"batch": batch, "side": side, "half": is_half, "matrices": matrices, "seconds": taken, "launches": counts}


def show(name: str, found: dict) -> None:
    middle = {arm: statistics.median(values) for arm, values in found["seconds"].items()}
    whole = middle.pop("forward and backward")
    print(f"\n{name}: forward and backward {1e3 * whole:.1f} ms, {len(found['matrices'])} matrices")
    for arm, value in middle.items():
        values = found["seconds"][arm]
        print(
            f"  {arm:20s} {1e3 * value:8.2f} ms ({1e3 * min(values):.2f} to {1e3 * max(values):.2f}), "
            f"{100 * value / (value + whole):5.1f} % of the step, {found['launches'][arm]} launches"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "muon_step.json")
    args = parser.parse_args()
    facts = {"machine": machine_facts(), "versions": versions(), "rounds": args.rounds}
    found = {name: measured(name, args.rounds) for name in args.networks.split(",")}
    for name, one in found.items():
        show(name, one)
    args.out.write_text(json.dumps({**facts, "networks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
