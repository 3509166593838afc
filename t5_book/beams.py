"""Beam search: follow several beginnings of a text, return the best.

Built in chapter 13, "Search for the best text" (chapters/beams.md). Edit
the chapter, not this file.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from t5_book.checks import check_integer, check_number
from t5_book.generation import (
    DecodingState,
    check_lengths,
    first_target,
    generate,
)
from t5_book.inference import evaluating
from t5_book.t5 import T5

__all__ = ["BeamSearchOutput", "beam_search"]


class Beams(NamedTuple):
    """Beginnings or texts during the search, ``w`` for each source."""

    ids: Tensor  # int64 [b w n]
    scores: Tensor  # [b w], sums of log-probabilities, or these over n**penalty


def take_beams(beams: Beams, index: Tensor) -> Beams:
    """For each source, the beams that ``index [b m]`` names, in its order."""
    rows = torch.arange(len(index), device=index.device)[:, None]  # [b 1]
    return Beams(beams.ids[rows, index], beams.scores[rows, index])


def grow_beams(running: Beams, log_probs: Tensor) -> tuple[Beams, Tensor]:
    """The ``2w`` best ways to go on with ``w`` beams, best first.

    Twice as many as beams, because up to ``w`` of them may end with this token.

    Args:
        running: ids ``[b w n]`` and sums of log-probabilities ``[b w]``.
        log_probs: of each next token, ``[b w v]``.

    Returns:
        the beams, one token longer, ``[b 2w n+1]`` and ``[b 2w]``, and
        the number of the beam that each goes on from, int64 ``[b 2w]``.
    """
    w, v = log_probs.shape[1:]
    sums = running.scores[..., None] + log_probs  # [b w v]
    scores, index = sums.flatten(1).topk(2 * w)  # [b 2w], into w * v
    origin = index // v
    token = index % v
    ids = take_beams(running, origin).ids  # [b 2w n]
    return Beams(torch.cat([ids, token[..., None]], dim=2), scores), origin


def keep_best(
    finished: Beams, grown: Beams, ended: Tensor, penalty: float, pad_id: int
) -> Beams:
    """The ``w`` best of the texts finished before and those that end now.

    Args:
        finished: ids ``[b w n]`` and scores ``[b w]``; minus infinity
            where a place is still free.
        grown: from ``grow_beams``, ``[b 2w n+1]`` and ``[b 2w]``.
        ended: bool ``[b 2w]``, True where a text ends; of these, the ones
            among the first ``w`` count.
        penalty: by what their sums are divided.
        pad_id: fills up the texts finished before.
    """
    w = finished.scores.shape[1]
    new = (grown.scores / penalty).masked_fill(~ended, -torch.inf)  # [b 2w]
    scores = torch.cat([finished.scores, new[:, :w]], dim=1)  # [b 2w]
    ids = F.pad(finished.ids, (0, 1), value=pad_id)
    ids = torch.cat([ids, grown.ids[:, :w]], dim=1)  # [b 2w n+1]
    return take_beams(Beams(ids, scores), scores.topk(w).indices)


def may_improve(
    running: Beams,
    finished: Beams,
    n: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool | str,
) -> Tensor:
    """Ask for each source whether to search on after ``n`` tokens.

    Args:
        running: the beams, best first; sums ``[b w]``.
        finished: the finished texts; scores ``[b w]``.
        n, max_new_tokens: length of the beams now and at most.
        length_penalty, early_stopping: as for ``beam_search``.

    Returns:
        bool ``[b]``, False where the search is over.

    Source: ``transformers``, ``generation/utils.py``.
    """
    worst = finished.scores.amin(dim=1)  # [b]; minus infinity: a place is free
    if early_stopping is True:
        return worst.isneginf()
    longest = max_new_tokens if early_stopping == "never" and length_penalty > 0 else n
    return running.scores[:, 0] / longest**length_penalty > worst


def first_beams(start: Tensor, w: int, pad_id: int, dtype: torch.dtype) -> tuple[Beams, Beams]:
    """``w`` running beams from ``start [b p]``, and no finished text."""
    ids = start[:, None].repeat(1, w, 1)  # [b w p]
    dtype = torch.promote_types(dtype, torch.float32)
    none = torch.full(ids.shape[:2], -torch.inf, dtype=dtype, device=ids.device)
    sums = none.clone()
    sums[:, 0] = 0  # all beams begin alike, so only one of them may grow
    return Beams(ids, sums), Beams(torch.full_like(ids, pad_id), none)


class BeamSearchOutput(NamedTuple):
    """What ``beam_search`` returns, each source's best text first."""

    ids: Tensor  # int64 [b * num_return_sequences, n], as generate returns them
    scores: Tensor  # [b * num_return_sequences], in nats


