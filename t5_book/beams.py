"""Beam search: follow several beginnings of a text, return the best.

Built in chapter 13, "Search for the best text" (chapters/beams.md). Edit
the chapter, not this file.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from t5_book.generation import (
    TargetReader,
    check_lengths,
    evaluating,
    first_target,
)
from t5_book.t5 import T5

__all__ = [
    "Beams",
    "beam_search",
    "grow_beams",
    "keep_best",
    "may_improve",
    "take_beams",
]


class Beams(NamedTuple):
    """Texts with their scores, ``w`` for each source.

    Inside the search: ids ``[b w n]`` and scores ``[b w]``. What
    ``beam_search`` returns: ids ``[b * w n]`` and scores ``[b * w]``, in
    nats, those of the first source first, each source's best first.

    Built in chapter 13, "Search for the best text".
    """

    ids: Tensor
    scores: Tensor


def take_beams(beams: Beams, index: Tensor) -> Beams:
    """For each source, the beams that ``index [b m]`` names, in its order.

    Built in chapter 13, "Search for the best text".
    """
    rows = torch.arange(len(index), device=index.device)[:, None]
    return Beams(beams.ids[rows, index], beams.scores[rows, index])


def grow_beams(running: Beams, log_probs: Tensor) -> tuple[Beams, Tensor]:
    """The ``2w`` best ways to go on with ``w`` beams, best first.

    Args:
        running: ids ``[b w n]`` and sums of log-probabilities ``[b w]``.
        log_probs: of each next token, ``[b w tokens]``.

    Returns:
        the beams, one token longer, ``[b 2w n+1]`` and ``[b 2w]``, and
        the number of the beam that each goes on from, int64 ``[b 2w]``.

    Built in chapter 13, "Search for the best text".
    """
    w, tokens = log_probs.shape[1:]
    sums = running.scores[..., None] + log_probs  # [b w tokens]
    scores, index = sums.flatten(1).topk(2 * w)  # [b 2w]
    origin, token = index // tokens, index % tokens
    ids = take_beams(running, origin).ids
    ids = torch.cat([ids, token[..., None]], dim=2)
    return Beams(ids, scores), origin


def keep_best(
    finished: Beams, grown: Beams, ended: Tensor,
    penalty: float, pad_id: int,
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

    Built in chapter 13, "Search for the best text".
    """
    w = finished.scores.shape[1]
    new = (grown.scores / penalty).masked_fill(~ended, -torch.inf)
    scores = torch.cat([finished.scores, new[:, :w]], dim=1)  # [b 2w]
    ids = F.pad(finished.ids, (0, 1), value=pad_id)
    ids = torch.cat([ids, grown.ids[:, :w]], dim=1)  # [b 2w n+1]
    return take_beams(Beams(ids, scores), scores.topk(w).indices)


def may_improve(
    running: Beams, finished: Beams, n: int, max_new_tokens: int,
    length_penalty: float, early_stopping: bool | str,
) -> Tensor:
    """Ask for each source whether to search on after ``n`` tokens.

    Args:
        running: the beams, best first; sums ``[b w]``.
        finished: the finished texts; scores ``[b w]``.
        n, max_new_tokens: length of the beams now and at most.
        length_penalty, early_stopping: as for ``beam_search``.

    Returns:
        bool ``[b]``, False where the search is over.

    Built in chapter 13, "Search for the best text" (``transformers``,
    ``generation/utils.py``).
    """
    worst = finished.scores.amin(dim=1)  # minus infinity: a place is free
    if early_stopping is True:
        return worst.isneginf()
    at_most = early_stopping == "never" and length_penalty > 0
    length = max_new_tokens if at_most else n
    return running.scores[:, 0] / length**length_penalty > worst


def _reorder(reader: TargetReader, origin: Tensor) -> None:
    """Let each beam have the past of that which ``origin [b w]`` names."""
    b, w = origin.shape
    first = torch.arange(0, b * w, w, device=origin.device)[:, None]
    for block in reader.cache or []:
        block.reorder((first + origin).flatten())


def _first_beams(start: Tensor, w: int, pad_id: int) -> tuple[Beams, Beams]:
    """``w`` running beams from ``start [b p]``, and no finished text."""
    ids = start[:, None].repeat(1, w, 1)  # [b w p]
    none = ids.new_full(ids.shape[:2], -torch.inf, dtype=torch.float32)
    sums = none.clone()
    sums[:, 0] = 0
    return Beams(ids, sums), Beams(torch.full_like(ids, pad_id), none)


