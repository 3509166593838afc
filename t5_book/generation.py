"""Greedy generation, with a cache of keys and values.

Built in chapter 12, "Generate text" (chapters/12_generation.md). Edit the
chapter, not this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t5_book.t5 import T5

__all__ = ["evaluating", "generate"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout off inside a ``with`` block.

    Afterwards each part of ``model`` is in the mode in which it was, even
    if the block raised an error.

    Built in chapter 12, "Generate text".
    """
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def generate(
    model: T5, src: Tensor, mask: Tensor | None = None, *,
    max_new_tokens: int = 64,
) -> Tensor:
    """Write a target for each source, always the likeliest next token.

    Args:
        model: a T5; dropout is off while it writes.
        src: ids of the sources ``[b s]``.
        mask: bool ``[b s]``, True at real source tokens; default: all.
        max_new_tokens: number of tokens at which to stop; default 64.

    Returns:
        ids ``[b n]`` without the start token, ``n`` as long as the longest
        row. A row ends with ``eos_id`` and is then filled up with
        ``pad_id``; a row without ``eos_id`` was stopped.

    Raises:
        ValueError: if ``max_new_tokens`` is less than 1.

    Built in chapter 12, "Generate text" (paper, section 3.1.2).
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; pass >= 1")
    with evaluating(model):
        return _write(model, src, mask, max_new_tokens)


def _write(
    model: T5, src: Tensor, mask: Tensor | None, max_new_tokens: int
) -> Tensor:
    """The loop of ``generate``."""
    config, written = model.config, []
    memory = model.encode(src, mask)
    cache = model.decoder.new_cache()
    token = torch.full_like(src[:, :1], config.start_id)  # [b 1]
    done = torch.zeros_like(token, dtype=torch.bool)
    while len(written) < max_new_tokens and not done.all():
        logits = model.decode(token, memory, mask, cache=cache)
        token = logits.argmax(dim=-1).masked_fill(done, config.pad_id)
        done = done | (token == config.eos_id)
        written.append(token)
    return torch.cat(written, dim=1)