def best_texts(finished: Beams, number: int, prefix_length: int, config) -> BeamSearchOutput:
    """The ``number`` best of each source, without the start token."""
    scores = finished.scores[:, :number].flatten()
    ids = finished.ids[:, :number, 1:].flatten(0, 1)  # [b*number n]
    ids = ids.masked_fill(scores.isneginf()[:, None], config.pad_id)
    before_eos = (ids[:, prefix_length:] == config.eos_id).cumsum(dim=1) == 0
    longest = before_eos.sum(dim=1).max() + 1  # with its eos
    return BeamSearchOutput(ids[:, : prefix_length + longest], scores)


def check_beams(num_beams, num_return_sequences, length_penalty, early_stopping) -> None:
    """Refuse options that no search can have."""
    check_integer("num_beams", num_beams, 1)
    check_integer("num_return_sequences", num_return_sequences, 1)
    # A larger power of the length would overflow.
    check_number("length_penalty", length_penalty, -20, 20)
    if num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences is {num_return_sequences}; pass at most num_beams, "
            f"which is {num_beams}"
        )
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping is {early_stopping!r}; pass True, False or "never"')


def generate_or_search(
    model: T5,
    src: Tensor,
    mask: Tensor | None = None,
    *,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    do_sample: bool = False,
    **options,
) -> Tensor:
    """Write a target for each source; with several beams, the best one found.

    Args:
        num_beams: 1 (default) writes by ``t5_book.generate``, more by
            ``t5_book.beam_search``.
        length_penalty, early_stopping, num_return_sequences: those of
            ``beam_search``. With one beam there is nothing to compare, and
            the first two change nothing.
        do_sample: that of ``generate``.
        options: what else the chosen function takes.

    Returns:
        ids ``[b * num_return_sequences, n]``.

    Raises:
        TypeError, ValueError, IndexError: as the chosen function.
    """
    check_beams(num_beams, num_return_sequences, length_penalty, early_stopping)
    if num_beams == 1:
        return generate(model, src, mask, do_sample=do_sample, **options)
    if do_sample:
        raise ValueError("beam search does not sample; pass num_beams=1 or do_sample=False")
    return beam_search(
        model,
        src,
        mask,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=num_return_sequences,
        **options,
    ).ids


# model.generate(src, ...) is generate_or_search(model, src, ...)
T5.generate = generate_or_search


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
    check_beams(num_beams, num_return_sequences, length_penalty, early_stopping)
    check_lengths(max_new_tokens, min_new_tokens)
    config, w = model.config, num_beams
    with evaluating(model):
        state = DecodingState(model, src, mask, use_cache, copies=w)
        start = first_target(model, src, prefix)  # [b 1 + p]
        running, finished = first_beams(start, w, config.pad_id, state.memory.dtype)
        active = torch.ones_like(start[:, 0], dtype=torch.bool)  # [b]
        for n in range(1, max_new_tokens + 1):
            logits = state.next_logits(running.ids.flatten(0, 1))  # [b*w v]
            log_probs = logits.log_softmax(dim=-1).unflatten(0, (-1, w))  # [b w v]
            if n <= min_new_tokens:
                log_probs[..., config.eos_id] = -torch.inf
            grown, origin = grow_beams(running, log_probs)
            ended = (grown.ids[..., -1] == config.eos_id) | (n == max_new_tokens)
            counts = ended & active[:, None]  # a search that is over takes no more
            finished = keep_best(finished, grown, counts, n**length_penalty, config.pad_id)
            sums = grown.scores.masked_fill(ended, -torch.inf)  # [b 2w]
            chosen = sums.topk(w).indices  # [b w]: those that go on
            running = take_beams(Beams(grown.ids, sums), chosen)
            active = active & may_improve(
                running, finished, n, max_new_tokens, length_penalty, early_stopping
            )
            if not active.any():
                break
            # The beams of source i are the rows i*w to i*w + w - 1 of the cache.
            first_row = torch.arange(0, len(src) * w, w, device=src.device)[:, None]
            state.reorder((first_row + origin.gather(1, chosen)).flatten())
    prefix_length = start.shape[1] - 1
    return best_texts(finished, num_return_sequences, prefix_length, config)
