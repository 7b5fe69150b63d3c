"""Packed rows beside padded ones: non-padding tokens a second of whole training steps, on texts of real lengths.

The texts are the paragraphs of Python's own standard library, as bytes, cut to the length of a row; the model is a
causal transformer of four layers. Both arms train on the same texts in the same batches, and their losses are compared. Packed
attention takes a block mask, which computes whole rows all the same; padded attention is torch's causal one.
Run nothing beside it.

    python benchmarks/packing.py [--rounds 5] [--batches 8] [--batch-size 32] [--max-length 512]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lightning_speedups import block_mask, pack
from lightning_speedups.measure.machine import machine_facts, versions


def texts(most: int, count: int = 20000) -> list[torch.Tensor]:
    """Paragraphs between blank lines, in bytes, cut to a length."""
    sources = (path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    paragraphs = (part.encode()[:most] for source in sources for part in re.split(r"\n\s*\n", source) if part.strip())
    return [torch.tensor([*part]) for part in itertools.islice(paragraphs, count)]


class Transformer(nn.Module):
    def __init__(self, length: int, width: int = 128, layers: int = 4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                }
            )
            for _ in range(layers)
        )  # fmt: skip
        self.head = nn.Linear(width, 256)

    def forward(self, tokens, positions, mask=None):
        hidden = self.tokens(tokens) + self.positions(positions)
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm"](hidden)).unflatten(-1, (3, 4, -1)).movedim((2, 3), (0, 2))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            hidden = hidden + layer["out"](mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer["mlp"](hidden)
        return self.head(hidden)


def padded(samples, model, length):
    """The loss of texts padded to the longest of them."""
    tokens = pad_sequence(samples, batch_first=True)
    labels = pad_sequence(samples, batch_first=True, padding_value=-100)
    return loss_of(model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)), labels), tokens.numel()


def packed(samples, model, length):
    """The loss of the same texts in packed rows."""
    batch = pack(length)(samples)
    logits = model(batch["input_ids"], batch["position_ids"], block_mask(batch["segment_ids"]))
    return loss_of(logits, batch["labels"]), batch["labels"].numel()


def loss_of(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


ARMS = {"padded": padded, "packed": packed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    args = parser.parse_args()
    found = texts(args.max_length)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    computed, losses, real = dict.fromkeys(ARMS, 0), {arm: [] for arm in ARMS}, 0
    for number in track(range(args.rounds + 1), "rounds"):  # the first one warms up
        order = torch.randperm(len(found), generator=generator)[: args.batches * args.batch_size]
        batches = [[found[i] for i in part] for part in order.split(args.batch_size)]
        for arm in [*ARMS][:: 1 if number % 2 else -1]:
            torch.manual_seed(0)
            model = Transformer(args.max_length)
            optimizer, begun = torch.optim.AdamW(model.parameters(), 1e-3), time.perf_counter()
            for samples in batches:
                loss, tokens = ARMS[arm](samples, model, args.max_length)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if number:
                    computed[arm] += tokens
            if number:
                seconds[arm].append(time.perf_counter() - begun)
                losses[arm].append(loss.item())
        real += sum(len(one) for samples in batches for one in samples) if number else 0
    tokens = real / args.rounds
    ratios = [one / other for one, other in zip(seconds["padded"], seconds["packed"], strict=True)]
    for arm in ARMS:
        rate = tokens / statistics.median(seconds[arm])
        print(f"{arm}: {rate:,.0f} tokens/s, {1 - real / computed[arm]:.0%} of the computed ones are padding")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"packed {middle:.2f} (range {low:.2f} to {high:.2f}) times as fast; last losses {losses}")
    result = {
        "machine": machine_facts(), "versions": versions(), "settings": {**vars(args), "out": str(args.out.name)},
        "texts": len(found), "median_length": statistics.median(map(len, found)), "tokens": real, "computed": computed,
        "seconds": seconds, "losses": losses, "times_as_fast": ratios,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
