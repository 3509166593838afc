"""Writing text: greedy or by lot, with a cache of keys and values.

Built in chapter 12, "Generate text" (chapters/generation.md). Edit the
chapter, not this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t5_book.encoder import check_ids
from t5_book.t5 import T5

__all__ = [
    "TargetReader",
    "WordStreamer",
    "check_lengths",
    "evaluating",
    "filter_logits",
    "first_target",
    "generate",
]


class TargetReader:
    """Read targets that grow, and say what may come next.

    The arguments are those of ``generate`` and ``copies``, the number of
    targets for each source, which stand one below the other; default 1.
    Built in chapter 12, "Generate text".
    """

    def __init__(
        self, model: T5, src: Tensor, mask: Tensor | None = None,
        use_cache: bool = True, copies: int = 1,
    ):
        memory = model.encode(src, mask).repeat_interleave(copies, dim=0)
        if mask is not None:
            mask = mask.repeat_interleave(copies, dim=0)
        self.model, self.memory, self.mask = model, memory, mask
        self.cache = model.decoder.new_cache() if use_cache else None

    def next_logits(self, tgt: Tensor) -> Tensor:
        """Logits for what follows ``tgt [b t]``: float32 ``[b tokens]``.

        With a cache, ``tgt`` must go on from the last call's; what is new
        of it is read in one piece.
        """
        read = self.cache[0].length if self.cache else 0
        logits = self.model.decode(
            tgt[:, read:], self.memory, self.mask, cache=self.cache
        )
        return logits[:, -1].float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout off inside a ``with`` block.

    Afterwards each part of ``model`` is in the mode in which it was, even
    if the block raised an error. Built in chapter 12, "Generate text".
    """
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for part, mode in modes.items():
            part.training = mode


def filter_logits(
    logits: Tensor, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None,
) -> Tensor:
    """Change logits ``[b tokens]`` before a draw, with the knobs in turn.

    The arguments are those of ``generate``; the defaults change nothing.
    What is dropped becomes minus infinity. Built in chapter 12, "Generate
    text" (top-k: Fan et al. 2018; top-p: Holtzman et al. 2020).
    """
    logits = logits / temperature
    if top_k is not None:
        best = logits.topk(min(top_k, logits.shape[-1])).values  # [b top_k]
        logits = logits.masked_fill(logits < best[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1)  # the least likely first
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[:, -1] = False  # the likeliest stays
        drop = drop.gather(-1, order.argsort(dim=-1))  # back in place
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def first_target(
    model: T5, src: Tensor, prefix: Tensor | None = None
) -> Tensor:
    """What the decoder reads first: start token and prefix ``[b 1 + p]``.

    ``src`` and ``prefix`` are those of ``generate``. Raises TypeError,
    ValueError or IndexError if ``prefix`` is not ids, a row for each
    source; padding counts as text. Built in chapter 12, "Generate text".
    """
    check_ids("source", src, model.config.enc_num_tokens)
    start = torch.full_like(src[:, :1], model.config.start_id).long()
    if prefix is None:
        return start
    check_ids("prefix", prefix, model.config.dec_num_tokens)
    if len(prefix) != len(src):
        wrong = f"prefix has {len(prefix)} rows for {len(src)} sources"
        raise ValueError(f"{wrong}; pass one for each source")
    return torch.cat([start, prefix.long()], dim=1)


def check_lengths(max_new_tokens: int, min_new_tokens: int) -> None:
    """Refuse numbers of tokens that no text can have, by ValueError.

    Built in chapter 12, "Generate text".
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; pass >= 1")
    if not 0 <= min_new_tokens <= max_new_tokens:
        wrong = f"min_new_tokens is {min_new_tokens}"
        raise ValueError(f"{wrong}; pass 0 to {max_new_tokens}")


def _check_knobs(do_sample, generator, temperature, top_k, top_p) -> None:
    """Refuse what cannot be drawn with, or would have no effect."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; pass > 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; pass >= 1, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; pass > 0 and <= 1")
    unset = temperature == 1 and top_k is top_p is generator is None
    if not (do_sample or unset):
        knobs = "temperature, top_k, top_p and generator"
        raise ValueError(f"{knobs} need do_sample=True")


