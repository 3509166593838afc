"""Beam search: follow several beginnings of a text, return the best.

Built in chapter 13, "Beam search: following several beginnings at once"
(chapters/beams.md). Edit the chapter, not this file.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from t5_book.checks import check_integer, check_number
from t5_book.config import T5Config
from t5_book.generation import (
    WordStreamer,
    check_lengths,
    check_sampling,
    first_target,
    generate,
    start_decoding,
)
from t5_book.t5 import T5

__all__ = ["beam_search"]


class Beams(NamedTuple):
    """Beginnings that are followed, ``w`` for each source, best first."""

    ids: Tensor  # int64 [b w n]
    sums: Tensor  # [b w], log-probabilities of the whole beginnings


class Texts(NamedTuple):
    """The ``w`` best texts that are finished, best first."""

    ids: Tensor  # int64 [b w n], filled up with padding
    scores: Tensor  # [b w], sum / n**length_penalty; -inf: the place is free


def take_beams(x: Tensor, index: Tensor) -> Tensor:
    """For each source, the beams of ``x [b w ...]`` that ``index [b m]`` names."""
    rows = torch.arange(len(index), device=index.device)[:, None]  # [b 1]
    return x[rows, index]  # [b m ...]


def grow_beams(running: Beams, log_probs: Tensor) -> tuple[Beams, Tensor]:
    """The ``2w`` best ways to go on with ``w`` beams, best first.

    Twice as many as beams, because up to ``w`` of them may end with this token.

    Args:
        running: the beams, ids ``[b w n]``.
        log_probs: of each next token, ``[b w v]``.

    Returns:
        the candidates, one token longer, ids ``[b 2w n+1]``, and the
        number of the beam that each continues, int64 ``[b 2w]``.
    """
    w, v = log_probs.shape[1:]
    sums = running.sums[..., None] + log_probs  # [b w v]
    sums, index = sums.flatten(1).topk(2 * w)  # [b 2w], into w * v
    origin = index // v
    token = index % v
    ids = take_beams(running.ids, origin)  # [b 2w n]
    ids = torch.cat([ids, token[..., None]], dim=2)  # [b 2w n+1]
    return Beams(ids, sums), origin


def keep_best(
    finished: Texts, grown: Beams, ended: Tensor, penalty: float, pad_id: int
) -> Texts:
    """The ``w`` best of the texts finished before and those that end now.

    Args:
        finished: the texts finished before, ids ``[b w n]``.
        grown: from ``grow_beams``, ids ``[b 2w n+1]``.
        ended: bool ``[b 2w]``, True where a text ends; of these, the ones
            among the first ``w`` count.
        penalty: what their sums are divided by.
        pad_id: fills up the texts finished before.
    """
    w = finished.scores.shape[1]
    new = (grown.sums / penalty).masked_fill(~ended, -torch.inf)  # [b 2w]
    scores = torch.cat([finished.scores, new[:, :w]], dim=1)  # [b 2w]
    ids = F.pad(finished.ids, (0, 1), value=pad_id)  # [b w n+1]
    ids = torch.cat([ids, grown.ids[:, :w]], dim=1)  # [b 2w n+1]
    scores, best = scores.topk(w)  # [b w]
    return Texts(take_beams(ids, best), scores)


def may_improve(
    running: Beams,
    finished: Texts,
    n: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool | str,
) -> Tensor:
    """Ask for each source whether to search on after ``n`` tokens.

    Args:
        running: the beams, best first.
        finished: the finished texts.
        n, max_new_tokens: length of the beams now and at most.
        length_penalty, early_stopping: as for ``beam_search``.

    Returns:
        bool ``[b]``, False where the search is over.

    Source: ``transformers``, ``generation/utils.py``.
    """
    worst = finished.scores.amin(dim=1)  # [b]; minus infinity: a place is free
    if early_stopping is True:
        return worst.isneginf()
    # A positive penalty helps long texts, a negative one short ones.
    longest = n
    if early_stopping == "never" and length_penalty > 0:
        longest = max_new_tokens
    return running.sums[:, 0] / longest**length_penalty > worst


def first_beams(
    start: Tensor, w: int, pad_id: int, dtype: torch.dtype
) -> tuple[Beams, Texts]:
    """``w`` beams from ``start [b p]``, and no finished text.

    Their sums and scores are of ``dtype``, and float32 at least.
    """
    ids = start[:, None].repeat(1, w, 1)  # [b w p]
    dtype = torch.promote_types(dtype, torch.float32)
    none = torch.full(ids.shape[:2], -torch.inf, dtype=dtype, device=ids.device)
    sums = none.clone()
    sums[:, 0] = 0  # all beams begin alike, so only one of them may grow
    return Beams(ids, sums), Texts(torch.full_like(ids, pad_id), none)


class BeamSearchOutput(NamedTuple):
    """What ``beam_search`` returns, each source's best text first."""

    ids: Tensor  # int64 [b * num_return_sequences, n], as generate returns them
    scores: Tensor  # [b * num_return_sequences], in nats


