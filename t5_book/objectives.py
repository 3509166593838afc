"""Objectives of the paper's section 3 and of UL2, and packed rows.

Built in chapter 16, "Ask in other ways" (chapters/objectives.md). Edit the
chapter, not this file.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from t5_book.batches import Batch, pad_rows
from t5_book.checks import check_ids
from t5_book.span_corruption import corrupt_spans, random_spans_noise_mask

__all__ = [
    "UL2",
    "PackedBatch",
    "SpecialIds",
    "batch_logits",
    "bert_denoising",
    "deshuffling",
    "iid_denoising",
    "pack",
    "prefix_lm",
    "segment_mask",
    "span_denoising",
    "ul2_denoising",
]


class SpecialIds(NamedTuple):
    """Ids that are no text. Those of words lie below the sentinels.

    Built in chapter 16, "Ask in other ways".
    """

    first_sentinel: int  # id of <extra_id_0>; the others lie below it
    num_sentinels: int = 100
    eos_id: int = 1
    pad_id: int = 0

    @property
    def words_end(self) -> int:
        """The lowest sentinel: ids of words are smaller."""
        return self.first_sentinel - self.num_sentinels + 1


def span_denoising(
    tokens: Tensor, ids: SpecialIds, noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0, *,
    generator: Generator | None = None,
) -> Batch:
    """Hide spans of ``tokens [b l]`` and ask for them, as in chapter 3.

    Built in chapter 16, "Ask in other ways" (paper, section 3.3.4).
    """
    check_ids("text", tokens, ids.words_end)
    numbers = tokens.shape[1], noise_density, mean_noise_span_length
    draw = partial(random_spans_noise_mask, generator=generator)
    noise = draw(*numbers, batch=len(tokens))
    return corrupt_spans(tokens, noise, **ids._asdict())


def _by_chance(tokens, share, generator):
    """Choose each of ``tokens [b l]`` by a chance of its own."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the tokens is {share}; pass 0 to 1")
    return torch.rand(tokens.shape, generator=generator) < share


def iid_denoising(
    tokens: Tensor, ids: SpecialIds, noise_density: float = 0.15, *,
    generator: Generator | None = None,
) -> Batch:
    """Hide single tokens of ``tokens [b l]`` and ask for them.

    ValueError if a text has more gaps than there are sentinels. Built in
    chapter 16, "Ask in other ways" (paper, section 3.1.4).
    """
    check_ids("text", tokens, ids.words_end)
    noise = _by_chance(tokens, noise_density, generator)
    return corrupt_spans(tokens, noise, **ids._asdict())


def bert_denoising(
    tokens: Tensor, ids: SpecialIds, noise_density: float = 0.15,
    random_share: float = 0.1, *, generator: Generator | None = None,
) -> Batch:
    """Mask or replace single tokens, and ask for the whole text.

    Of the hidden tokens of ``tokens [b l]``, ``random_share`` become
    words (from id 3 on), the others ``<extra_id_0>``; 0: MASS-style.
    Built in chapter 16, "Ask in other ways" (paper, section 3.3.1).
    """
    check_ids("text", tokens, ids.words_end)
    noise = _by_chance(tokens, noise_density, generator)
    swap = _by_chance(tokens, random_share, generator)
    word = torch.randint(3, ids.words_end, swap.shape, generator=generator)
    fill = word.where(swap, ids.first_sentinel)
    return _end(fill.where(noise, tokens.long()), tokens, ids)


def _end(sources, targets, ids):
    """End rows of tokens with eos, and pad them to a batch."""
    eos = torch.tensor([ids.eos_id])
    src, mask = pad_rows([torch.cat([r, eos]) for r in sources], ids.pad_id)
    labels, _ = pad_rows([torch.cat([r, eos]) for r in targets], -100)
    return Batch(src, mask, labels)


def prefix_lm(
    tokens: Tensor, ids: SpecialIds, *, generator: Generator | None = None
) -> Batch:
    """Give a beginning of ``tokens [b l]``, and ask for the rest.

    Built in chapter 16, "Ask in other ways" (paper, section 3.3.1).
    """
    check_ids("text", tokens, ids.words_end)
    b, length = tokens.shape
    if length < 2:
        raise ValueError("a text of 1 token cannot be cut; pass 2 or more")
    cuts = torch.randint(1, length, (b,), generator=generator).tolist()
    parts = [row.split([c, length - c]) for row, c in zip(tokens, cuts)]
    return _end(*zip(*parts), ids)


def deshuffling(
    tokens: Tensor, ids: SpecialIds, *, generator: Generator | None = None
) -> Batch:
    """Shuffle each row of ``tokens [b l]``, and ask for the order.

    Built in chapter 16, "Ask in other ways" (paper, section 3.3.1).
    """
    check_ids("text", tokens, ids.words_end)
    mixed = [torch.randperm(len(r), generator=generator) for r in tokens]
    return _end([row[i] for row, i in zip(tokens, mixed)], tokens, ids)


