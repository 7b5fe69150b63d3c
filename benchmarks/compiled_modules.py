"""What CompiledModules costs and saves: seconds of compiling, a step with and without, and the step from which on it has paid.

Four networks, each plain, compiled by its blocks, and compiled as a whole; steps of the three are interleaved in one process, and the
compiler finds nothing of earlier runs. Run nothing beside it.

    python benchmarks/compiled_modules.py [--steps 20] [--networks vit,resnet,transformer,testbed] [--device cpu] [--bf16]
"""

from __future__ import annotations

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # before torch is imported

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from convnet import convnet
from torch import Tensor, nn

from lightning_speedups.measure.machine import machine_facts, versions
from lightning_speedups.modules.compiling import CompiledBlocks, find_blocks
from lightning_speedups.tricks.hardware.compiled_modules import break_even, compile_cost

FIRST = 5  # steps in which something is compiled


class Transformer(nn.Module):
    """Four layers over bytes, 128 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(4))
        self.head = nn.Linear(128, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        states = self.embedding(tokens)
        for layer in self.layers:
            states = layer(states, mask, is_causal=True)
        return self.head(states).flatten(0, 1)


def images(count: int, side: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, side, side), torch.randint(0, 10, (count,))


def text(count: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (count, length)), torch.randint(0, 256, (count * length,))


NETWORKS = {
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=96), lambda: images(32, 96)),
    "resnet": (lambda: timm.create_model("resnet18", num_classes=10), lambda: images(32, 64)),
    "transformer": (Transformer, lambda: text(32, 128)),
    "testbed": (convnet, lambda: images(128, 32)),
}


class Arm:
    """A copy of a network, and what trains it."""

    def __init__(self, network: nn.Module, regions: str) -> None:
        self.network, self.seconds = nn.ModuleDict({"net": copy.deepcopy(network)}), []
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)
        found = {"plain": {}, "blocks": find_blocks(self.network), "whole": {"net": self.network["net"]}}[regions]
        self.blocks = CompiledBlocks(found)
        self.blocks.compile()

    def step(self, inputs: Tensor, targets: Tensor, bf16: bool) -> None:
        self._wait(inputs)
        began = time.perf_counter()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(self.network["net"](inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait(inputs)
        self.seconds.append(time.perf_counter() - began)

    def _wait(self, inputs: Tensor) -> None:
        if inputs.device.type != "cpu":
            torch.accelerator.synchronize()


def measure(name: str, steps: int, device: str, bf16: bool) -> dict[str, dict[str, float | int | None]]:
    make, batch = NETWORKS[name]
    torch.manual_seed(0)
    network, (inputs, targets) = make().to(device), (part.to(device) for part in batch())
    arms = {regions: Arm(network, regions) for regions in ("plain", "blocks", "whole")}
    for _ in range(FIRST + steps):
        for arm in arms.values():
            arm.step(inputs, targets, bf16)
    found: dict[str, dict[str, float | int | None]] = {}
    usual = {regions: statistics.median(arm.seconds[FIRST:]) for regions, arm in arms.items()}
    for regions, arm in arms.items():
        assert arm.blocks.failure is None, arm.blocks.failure
        cost = 0.0 if regions == "plain" else compile_cost([*arm.seconds[:FIRST], *[usual[regions]] * steps])[0]
        pays = break_even(cost, usual["plain"], usual[regions])
        paired = [plain / own for plain, own in zip(arms["plain"].seconds, arm.seconds, strict=True)][FIRST:]
        found[regions] = {
            "modules": len(arm.blocks.blocks), "compile_seconds": cost, "step_seconds": usual[regions],
            "speedup": statistics.median(paired), "speedup_low": min(paired), "speedup_high": max(paired),
            "pays_from_step": None if pays == float("inf") else int(pays),
        }  # fmt: skip
        print(
            f"{name:12s} {regions:7s} {len(arm.blocks.blocks):3d} modules  compiled in {cost:6.1f} s  {1e3 * usual[regions]:7.1f} ms a step  "
            f"{found[regions]['speedup']:.2f}x ({min(paired):.2f} to {max(paired):.2f})  pays from step {found[regions]['pays_from_step']}",
            flush=True,
        )
        arm.blocks.put_back()
    torch._dynamo.reset()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compiled_modules.json")
    args = parser.parse_args()
    facts = {
        "machine": machine_facts(),
        "versions": versions(),
        "steps": args.steps,
        "device": args.device,
        "bf16": args.bf16,
    }
    torch.compile(lambda x: x.sin())(torch.ones(8, device=args.device))  # what a process pays once
    networks = {name: measure(name, args.steps, args.device, args.bf16) for name in args.networks.split(",")}
    args.out.write_text(json.dumps({**facts, "networks": networks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
