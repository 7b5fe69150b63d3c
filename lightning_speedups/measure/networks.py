"""The networks that are compared: a small convolutional one, or any of timm's."""

from __future__ import annotations

import difflib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_speedups.measure.errors import as_compare_error
from lightning_speedups.measure.images import ImageData
from lightning_speedups.models.transfer_classifier import TransferClassifier
from lightning_speedups.models.weight_files import load_weights
from lightning_speedups.modules.weights import head_names
from lightning_speedups_command import DEFAULT_MODEL


class ConvNet(nn.Module):
    """Convolutions with BatchNorm and ReLU in ``backbone``, one linear layer in ``head``.

    A stem, then stages of two convolutions, the first of which doubles the channels and halves the sides, until the
    map is 3 pixels wide or little more; large images are halved in the stem already. Training it, and not the Trainer
    around it, is what takes the time.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes to tell apart.
        side: Shorter side of the images in pixels.
        width: Channels of the stem; each stage doubles them, up to eight times as many.

    Example:
        >>> ConvNet(1, 10, side=24, width=8)(torch.zeros(2, 1, 24, 24)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int, *, side: int, width: int) -> None:
        super().__init__()
        stride = max(1, side // 32)
        layers = [_block(in_channels, width, stride=stride)]
        channels, side = width, side // stride
        while side > 4:
            wider = min(2 * channels, 8 * width)
            layers += [_block(channels, wider, pool=True), _block(wider, wider)]
            channels, side = wider, side // 2
        self.backbone = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer, under the name that timm's models use."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, num_classes), of images, (N, C, H, W)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def _block(channels: int, wider: int, *, stride: int = 1, pool: bool = False) -> nn.Sequential:
    convolution = nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False)
    pooling = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(convolution, *pooling, nn.BatchNorm2d(wider), nn.ReLU(inplace=True))


def build_network(name: str, data: ImageData, *, width: int | None = None, weights: str | None = None) -> nn.Module:
    """A network for some images, initialised from torch's global generator as any user's network is, or from weights.

    Args:
        name: ``"convnet"`` or the name of a timm model.
        data: The images it shall classify.
        width: Channels of the ConvNet's stem; by default 16.
        weights: A weight file, or ``"pretrained"`` for those that timm knows; a classifier for other classes is fresh.

    Returns:
        The network; ``get_classifier()`` gives its last layer.

    Raises:
        CompareError: If timm has no model of that name, the model can't take images of that shape, or the weights are
            not to be had or not the model's.
    """
    _, channels, height, wide = data.x_train.shape
    if name == DEFAULT_MODEL:
        network = ConvNet(channels, data.num_classes, side=min(height, wide), width=width or 16)
        if weights is not None:
            with as_compare_error("", ValueError, OSError):
                load_weights(network, weights)
        return network
    from timm.models import get_pretrained_cfg

    is_near = difflib.get_close_matches(name, [DEFAULT_MODEL], cutoff=0.9)
    with as_compare_error(f"did you mean {DEFAULT_MODEL!r}? " * bool(is_near), ValueError, OSError, RuntimeError):
        described = get_pretrained_cfg(name)
        sized = {"img_size": (height, wide)} if described is not None and described.fixed_input_size else {}
        model: nn.Module = TransferClassifier(
            name, data.num_classes, weights=weights, in_chans=channels, model_options=sized
        ).model
    # timm's models fail in as many ways as there are models
    with as_compare_error(f"model {name!r} can't take images of {wide}x{height} pixels: ", Exception), torch.no_grad():
        model.eval()(data.x_train[:2].float())
    return model.train()


def load_backbone(network: nn.Module, pretrained: nn.Module) -> None:
    """Copy the weights and running statistics of one network into another of the same kind, except the classifier.

    Args:
        network: Changed in place; keeps its own classifier.
        pretrained: Left as it is; may have another number of classes.
    """
    last = network.get_classifier()  # type: ignore[operator]
    heads = head_names(network, last if isinstance(last, tuple | list) else [last])
    state = {name: value for name, value in pretrained.state_dict().items() if name not in heads}
    network.load_state_dict(state, strict=False)


class Transformer(nn.Module):
    """A small GPT-2: pre-norm blocks of causal attention and a two-layer perceptron, with learned places.

    Weights begin as torch's linear layers do, with which plain training of so narrow a network gets further than with
    GPT-2's; embeddings begin small.

    Args:
        tokens: Kinds of tokens.
        context: Most tokens of a sequence.
        width: Features of a token; a multiple of ``heads``.
        depth: Blocks.
        heads: Heads of each attention.

    Example:
        >>> Transformer(256, context=32, width=64, depth=2)(torch.zeros(2, 16, dtype=torch.int64)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(self, tokens: int, *, context: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        for part in (self.embedding, self.places):
            nn.init.normal_(part.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next token, (N, T, tokens), of tokens, (N, T)."""
        x = self.embedding(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention and a perceptron, each added to what it sees the norm of.

    Args:
        width: Features of a token.
        heads: Heads of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens' features, (N, T, width), after the block."""
        q, k, v = self.qkv(self.first_norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.proj(seen)
        branch: Tensor = self.fc2(F.gelu(self.fc1(self.second_norm(x))))
        return x + branch
