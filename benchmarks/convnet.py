"""The network of the CIFAR-10 benchmarks, which others time as well."""

from __future__ import annotations

from torch import nn


def block(channels: int, wider: int, *, pool: bool) -> list[nn.Module]:
    pooling = [nn.MaxPool2d(2)] if pool else []
    return [nn.Conv2d(channels, wider, 3, padding=1, bias=False), *pooling, nn.BatchNorm2d(wider), nn.ReLU()]


def convnet(width: int = 32, channels: int = 3, classes: int = 10) -> nn.Sequential:
    """Three stages of two convolutions each: 172 MFLOP forward on 32 pixels, at the width of 32."""
    layers = block(channels, width, pool=False)
    for narrow in (width, 2 * width, 4 * width):
        layers += [*block(narrow, 2 * narrow, pool=True), *block(2 * narrow, 2 * narrow, pool=False)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes, bias=False))