@torch.no_grad()
def beam_search(
    model: T5,
    src: Tensor,
    mask: Tensor | None = None,
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    prefix: Tensor | None = None,
    use_cache: bool = True,
) -> BeamSearchOutput:
    """Write the best targets that beam search finds for each source.

    Args:
        model, src, mask, max_new_tokens, min_new_tokens, prefix,
            use_cache: as for ``t5_book.generate``.
        num_beams: number of beginnings ``w`` that are followed; default 4.
        length_penalty: a text of ``n`` tokens, eos included and prefix
            not, has the score ``sum / n**length_penalty``, where ``sum``
            is its log-probability. Default 1: the mean of a token.
        early_stopping: True stops when ``w`` texts are finished; False
            (default) when the best beam could not join them if it ended
            now; "never" when it could not at any length.
        num_return_sequences: number of texts for each source, 1 to ``w``.

    Returns:
        ids ``[b * num_return_sequences, n]`` and their scores in nats. A
        score of minus infinity: no text was found for this row, which is
        all padding.

    Raises:
        TypeError, ValueError, IndexError: as ``generate``.

    Source: paper, section 3.7; ``transformers``, ``generation/utils.py``,
    but padded with ``pad_id``.
    """
    check_lengths(max_new_tokens, min_new_tokens)
    check_beams(
        num_beams, num_return_sequences, length_penalty, early_stopping, max_new_tokens
    )
    config, w = model.config, num_beams
    start = first_target(model, src, prefix)  # [b 1 + p]
    # Each source is read once, and its w beams look at the same memory.
    state = start_decoding(
        model, src, mask, use_cache, room=start.shape[1] + max_new_tokens
    )
    running, finished = first_beams(start, w, config.pad_id, state.memory.dtype)
    active = torch.ones_like(start[:, 0], dtype=torch.bool)  # [b]
    # Row i*w of the cache is the first beam of source i.
    first_row = w * torch.arange(len(src), device=src.device)[:, None]  # [b 1]
    for n in range(1, max_new_tokens + 1):
        logits = state.next_logits(running.ids.flatten(0, 1))  # [b*w v]
        log_probs = logits.log_softmax(dim=-1).unflatten(0, (-1, w))  # [b w v]
        if n <= min_new_tokens:
            log_probs[..., config.eos_id] = -torch.inf
        grown, origin = grow_beams(running, log_probs)
        ended = (grown.ids[..., -1] == config.eos_id) | (n == max_new_tokens)
        # A search that is over takes no more texts.
        new = ended & active[:, None]  # [b 2w]
        finished = keep_best(finished, grown, new, n**length_penalty, config.pad_id)
        sums = grown.sums.masked_fill(ended, -torch.inf)  # [b 2w]
        sums, chosen = sums.topk(w)  # [b w]: those that go on
        running = Beams(take_beams(grown.ids, chosen), sums)
        active = active & may_improve(
            running, finished, n, max_new_tokens, length_penalty, early_stopping
        )
        if not active.any():
            break
        rows = first_row + origin.gather(1, chosen)  # [b w]
        state.reorder(rows.flatten())
    return best_texts(finished, num_return_sequences, start.shape[1] - 1, config)


def best_texts(
    finished: Texts, number: int, prefix_length: int, config: T5Config
) -> BeamSearchOutput:
    """The ``number`` best of each source, without the start token."""
    scores = finished.scores[:, :number].flatten()  # [b*number]
    ids = finished.ids[:, :number, 1:].flatten(0, 1)  # [b*number n]
    # What stands in a place that is still free means nothing.
    ids = ids.masked_fill(scores.isneginf()[:, None], config.pad_id)
    before_eos = (ids[:, prefix_length:] == config.eos_id).cumsum(dim=1) == 0
    longest = before_eos.sum(dim=1).max() + 1  # with its eos
    return BeamSearchOutput(ids[:, : prefix_length + longest], scores)


def check_beams(
    num_beams: int,
    num_return_sequences: int,
    length_penalty: float,
    early_stopping: bool | str,
    max_new_tokens: int,
) -> None:
    """Refuse options that no search can have, by ValueError."""
    check_integer("num_beams", num_beams, 1)
    check_integer("num_return_sequences", num_return_sequences, 1)
    if num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences is {num_return_sequences}; pass at most "
            f"num_beams, which is {num_beams}"
        )
    # The powers of the length must stay far inside what float32 can hold, e**88.
    most = round(70 / math.log(max(max_new_tokens, 2)), 1)
    check_number("length_penalty", length_penalty, -most, most)
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(
            f'early_stopping is {early_stopping!r}; pass True, False or "never"'
        )


def generate_or_search(
    model: T5,
    src: Tensor,
    mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    prefix: Tensor | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    streamer: WordStreamer | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Write a target for each source; with several beams, the best one found.

    Args:
        num_beams: 1 (default) writes by ``t5_book.generate``, more by
            ``t5_book.beam_search``.
        length_penalty, early_stopping, num_return_sequences: those of
            ``beam_search``. With one beam there is nothing to compare: the
            first two change nothing, and the third must be 1.
        do_sample, temperature, top_k, top_p, generator, streamer: those of
            ``generate``; not for several beams.
        src, mask, max_new_tokens, min_new_tokens, prefix, use_cache: those
            of either.

    Returns:
        ids ``[b * num_return_sequences, n]``.

    Raises:
        TypeError, ValueError, IndexError: as the function that it calls.
    """
    check_lengths(max_new_tokens, min_new_tokens)
    check_beams(
        num_beams, num_return_sequences, length_penalty, early_stopping, max_new_tokens
    )
    shared = dict(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        prefix=prefix,
        use_cache=use_cache,
    )
    if num_beams == 1:
        return generate(
            model,
            src,
            mask,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            streamer=streamer,
            **shared,
        )
    if do_sample:
        raise ValueError(
            f"num_beams is {num_beams}, and beam search does not sample; pass "
            "num_beams=1 or do_sample=False"
        )
    check_sampling(do_sample, temperature, top_k, top_p, generator)
    if streamer is not None:
        raise ValueError(
            f"num_beams is {num_beams}, and beams change to the end, so there is "
            "nothing to stream; pass num_beams=1 or no streamer"
        )
    return beam_search(
        model,
        src,
        mask,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=num_return_sequences,
        **shared,
    ).ids


# model.generate(src, ...) is generate_or_search(model, src, ...)
T5.generate = generate_or_search
