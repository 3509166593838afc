"""Batches: what a step of training needs, padded to rectangles.

Built in chapter 3, "Hide spans and ask for them back"
(chapters/span_corruption.md). Edit the chapter, not this file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Batch"]


class Batch(NamedTuple):
    """What a step of training needs: sources, their padding mask, and labels."""

    src: Tensor  # int64 [b s]
    mask: Tensor  # bool [b s], True = real token
    labels: Tensor  # int64 [b t], -100 at padding

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*[part.to(device) for part in self])


def pad_rows(rows: Sequence, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Lay lists of ids, or tensors, into one tensor, padded on the right.

    Returns int64 ``[b n]`` and its mask, bool ``[b n]``, True = real.
    """
    lengths = [len(row) for row in rows]
    if min(lengths, default=0) == 0:
        raise ValueError(f"rows have lengths {lengths}; none may be empty")
    pad = nn.utils.rnn.pad_sequence
    ids = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    real = [torch.ones_like(row, dtype=torch.bool) for row in ids]
    return pad(ids, True, fill), pad(real, True)
