"""Span corruption: hide spans of a text and ask for them back.

Built in chapter 3, "Hide spans and ask for them back"
(chapters/span_corruption.md). Edit the chapter, not this file.
"""

from itertools import takewhile

import numpy as np
import torch
from einops import rearrange
from torch import Generator, Tensor, nn

from t5_book.batches import Batch, pad_rows

__all__ = [
    "corrupt_spans",
    "noise_counts",
    "random_spans_noise_mask",
    "restore_spans",
    "span_lengths",
]


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

    Built in chapter 3, "Hide spans and ask for them back" (paper, section
    3.3.4; rounding of t5, ``preprocessors.py``).
    """
    density, mean = noise_density, mean_noise_span_length
    if length < 2 or not 0 < density < 1 or not mean >= 1:
        raise ValueError(
            f"length {length}, noise density {density}, mean span {mean}: "
            "pass length >= 2, 0 < density < 1, mean >= 1"
        )
    noise = round(np.float32(length) * np.float32(density))
    noise = min(max(noise, 1), length - 1)
    spans = max(round(np.float32(noise) / np.float32(mean)), 1)
    if spans > (kept := length - noise):
        raise ValueError(
            f"{spans} spans, but only {kept} of {length} tokens are kept, "
            "to stand between them; lower the density or raise the mean"
        )
    return noise, spans


def _random_segmentation(total, parts, batch, generator):
    """Split ``total`` into positive parts ``[b p]``, all equally likely."""
    shape, dtype = (batch, total - 1), torch.float64  # ties are rare
    places = torch.rand(shape, generator=generator, dtype=dtype)
    cuts = places.argsort(dim=1)[:, : parts - 1].sort(dim=1).values + 1
    cuts = nn.functional.pad(cuts, (1, 0), value=0)
    return nn.functional.pad(cuts, (0, 1), value=total).diff(dim=1)


def random_spans_noise_mask(
    length: int,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    *,
    batch: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """Draw which tokens to hide, for each row of a batch on its own.

    The numbers, and errors, are those of ``noise_counts``; ``generator`` is
    on the CPU. Returns bool ``[b l]``, True = hidden: the first token never
    is, the last one always; all such masks are equally likely.

    Built in chapter 3, "Hide spans and ask for them back" (paper, section
    3.3.4; t5, ``preprocessors.py``).
    """
    n, s = noise_counts(length, noise_density, mean_noise_span_length)
    kept = _random_segmentation(length - n, s, batch, generator)
    hidden = _random_segmentation(n, s, batch, generator)
    ends = rearrange([kept, hidden], "two b s -> b (s two)").cumsum(dim=1)
    positions = torch.arange(length).repeat(batch, 1)  # [b l]
    return torch.searchsorted(ends, positions, right=True) % 2 == 1


def span_lengths(
    inputs_length: int,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> tuple[int, int]:
    """Say how many tokens to corrupt, so that they fill a source.

    ``inputs_length`` (3 or more) counts sentinels and eos. Returns the
    tokens before corruption, and the length of the target with its eos.

    Built in chapter 3, "Hide spans and ask for them back" (t5,
    ``random_spans_helper``, but rounded as the mask is).
    """
    if inputs_length < 3:
        raise ValueError(f"inputs_length {inputs_length}: pass 3 or more")

    def lengths(tokens: int) -> tuple[int, int]:
        n, s = noise_counts(tokens, noise_density, mean_noise_span_length)
        return tokens - n + s + 1, n + s + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, lengths(tokens)[1]


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
        tokens: integers ``[b l]``, without eos.
        noise_mask: bool ``[b l]``, True = hidden; any mask will do.
        first_sentinel: id of ``<extra_id_0>``; the others lie below it.

    Raises:
        TypeError: if tokens are not integers or the mask is not boolean.
        ValueError: if shapes differ, sentinels run out, or a token is one.

    Built in chapter 3, "Hide spans and ask for them back" (paper, figure
    2; t5, ``noise_span_to_unique_sentinel``).
    """
    _check_mask(tokens, noise_mask)
    tokens = nn.functional.pad(tokens.long(), (0, 1), value=eos_id)
    hidden = nn.functional.pad(noise_mask, (0, 1), value=False)
    starts = hidden.clone()
    starts[:, 1:] &= ~hidden[:, :-1]  # where a span begins
    spans = starts.cumsum(dim=1)  # [b l+1]
    _check_sentinels(tokens, spans.max(), first_sentinel, num_sentinels)
    sentinels = first_sentinel + 1 - spans
    source = torch.where(starts, sentinels, tokens)
    src, mask = _take(source, starts | ~hidden, pad_id)
    both = rearrange([sentinels, tokens], "two b l -> b (l two)")
    wanted = rearrange([starts, hidden], "two b l -> b (l two)")
    wanted[:, -1] = True  # eos is kept, and ends the target, too
    return Batch(src, mask, _take(both, wanted, -100)[0])


def _take(values, keep, fill):
    """Take what is kept of each row, and pad the rows."""
    return pad_rows(values[keep].split(keep.sum(dim=1).tolist()), fill)


def _check_mask(tokens, noise_mask):
    """Refuse tokens and masks of the wrong type or shape."""
    kinds = [f"{x.dtype} {tuple(x.shape)}" for x in (tokens, noise_mask)]
    message = (
        f"tokens are {kinds[0]} and noise_mask is {kinds[1]}; pass integer "
        "ids and a boolean mask, both (batch, length) and not empty"
    )
    if tokens.is_floating_point() or noise_mask.dtype != torch.bool:
        raise TypeError(message)
    shape = tokens.shape
    if shape != noise_mask.shape or len(shape) != 2 or 0 in shape:
        raise ValueError(message)


def _check_sentinels(tokens, spans, first, count):
    """Refuse more spans than sentinels, and sentinels among the tokens."""
    if spans > count:
        raise ValueError(
            f"{spans} spans in a row, but {count} sentinels; corrupt "
            "shorter rows, or pass num_sentinels if there are more"
        )
    taken = tokens[(first - count < tokens) & (tokens <= first)]
    if len(taken):
        raise ValueError(
            f"token {taken[0]} is a sentinel ({count}, from {first} down); "
            "pass the first_sentinel and num_sentinels of your vocabulary"
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

    Reads ``src [b s]`` and ``target [b t]`` (labels will do) up to eos, and
    returns lists of ids. A sentinel that the target does not name stays.

    Built in chapter 3, "Hide spans and ask for them back".
    """
    if src.ndim != 2 or target.ndim != 2 or len(src) != len(target):
        shapes = f"{tuple(src.shape)} and {tuple(target.shape)}"
        raise ValueError(f"src and target are {shapes}; pass two batches")
    rows, last = [], first_sentinel - num_sentinels + 1
    for source, answer in zip(src.tolist(), target.tolist()):
        spans, span = {}, []
        for token in takewhile(eos_id.__ne__, answer):
            if last <= token <= first_sentinel:
                spans[token] = span = []
            else:
                span.append(token)
        source = takewhile(eos_id.__ne__, source)
        rows.append([t for s in source for t in spans.get(s, [s])])
    return rows
