"""Batches: what a training step needs, and rows padded to one length.

Built in chapter 3, "Span corruption: hide spans and ask for them back"
(chapters/span_corruption.md). Edit the chapter, not this file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Sources and what the model should answer to them.

    ``src`` holds token ids, int64 ``[b s]``; ``mask`` is boolean ``[b s]``,
    True at real tokens; ``labels``, int64 ``[b t]``, are -100 at padding.
    """

    src: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        return Batch(self.src.to(device), self.mask.to(device), self.labels.to(device))


def pad_rows(rows: Sequence, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Lay rows of ids side by side in one tensor, padded on the right.

    Args:
        rows: lists of integers, or tensors with one axis; none is empty.
        fill: the id that pads.

    Returns:
        The ids, int64 ``[b n]``, and their mask, bool ``[b n]``, True at
        real tokens.

    Raises:
        ValueError: if there is no row, or one is empty.
    """
    lengths = [len(row) for row in rows]
    if min(lengths, default=0) == 0:
        raise ValueError(f"rows have lengths {lengths}; none may be empty")
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
    positions = torch.arange(max(lengths), device=ids.device)  # [n]
    mask = positions < torch.tensor(lengths, device=ids.device)[:, None]  # [b n]
    return ids, mask
