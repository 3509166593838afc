"""Span corruption: hide spans of a text and ask for them back.

Built in chapter 3, "Span corruption: hide spans and ask for them back"
(chapters/span_corruption.md). Edit the chapter, not this file.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn import functional as F

from t5_book.batches import Batch, pad_rows

__all__ = ["corrupt_spans", "random_spans_noise_mask", "restore_spans", "span_lengths"]


def noise_counts(
    length: int,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> tuple[int, int]:
    """Count the tokens to hide and the spans that they form.

    Args:
        length: tokens in the sequence, 2 or more.
        noise_density: share of tokens to hide, between 0 and 1.
        mean_noise_span_length: mean tokens in a span, 1 or more.

    Raises:
        ValueError: if one is out of range, or too few tokens are kept.

    Source: paper, section 3.3.4; rounding of t5, ``preprocessors.py``.
    """
    density, mean = noise_density, mean_noise_span_length
    if length < 2 or not 0 < density < 1 or not mean >= 1:
        raise ValueError(
            f"length {length}, noise density {density}, mean span {mean}: "
            "pass length >= 2, 0 < density < 1, mean >= 1"
        )
    # t5 multiplies in float32, which decides some ties the other way
    noise = round(np.float32(length) * np.float32(density))
    noise = min(max(noise, 1), length - 1)
    spans = max(round(np.float32(noise) / np.float32(mean)), 1)
    kept = length - noise
    if spans > kept:
        raise ValueError(
            f"{spans} spans, but only {kept} of {length} tokens are kept to "
            "stand between them; lower the density or raise the mean"
        )
    return noise, spans


def _random_segmentation(total, parts, batch, generator):
    """Split ``total`` into positive parts ``[b p]``, all equally likely."""
    # in float64 two draws are hardly ever equal, which would favour a place
    draws = torch.rand(batch, total - 1, generator=generator, dtype=torch.float64)
    cuts = draws.argsort(dim=1)[:, : parts - 1] + 1  # [b p-1]
    cuts = cuts.sort(dim=1).values
    cuts = F.pad(cuts, (1, 0), value=0)
    cuts = F.pad(cuts, (0, 1), value=total)  # [b p+1]
    return cuts.diff(dim=1)


def random_spans_noise_mask(
    length: int,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    *,
    batch: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """Draw which tokens to hide, for each row of a batch on its own.

    The first token is always kept and the last one always hidden. All such
    masks with the counts of ``noise_counts`` are equally likely.

    Args:
        length: tokens in each row, ``l``.
        noise_density: share of tokens to hide.
        mean_noise_span_length: mean tokens in a span.
        batch: rows ``b``; default 1.
        generator: of random numbers, on the CPU; default torch's own.

    Returns:
        A boolean tensor ``[b l]``, True = hidden.

    Raises:
        ValueError: as ``noise_counts`` does.

    Source: paper, section 3.3.4; t5, ``preprocessors.py``.
    """
    noise, spans = noise_counts(length, noise_density, mean_noise_span_length)
    kept = _random_segmentation(length - noise, spans, batch, generator)
    hidden = _random_segmentation(noise, spans, batch, generator)
    lengths = rearrange([kept, hidden], "two b s -> b (s two)")
    ends = lengths.cumsum(dim=1)  # [b 2s]
    positions = torch.arange(length).repeat(batch, 1)  # [b l]
    # kept and hidden stretches alternate; a hidden one begins at odd counts
    ended = torch.searchsorted(ends, positions, right=True)  # [b l]
    return ended % 2 == 1


def span_lengths(
    inputs_length: int,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> tuple[int, int]:
    """Find how many tokens to corrupt, so that they fill a source.

    Args:
        inputs_length: tokens of the source with its sentinels and eos, 3
            or more.
        noise_density: share of tokens to hide.
        mean_noise_span_length: mean tokens in a span.

    Returns:
        The tokens before corruption, and the length of the target with
        its sentinels and eos.

    Raises:
        ValueError: if ``inputs_length`` is below 3, or as ``noise_counts``
            does.

    Source: t5, ``random_spans_helper``, but rounded as the mask is.
    """
    if inputs_length < 3:
        raise ValueError(f"inputs_length {inputs_length}: pass 3 or more")

    def corrupted(tokens: int) -> tuple[int, int]:
        noise, spans = noise_counts(tokens, noise_density, mean_noise_span_length)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while corrupted(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, corrupted(tokens)[1]


def corrupt_spans(
    tokens: Tensor,
    noise_mask: Tensor,
    first_sentinel: int,
    *,
    eos_id: int = 1,
    num_sentinels: int = 100,
    pad_id: int = 0,
) -> Batch:
    """Hide spans: sentinels in the source, the spans in the labels.

    Args:
        tokens: ids ``[b l]`` of any integer dtype, without eos.
        noise_mask: bool ``[b l]``, True = hidden; any mask will do.
        first_sentinel: id of ``<extra_id_0>``; the others lie below it.
        eos_id: id that ends each source and target; default 1.
        num_sentinels: how many there are; default 100.
        pad_id: id that pads the sources; default 0.

    Returns:
        A ``Batch`` of sources, their padding mask, and labels.

    Raises:
        TypeError: if tokens are not integers or the mask is not boolean.
        ValueError: if shapes differ, if a token is eos or a sentinel, or if
            there are more spans than sentinels.

    Source: paper, figure 2; t5, ``noise_span_to_unique_sentinel``.
    """
    _check_tokens(tokens, noise_mask, eos_id, first_sentinel, num_sentinels)
    tokens = F.pad(tokens.long(), (0, 1), value=eos_id)  # [b l+1]
    hidden = F.pad(noise_mask, (0, 1), value=False)

    # a span starts where a token is hidden and the one before it is not
    starts = hidden.clone()
    starts[:, 1:] &= ~hidden[:, :-1]
    spans = starts.cumsum(dim=1)  # [b l+1], the number of the latest span
    _check_spans(spans, num_sentinels)
    sentinels = first_sentinel + 1 - spans

    source = torch.where(starts, sentinels, tokens)
    in_source = starts | ~hidden
    src, mask = pad_rows(
        [row[wanted] for row, wanted in zip(source, in_source)], pad_id
    )

    # for each token its sentinel and itself, side by side
    target = rearrange([sentinels, tokens], "two b l -> b (l two)")
    in_target = rearrange([starts, hidden], "two b l -> b (l two)")
    in_target[:, -1] = True  # eos
    labels, _ = pad_rows([row[wanted] for row, wanted in zip(target, in_target)], -100)
    return Batch(src, mask, labels)


def _check_tokens(tokens, noise_mask, eos_id, first_sentinel, num_sentinels):
    """Refuse wrong dtypes and shapes, and tokens that have another meaning."""
    message = (
        f"tokens are {tokens.dtype} {tuple(tokens.shape)} and noise_mask is "
        f"{noise_mask.dtype} {tuple(noise_mask.shape)}; pass integer ids and a "
        "boolean mask, both (batch, length) and not empty; tokens[None] makes a "
        "batch of one text"
    )
    if tokens.is_floating_point() or noise_mask.dtype != torch.bool:
        raise TypeError(message)
    if tokens.shape != noise_mask.shape or tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(message)
    if (tokens == eos_id).any():
        row, place = (tokens == eos_id).nonzero()[0].tolist()
        raise ValueError(
            f"token {place} of row {row} is {eos_id}, the eos; it is added at "
            "the end, and inside a text it would end the text early: remove it"
        )
    lowest = first_sentinel - num_sentinels + 1
    taken = tokens[(lowest <= tokens) & (tokens <= first_sentinel)]
    if len(taken):
        raise ValueError(
            f"token {taken[0]} is a sentinel ({num_sentinels}, from "
            f"{first_sentinel} down); pass the first_sentinel and num_sentinels "
            "of your vocabulary"
        )


def _check_spans(spans, num_sentinels):
    """Refuse a row with more spans than there are sentinels."""
    most = spans.max().item()
    if most > num_sentinels:
        raise ValueError(
            f"{most} spans in a row, but {num_sentinels} sentinels; corrupt "
            "shorter rows, or pass num_sentinels if there are more"
        )


def restore_spans(
    src: Tensor,
    target: Tensor,
    first_sentinel: int,
    *,
    eos_id: int = 1,
    num_sentinels: int = 100,
) -> list[list[int]]:
    """Put the spans of a target, or of a model's answer, into the source.

    Both are read up to their first eos. A sentinel that the target does not
    name stays in the text; what stands before its first sentinel is left out.

    Args:
        src: sources ``[b s]``.
        target: targets, labels or answers ``[b t]``.
        first_sentinel: id of ``<extra_id_0>``.
        eos_id: id that ends a row; default 1.
        num_sentinels: how many there are; default 100.

    Returns:
        The ids of each text, without eos.

    Raises:
        ValueError: if the two are not batches of the same size.
    """
    if src.ndim != 2 or target.ndim != 2 or len(src) != len(target):
        raise ValueError(
            f"src and target have shapes {tuple(src.shape)} and "
            f"{tuple(target.shape)}; pass two batches of the same size"
        )
    lowest = first_sentinel - num_sentinels + 1
    rows = []
    for source, answer in zip(src.tolist(), target.tolist()):
        spans = {}  # what the answer says for each sentinel
        span = []
        for token in _before_eos(answer, eos_id):
            if lowest <= token <= first_sentinel:
                span = []
                spans[token] = span
            else:
                span.append(token)
        row = []
        for token in _before_eos(source, eos_id):
            row += spans.get(token, [token])
        rows.append(row)
    return rows


def _before_eos(ids, eos_id):
    """Cut a row off before its first eos."""
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
