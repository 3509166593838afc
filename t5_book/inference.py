"""Inference mode for a model in training: dropout off, and on again.

Built in chapter 12, "Generating text: greedy decoding and sampling"
(chapters/generation.md). Edit the chapter, not this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout off inside a ``with`` block.

    Afterwards each part of ``model`` is in the mode in which it was, even
    if the block raised an error.
    """
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for part, mode in modes.items():
            part.training = mode