def _choose(logits, do_sample, generator, *knobs) -> Tensor:
    """A token for each row of ``logits [b tokens]``: ``[b 1]``."""
    if not do_sample:
        return logits.argmax(dim=-1, keepdim=True)
    shares = filter_logits(logits, *knobs).softmax(dim=-1)
    return torch.multinomial(shares, 1, generator=generator)


@torch.no_grad()
def generate(
    model: T5, src: Tensor, mask: Tensor | None = None, *,
    max_new_tokens: int = 64, min_new_tokens: int = 0,
    prefix: Tensor | None = None, do_sample: bool = False,
    temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, generator: torch.Generator | None = None,
    streamer=None, use_cache: bool = True,
) -> Tensor:
    """Write a target for each source, token by token.

    Args:
        model: a T5; dropout is off while it writes.
        src: ids of the sources ``[b s]``.
        mask: bool ``[b s]``, True at real source tokens; default: all.
        max_new_tokens: number of tokens at which to stop, default 64.
        min_new_tokens: number before which no text ends, default 0. Both
            are counted from the end of the prefix.
        prefix: ids ``[b p]`` with which the targets begin; default: none.
        do_sample: draw each token; default: take the likeliest.
        temperature: divides the logits; below 1 sharpens. Default 1. This
            and the next three need ``do_sample=True``.
        top_k: draw from this many likeliest tokens; default: all.
        top_p: draw from the fewest tokens with this sum of probability.
        generator: where the random numbers come from; default: torch's.
        streamer: has ``put``, which gets start token and prefix ``[b 1 +
            p]``, then each new token ``[b]``, and ``end``.
        use_cache: if False, read the whole target for each token.

    Returns:
        ids ``[b n]`` without the start token, ``n`` as long as the longest
        row. A row ends with ``eos_id`` and is then filled up with
        ``pad_id``; a row without ``eos_id`` was stopped.

    Raises:
        ValueError: if an argument is out of range or has no effect.

    Built in chapter 12, "Generate text" (paper, section 3.1.2; names and
    order of operations of ``transformers``, ``generation/utils.py``).
    """
    knobs = do_sample, generator, temperature, top_k, top_p
    _check_knobs(*knobs)
    check_lengths(max_new_tokens, min_new_tokens)
    tgt = first_target(model, src, prefix)
    if streamer is not None:
        streamer.put(tgt.cpu())
    with evaluating(model):
        reader = TargetReader(model, src, mask, use_cache)
        lengths = min_new_tokens, max_new_tokens
        tgt = _write(reader, tgt, lengths, knobs, streamer)
    if streamer is not None:
        streamer.end()
    return tgt[:, 1:]


def _write(reader, tgt, lengths, knobs, streamer) -> Tensor:
    """The loop of ``generate``: ``tgt`` with all that follows."""
    config, (least, most) = reader.model.config, lengths
    done = torch.zeros_like(tgt[:, :1], dtype=torch.bool)
    for step in range(most):
        logits = reader.next_logits(tgt)  # [b tokens]
        if step < least:
            logits[:, config.eos_id] = -torch.inf
        token = _choose(logits, *knobs)  # [b 1]
        token = token.masked_fill(done, config.pad_id)
        tgt = torch.cat([tgt, token], dim=1)
        if streamer is not None:
            streamer.put(token[:, 0].cpu())
        done = done | (token == config.eos_id)
        if done.all():
            break
    return tgt


class WordStreamer:
    """Print a text while it is written, whole words at a time.

    Pass it to ``generate`` with a batch of one. ``tokenizer`` has a method
    ``decode(ids)``; ``file`` is where to print, default: standard output.
    Built in chapter 12, "Generate text" (methods as in ``transformers``).
    """

    def __init__(self, tokenizer, file=None):
        self.tokenizer, self.file = tokenizer, file
        self.ids, self.printed = [], 0

    def put(self, ids: Tensor) -> None:
        """Take the next ids, ``[n]`` or ``[1 n]``; ValueError if more."""
        if ids.ndim > 1 and len(ids) > 1:
            raise ValueError(f"{len(ids)} texts; a WordStreamer prints one")
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids)
        words = text[: max(text.rfind(" "), text.rfind("\n")) + 1]
        print(words[self.printed :], end="", flush=True, file=self.file)
        self.printed = max(self.printed, len(words))

    def end(self) -> None:
        """Print the last word and a line break."""
        text = self.tokenizer.decode(self.ids)
        print(text[self.printed :], flush=True, file=self.file)
        self.ids, self.printed = [], 0
