"""A fast way to train a language model from scratch: Muon (Jordan, https://kellerjordan.github.io/posts/muon), a rate
on a line down to 0, branches that begin at zero and sequences that grow (Li et al., arXiv:2108.06084).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lightning_speedups.core.arguments import check_number
from lightning_speedups.recipes.stack import Stack, pair_of_tensors
from lightning_speedups.tricks.batches.in_memory.in_memory_loader import InMemoryLoader
from lightning_speedups.tricks.hardware.trainer_defaults import trainer_defaults
from lightning_speedups.tricks.optimizers.fast_start import FastStart
from lightning_speedups.tricks.optimizers.muon.muon_callback import MuonCallback
from lightning_speedups.tricks.rates.lr_curve import LRCurve
from lightning_speedups.tricks.sequences.sequence_length_warmup import SequenceLengthWarmup


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Cut a text into windows of a length, one after the other, and return their tokens and each one's next.

    Args:
        tokens: The text, ``(tokens,)``; what is left over at its end is left out.
        context: Length of a window, 1 or more.

    Returns:
        Two tensors, ``(N, context)``.

    Example:
        >>> import torch
        >>> inputs, targets = windows(torch.arange(8), 3)
        >>> inputs.tolist(), targets.tolist()
        ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    count = (len(tokens) - 1) // context
    return tokens[: count * context].view(count, context), tokens[1 : count * context + 1].view(count, context)


def tokens_and_next(data: Any, context: int) -> tuple[Tensor, Tensor]:
    """Return windows of tokens and each one's next, of a text or of the two tensors of a data set.

    Args:
        data: Token numbers: a text ``(tokens,)``, or a pair of tensors, or a ``TensorDataset`` of them, ``(N, T)``.
        context: Length of the windows that a text is cut into.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(data, Tensor) and data.ndim == 1 and len(data) > context and not data.is_floating_point():
        return windows(data.long(), context)
    parts = pair_of_tensors(data)
    if parts is None or parts[0].ndim != 2 or parts[0].shape != parts[1].shape or not len(parts[0]):
        given = parts or ([data] if isinstance(data, Tensor) else [])
        shapes = f" of shapes {[tuple(one.shape) for one in given]}" if given else ""
        raise ValueError(
            f"Expected `data` to be the whole numbers of a text of more than {context} tokens, (tokens,), or windows "
            "and each token's next, (N, T) and (N, T), as a pair of tensors or a TensorDataset of them, but got "
            f"{type(data).__name__}{shapes}."
        )
    return parts


def batch_size_for(windows: float) -> int:
    """Return a batch size with which a run has some eight hundred steps, between 8 and 512.

    Args:
        windows: Windows of the whole run, those that come again included.

    Example:
        >>> [batch_size_for(windows) for windows in (1000, 8640, 100_000, 10_000_000)]
        [8, 11, 125, 512]
    """
    return max(8, min(512, round(windows / 800)))


def text_fast(
    data: Any,
    *,
    epochs: float = 1,
    batch_size: int | None = None,
    context: int = 128,
    start: int = 16,
    full_from: float = 0.7,
    lr: float = 0.02,
    rest_lr: float = 0.012,
    seed: int | None = None,
) -> Stack:
    """Return what trains a transformer on text, from scratch, to a good loss in few steps.

    Muon for the matrices of the blocks and AdamW for embeddings, head and norms, on a line down to 0; the ends of the
    residual branches begin at zero; sequences that grow; whole batches from memory; half precision where the hardware
    has it. The module stays as it is: it takes batches of tokens and each one's next, ``(N, T)`` and ``(N, T)``,
    shorter ones as well. For the run its optimizer and its schedulers of the rate are replaced.

    When not to use it: from pretrained weights; text that does not fit in memory; labels of whole sequences; masks
    ``(T, T)`` that the module makes for one length; networks on a CPU whose blocks are wider than a batch has tokens.

    Args:
        data: Token numbers: a text ``(tokens,)``, or windows and each token's next, ``(N, T)`` and ``(N, T)``, as a
            pair of tensors or a ``TensorDataset`` of them.
        epochs: Length of the run in passes over the text, above 0; less than 1 for a part of it.
        batch_size: Windows in a batch, 1 or more; None: so many that the run has some eight hundred steps, 8 to 512.
        context: Tokens of the windows that a text is cut into, 1 or more; of windows their own length counts.
        start: Tokens of a sequence at the start, 1 or more; ``context`` or more: no growth.
        full_from: From which part of the run on sequences are full, in (0, 1].
        lr: Muon's rate, for matrices, 0 or more.
        rest_lr: AdamW's, for all others, 0 or more.
        seed: Seed of the orders. None: that of torch's generator.

    Returns:
        Trainer arguments with all callbacks, a loader, and cross-entropy of (logits, tokens), one row a token.

    Raises:
        ValueError: If an argument is out of range, or the data are no such tokens.

    Source:
        Jordan, https://kellerjordan.github.io/posts/muon; Li et al., arXiv:2108.06084.

    Example:
        >>> import torch
        >>> text = torch.frombuffer(bytearray(b"any text " * 1000), dtype=torch.uint8)
        >>> stack = text_fast(text, epochs=0.5)
        >>> stack.trainer["max_steps"], [type(callback).__name__ for callback in stack.trainer["callbacks"]]
        (4, ['MuonCallback', 'LRCurve', 'FastStart', 'SequenceLengthWarmup'])
    """
    epochs = check_number("epochs", epochs, 0, above=True)
    context = check_number("context", context, 1, whole=True)
    start = check_number("start", start, 1, whole=True)
    full_from = check_number("full_from", full_from, 0, 1, above=True)
    inputs, targets = tokens_and_next(data, context)
    batch_size = check_number("batch_size", batch_size, 1, whole=True, optional=True)
    batch_size = min(batch_size or batch_size_for(epochs * len(inputs)), len(inputs))
    loader = InMemoryLoader([inputs, targets], batch_size, shuffle=True, drop_last=True, seed=seed)
    steps = max(1, round(epochs * len(loader)))
    callbacks = [
        MuonCallback(lr=lr, rest_lr=rest_lr, momentum=0.9, weight_decay=0.0, rest="adamw"),
        LRCurve("linear", replace=True),
        FastStart(whiten=None, zero_residual=True),
        *([SequenceLengthWarmup(start, full_from)] if start < inputs.shape[1] else []),
    ]
    length: dict[str, Any] = {"max_epochs": math.ceil(steps / len(loader)), "max_steps": steps}
    return Stack(trainer_defaults(precision="auto", callbacks=callbacks, **length), loader, nn.CrossEntropyLoss())