def _next_log_probs(reader, running: Beams, may_end: bool) -> Tensor:
    """Log-probabilities of what follows each beam: ``[b w tokens]``."""
    logits = reader.next_logits(running.ids.flatten(0, 1))
    log_probs = logits.log_softmax(dim=-1)
    if not may_end:
        log_probs[:, reader.model.config.eos_id] = -torch.inf
    return log_probs.unflatten(0, running.scores.shape)


def _search(
    reader, start, w, length_penalty, early_stopping, min_new, max_new
) -> Beams:
    """The loop of ``beam_search``: the ``w`` best texts of each source."""
    config = reader.model.config
    running, finished = _first_beams(start, w, config.pad_id)
    hope = torch.ones_like(start[:, 0], dtype=torch.bool)  # [b]
    for n in range(1, max_new + 1):
        log_probs = _next_log_probs(reader, running, n > min_new)
        grown, origin = grow_beams(running, log_probs)
        ended = (grown.ids[..., -1] == config.eos_id) | (n == max_new)
        new, penalty = ended & hope[:, None], n**length_penalty
        finished = keep_best(finished, grown, new, penalty, config.pad_id)
        sums = grown.scores.masked_fill(ended, -torch.inf)  # [b 2w]
        chosen = sums.topk(w).indices  # [b w]
        running = take_beams(Beams(grown.ids, sums), chosen)
        hope = hope & may_improve(
            running, finished, n, max_new, length_penalty, early_stopping
        )
        if not hope.any():
            break
        _reorder(reader, origin.gather(1, chosen))
    return finished


def _pack(finished: Beams, number: int, p: int, config) -> Beams:
    """The ``number`` best of each source, without the start token.

    ``p`` is the length of the prefix. The empty place of a text that was
    not found is all padding.
    """
    scores = finished.scores[:, :number].flatten()
    ids = finished.ids[:, :number, 1:].flatten(0, 1)
    ids = ids.masked_fill(scores.isneginf()[:, None], config.pad_id)
    before_eos = (ids[:, p:] == config.eos_id).cumsum(dim=1) == 0
    n = before_eos.sum(dim=1).max() + 1  # the longest, with its eos
    return Beams(ids[:, : p + n], scores)


def _check_beams(num_beams, num_return_sequences, early_stopping) -> None:
    """Refuse options that no search can have."""
    if num_beams < 1:
        raise ValueError(f"num_beams is {num_beams}; pass >= 1")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences is {num_return_sequences}; pass 1 to "
            f"num_beams, which is {num_beams}"
        )
    if type(early_stopping) is not bool and early_stopping != "never":
        wrong = f"early_stopping is {early_stopping!r}"
        raise ValueError(f'{wrong}; pass True, False or "never"')


@torch.no_grad()
def beam_search(
    model: T5, src: Tensor, mask: Tensor | None = None, *,
    num_beams: int = 4, length_penalty: float = 1.0,
    early_stopping: bool | str = False, num_return_sequences: int = 1,
    max_new_tokens: int = 64, min_new_tokens: int = 0,
    prefix: Tensor | None = None, use_cache: bool = True,
) -> Beams:
    """Write the best targets that beam search finds for each source.

    Args:
        model, src, mask, max_new_tokens, min_new_tokens, prefix,
            use_cache: as for ``t5_book.generate``.
        num_beams: number of beginnings ``w`` that are followed.
        length_penalty: a text of ``n`` tokens, eos included and prefix
            not, has the score ``sum / n**length_penalty``, where ``sum``
            is its log-probability. Default 1: the mean of a token.
        early_stopping: True stops when ``w`` texts are finished; False
            (default) when the best beam could not join them if it ended
            now; "never" when it could not at any length.
        num_return_sequences: number of texts for each source, 1 to ``w``.

    Returns:
        ``Beams``: ids ``[b * num_return_sequences n]`` as ``generate``
        returns them, and scores in nats. A score of minus infinity: so
        many texts are not to be found, and the row is padding.

    Raises:
        ValueError: if an argument is out of range.

    Built in chapter 13, "Search for the best text" (paper, section 3.7;
    ``transformers``, ``generation/utils.py``, but padded with ``pad_id``).
    """
    _check_beams(num_beams, num_return_sequences, early_stopping)
    check_lengths(max_new_tokens, min_new_tokens)
    start = first_target(model, src, prefix)  # [b 1 + p]
    with evaluating(model):
        reader = TargetReader(model, src, mask, use_cache, num_beams)
        finished = _search(
            reader, start, num_beams, length_penalty, early_stopping,
            min_new_tokens, max_new_tokens,
        )
    p = start.shape[1] - 1
    return _pack(finished, num_return_sequences, p, model.config)