UL2 = (  # mode, mean length of spans (None: l/4), density
    ("R", 3, 0.15), ("R", 8, 0.15), ("S", None, 0.25), ("X", 3, 0.5),
    ("X", 8, 0.5), ("X", 64, 0.15), ("X", 64, 0.5),
)


def ul2_denoising(
    tokens: Tensor, ids: SpecialIds, modes: Mapping[str, Sequence[int]], *,
    generator: Generator | None = None,
) -> Batch:
    """Ask each row of ``tokens [b l]`` by one of UL2's seven denoisers.

    All seven are equally likely. ``modes`` has the ids that begin the
    source: ``[NLU]`` under R, ``[S2S]`` under S, ``[NLG]`` under X, or
    KeyError. ValueError if sentinels run out (100 serve 602 tokens).
    Built in chapter 16, "Ask in other ways" (Tay et al. 2022, table 1).
    """
    check_ids("text", tokens, ids.words_end)
    b, length = tokens.shape
    starts = {mode: torch.tensor(modes[mode]) for mode in "RSX"}
    draw = partial(random_spans_noise_mask, batch=b, generator=generator)
    masks = [draw(length, d, mu or max(length / 4, 1)) for _, mu, d in UL2]
    which = torch.randint(len(masks), (b,), generator=generator)
    noise = torch.stack(masks)[which, torch.arange(b)]  # [b l]
    src, mask, labels = corrupt_spans(tokens, noise, **ids._asdict())
    begin = [starts[UL2[i][0]] for i in which]
    rows = [torch.cat([m, s[r]]) for m, s, r in zip(begin, src, mask)]
    return Batch(*pad_rows(rows, ids.pad_id), labels)


class PackedBatch(NamedTuple):
    """Several examples in each row. Segments count from 1; 0 is padding.

    Built in chapter 16, "Ask in other ways".
    """

    src: Tensor  # int64 [b s]
    src_segments: Tensor  # int64 [b s]
    labels: Tensor  # int64 [b t], -100 at padding
    tgt_segments: Tensor  # int64 [b t]


def pack(
    batches: Iterable[Batch], src_length: int, tgt_length: int
) -> PackedBatch:
    """Lay examples side by side, each into the first row with room for it.

    ValueError if there is no example, or one that no row can hold. Built
    in chapter 16, "Ask in other ways" (paper, section 3.1.2).
    """
    room = src_length, tgt_length
    rows, free = [[]], [room]  # the last row is empty
    for src, mask, labels in (row for b in batches for row in zip(*b)):
        parts = src[mask], labels[labels != -100]
        s, t = map(len, parts)
        fits = [s <= a and t <= b for a, b in free]
        if not fits[-1]:
            wrong = f"an example has {[s, t]} tokens and a row {[*room]}"
            raise ValueError(f"{wrong} (source, target); lengthen the rows")
        i = fits.index(True)
        if not rows[i]:
            rows, free = rows + [[]], free + [room]
        rows[i].append(parts)
        free[i] = free[i][0] - s, free[i][1] - t
    if not rows[0]:
        raise ValueError("there is nothing to pack; pass a batch or more")
    sources, targets = zip(*[zip(*row) for row in rows[:-1]])
    sources = _lay(sources, src_length, 0)
    return PackedBatch(*sources, *_lay(targets, tgt_length, -100))


def _lay(rows, width, fill):
    """Lay the pieces of each row into ids and segments ``[b n]``."""
    both = torch.tensor([fill, 0]).repeat(len(rows), width, 1)  # [b n 2]
    for row, pieces in zip(both, rows):
        numbers = [torch.full_like(p, i) for i, p in enumerate(pieces, 1)]
        laid = torch.stack([torch.cat(pieces), torch.cat(numbers)], dim=1)
        row[: len(laid)] = laid
    return both.unbind(dim=2)


def segment_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """Let tokens meet those of their own segment, and never padding.

    Segments ``[b q]`` and ``[b k]``, 0 at padding; bool ``[b q k]``.
    Built in chapter 16, "Ask in other ways" (t5x, ``network.py``).
    """
    return (queries[:, :, None] == keys[:, None]) & (keys != 0)[:, None]


def batch_logits(model: nn.Module, batch: Batch | PackedBatch) -> Tensor:
    """Logits ``[b t v]`` of a ``T5`` for each label of a batch.

    In a packed batch, each example gets what it would get alone.
    Built in chapter 16, "Ask in other ways".
    """
    tgt = model.shift_right(batch.labels)
    if not isinstance(batch, PackedBatch):
        return model(batch.src, tgt, batch.mask)
    src, reads, _, writes = batch
    before = nn.functional.pad(writes[:, :-1], (1, 0))
    tgt = tgt.masked_fill(writes != before, model.config.start_id)
    memory = model.encode(src, segment_mask(reads, reads))
    cross, own = segment_mask(writes, reads), segment_mask(writes, writes)
    return model.decode(tgt, memory, cross, own)
