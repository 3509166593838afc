"""Packing: several examples in one row, none of which sees another.

Built in chapter 16, "Other objectives, and packing"
(chapters/objectives.md). Edit the chapter, not this file.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from t5_book.batches import Batch
from t5_book.masks import segment_mask

__all__ = ["PackedBatch", "pack"]


class PackedBatch(NamedTuple):
    """Several examples in each row. Segments count from 1; 0 is padding."""

    src: Tensor  # int64 [b s]
    src_segments: Tensor  # int64 [b s]
    labels: Tensor  # int64 [b t], -100 at padding
    tgt_segments: Tensor  # int64 [b t]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        return PackedBatch(*[part.to(device) for part in self])


class PackedRow:
    """One row in the making: the examples in it, and the room that is left."""

    def __init__(self, src_length: int, tgt_length: int):
        self.src_room = src_length
        self.tgt_room = tgt_length
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []

    def takes(self, source: Tensor, target: Tensor) -> bool:
        """Is there room for both?"""
        return len(source) <= self.src_room and len(target) <= self.tgt_room

    def add(self, source: Tensor, target: Tensor) -> None:
        """Append an example."""
        self.sources.append(source)
        self.targets.append(target)
        self.src_room -= len(source)
        self.tgt_room -= len(target)


def pack(batches: Iterable[Batch], src_length: int, tgt_length: int) -> PackedBatch:
    """Lay examples side by side, each into the first row with room for it.

    Args:
        batches: of any widths; their padding is left behind.
        src_length: tokens in a packed source ``s``.
        tgt_length: tokens in a packed target ``t``.

    Raises:
        TypeError: if the mask of a batch is not boolean.
        ValueError: if there is no example, one without a source or target, or
            one that no row can hold, or if the parts of a batch don't fit.

    Source: paper, section 3.1.2.
    """
    rows: list[PackedRow] = []
    for batch in batches:
        _check_parts(batch)
        for src, mask, labels in zip(*batch):
            source, target = src[mask], labels[labels != -100]
            if not (0 < len(source) <= src_length and 0 < len(target) <= tgt_length):
                raise ValueError(
                    f"an example has {[len(source), len(target)]} tokens and a row "
                    f"{[src_length, tgt_length]} (source, target); lengthen the rows, "
                    "and leave out examples without a source or target"
                )
            row = next((row for row in rows if row.takes(source, target)), None)
            if row is None:
                row = PackedRow(src_length, tgt_length)
                rows.append(row)
            row.add(source, target)
    if not rows:
        raise ValueError("there is nothing to pack; pass a batch or more")
    src, src_segments = _join([row.sources for row in rows], src_length, 0)
    labels, tgt_segments = _join([row.targets for row in rows], tgt_length, -100)
    return PackedBatch(src, src_segments, labels, tgt_segments)


def _join(rows, length, fill):
    """Lay the pieces of each row end to end: ids and segments ``[b n]``."""
    ids = torch.full((len(rows), length), fill)  # [b n]
    segments = torch.zeros_like(ids)  # [b n]
    for i, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces, start=1):
            end = start + len(piece)
            ids[i, start:end] = piece
            segments[i, start:end] = number
            start = end
    return ids, segments


def _check_parts(batch):
    """Refuse a mask that would pick other tokens, and parts that don't fit."""
    src, mask, labels = batch
    if mask.dtype != torch.bool:
        raise TypeError(f"a batch's mask is {mask.dtype}; pass mask.bool()")
    if src.shape != mask.shape or len(src) != len(labels):
        raise ValueError(
            f"a batch has src {tuple(src.shape)}, mask {tuple(mask.shape)} and "
            f"labels {tuple(labels.shape)}; pass (b, s), (b, s) and (b, t)"
        )


def packed_logits(
    model: nn.Module,
    src: Tensor,
    tgt: Tensor,
    src_segments: Tensor,
    tgt_segments: Tensor,
) -> Tensor:
    """Logits of a ``T5`` for packed rows whose decoder inputs are ready.

    Args:
        model: a ``T5``.
        src: ids ``[b s]``.
        tgt: what the decoder reads, ids ``[b t]``, with a start token at the
            beginning of each segment.
        src_segments: ``[b s]``, the number of each token's segment; 0: padding.
        tgt_segments: ``[b t]``, the same for the target.

    Returns:
        ``[b t v]``. Each segment gets what it would get alone.
    """
    own_src = segment_mask(src_segments, src_segments)  # [b s s]
    own_tgt = segment_mask(tgt_segments, tgt_segments)  # [b t t]
    cross = segment_mask(tgt_segments, src_segments)  # [b t s]
    memory = model.encode(src, own_src)
    return model.decode(tgt, memory, src_mask=cross, tgt_mask=own_tgt)


def batch_logits(model: nn.Module, batch: Batch | PackedBatch) -> Tensor:
    """Logits ``[b t v]`` of a ``T5`` for each label of a batch.

    In a packed batch, each example gets what it would get alone.
    """
    tgt = model.shift_right(batch.labels)
    if not isinstance(batch, PackedBatch):
        return model(batch.src, tgt, batch.mask)
    src, src_segments, _, tgt_segments = batch
    before = nn.functional.pad(tgt_segments[:, :-1], (1, 0))  # [b t]
    tgt = tgt.masked_fill(tgt_segments != before, model.config.start_id)
    return packed_logits(model, src, tgt, src_segments, tgt_segments)
