"""Generating text token by token: greedy or sampled, with a cache.

Built in chapter 12, "Generating text: greedy decoding and sampling"
(chapters/generation.md). Edit the chapter, not this file.
"""

import unicodedata

import torch
from torch import Tensor

from t5_book.checks import check_ids, check_integer, check_number
from t5_book.inference import evaluation_view
from t5_book.static_cache import StaticCache
from t5_book.t5 import T5

__all__ = ["WordStreamer", "generate"]


class DecodingState:
    """What a batch of sources has come to, while its targets are written.

    Args:
        model: a ``T5``.
        memory: what ``model.encode`` returned, ``[b s dim]``.
        src_mask: bool ``[b s]``, True at real tokens of the source; default:
            all real.
        use_cache: if False, the whole target is read at each step.
        room: number of target tokens to set memory aside for; default: none,
            and the cache is copied to append to it.

    Raises:
        ValueError: if ``src_mask`` is a mask of pairs.
    """

    def __init__(
        self,
        model: T5,
        memory: Tensor,
        src_mask: Tensor | None = None,
        use_cache: bool = True,
        room: int | None = None,
    ):
        if src_mask is not None and src_mask.ndim != 2:
            raise ValueError(
                f"mask has {src_mask.ndim} axes; to write a target, pass a mask "
                "of shape (batch, source length)"
            )
        self.model = model
        self.memory = memory
        self.src_mask = src_mask
        self.cache = None
        if use_cache:
            self.cache = model.decoder.new_cache(memory, src_mask)
        if use_cache and room is not None:
            self.cache = StaticCache(self.cache, room)

    @torch.inference_mode()
    def next_logits(self, tgt: Tensor) -> Tensor:
        """Score what follows ``tgt [b t]``: logits ``[b v]``.

        They are float32 at least, as a softmax over a large vocabulary needs
        the digits. With a cache, ``tgt`` must continue that of the last call.
        There may be several targets for each source, as in ``Decoder.forward``.
        """
        model = self.model
        if self.cache is None:
            w = len(tgt) // len(self.memory)
            memory = self.memory.repeat_interleave(w, dim=0)
            mask = self.src_mask
            mask = None if mask is None else mask.repeat_interleave(w, dim=0)
            x = model.decoder(model.dec_emb(tgt), memory, mask)
        else:
            new = tgt[:, self.cache.length :]
            x = model.decoder(model.dec_emb(new), cache=self.cache)
        # Only the last position says what follows; the head is too large to
        # score the others for nothing.
        logits = model.logits(x[:, -1])  # [b v]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.inference_mode()
    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows ``[b]`` of the targets, in this order."""
        if self.cache is not None:
            self.cache.reorder(rows)


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Change logits ``[b v]`` before a token is sampled, in this order.

    The arguments are those of ``generate``; the defaults change nothing.
    What is dropped becomes minus infinity.

    Source: top-k, Fan et al. 2018; top-p, Holtzman et al. 2020.
    """
    logits = logits / temperature
    if top_k:
        best = logits.topk(min(top_k, logits.shape[-1])).values  # [b top_k]
        logits = logits.masked_fill(logits < best[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1)  # the least likely first
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p  # [b v]
        # Rounding could drop everything; the likeliest token always stays.
        drop[:, -1] = False
        # Each token's verdict goes back to where the token stands.
        drop = torch.zeros_like(drop).scatter(-1, order, drop)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def first_target(model: T5, src: Tensor, prefix: Tensor | None = None) -> Tensor:
    """What the decoder reads first: start token and prefix, ``[b 1 + p]``.

    Args:
        model: a ``T5``.
        src: ids of the sources ``[b s]``.
        prefix: ids ``[b p]`` with which the targets begin; padding counts
            as text. Default: none.

    Raises:
        TypeError, ValueError, IndexError: if ``prefix`` is not ids of the
            target's vocabulary, a row for each source.
    """
    check_ids("source", src, model.config.enc_num_tokens)
    start = torch.full_like(src[:, :1], model.config.start_id).long()  # [b 1]
    if prefix is None:
        return start
    check_ids("prefix", prefix, model.config.dec_num_tokens)
    if len(prefix) != len(src):
        raise ValueError(
            f"prefix has {len(prefix)} rows for {len(src)} sources; pass one "
            "for each source"
        )
    return torch.cat([start, prefix.long()], dim=1)


@torch.inference_mode()
def start_decoding(
    model: T5, src: Tensor, mask: Tensor | None, use_cache: bool, room: int
) -> DecodingState:
    """Read sources without dropout, ready for targets of up to ``room`` tokens."""
    model = evaluation_view(model)
    memory = model.encode(src, mask)  # [b s dim]
    return DecodingState(model, memory, mask, use_cache, min(room, 256))


@torch.no_grad()
def generate(
    model: T5,
    src: Tensor,
    mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    prefix: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    streamer: "WordStreamer | None" = None,
    use_cache: bool = True,
) -> Tensor:
    """Write a target for each source, token by token.

    Args:
        model: a ``T5``; it writes without dropout, and its mode is left alone.
        src: ids of the sources ``[b s]``.
        mask: bool ``[b s]``, True at real source tokens; default: all.
        max_new_tokens: number of tokens at which to stop, default 64.
        min_new_tokens: number before which no text ends, default 0. Both
            are counted from the end of the prefix.
        prefix: ids ``[b p]`` with which the targets begin; default: none.
        do_sample: sample each token; default: take the likeliest.
        temperature: divides the logits; below 1 sharpens. Default 1. This
            and the next three need ``do_sample=True``.
        top_k: sample from this many likeliest tokens; default (and 0): all.
        top_p: sample from the fewest tokens with this sum of probability;
            default (and 1): all.
        generator: where the random numbers come from; default: torch's.
        streamer: has ``put``, which gets start token and prefix ``[b 1 +
            p]``, then each new token ``[b]``, and ``end``.
        use_cache: if False, read the whole target for each token.

    Returns:
        ids ``[b n]`` without the start token, ``n`` as long as the longest
        row. A row ends with ``eos_id`` and is then filled up with
        ``pad_id``; a row without ``eos_id`` was stopped. (In the prefix,
        ``eos_id`` is a token like any other and ends nothing.)

    Raises:
        TypeError, ValueError, IndexError: if an argument is out of range or
            has no effect; see also ``T5.encode``.

    Source: paper, section 3.1.2; names and order of operations of
    ``transformers``, ``generation/utils.py``.
    """
    check_lengths(max_new_tokens, min_new_tokens)
    check_sampling(do_sample, temperature, top_k, top_p, generator)
    config = model.config
    tgt = first_target(model, src, prefix)  # [b 1 + p]
    state = start_decoding(
        model, src, mask, use_cache, room=tgt.shape[1] + max_new_tokens
    )
    done = torch.zeros_like(tgt[:, :1], dtype=torch.bool)  # [b 1]
    if streamer is not None:
        streamer.put(tgt.cpu())
    for step in range(max_new_tokens):
        logits = state.next_logits(tgt)  # [b v]
        if step < min_new_tokens:
            # What inference mode has made can't be changed outside of it.
            logits = logits.clone()
            logits[:, config.eos_id] = -torch.inf
        if do_sample:
            logits = filter_logits(logits, temperature, top_k, top_p)
            # float32, so that a seed gives the same tokens in any dtype
            probs = logits.softmax(dim=-1).float()
            token = torch.multinomial(probs, 1, generator=generator)  # [b 1]
        else:
            token = logits.argmax(dim=-1, keepdim=True)  # [b 1]
        token = token.masked_fill(done, config.pad_id)
        tgt = torch.cat([tgt, token], dim=1)
        if streamer is not None:
            streamer.put(token[:, 0].cpu())
        done = done | (token == config.eos_id)
        if done.all():
            break
    if streamer is not None:
        streamer.end()
    return tgt[:, 1:]


def check_lengths(max_new_tokens: int, min_new_tokens: int) -> None:
    """Refuse numbers of tokens that no text can have, by ValueError."""
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_integer("min_new_tokens", min_new_tokens, 0)
    if min_new_tokens > max_new_tokens:
        raise ValueError(
            f"min_new_tokens is {min_new_tokens} and max_new_tokens is "
            f"{max_new_tokens}; pass a minimum that is no larger than the maximum"
        )


def check_sampling(
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> None:
    """Refuse what can't be sampled with, or would have no effect, by ValueError."""
    # A smaller temperature would overflow the logits, and is greedy anyway.
    check_number("temperature", temperature, 1e-6, float("inf"))
    if top_k is not None:
        check_integer("top_k", top_k, 0)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; pass more than 0 and at most 1")
    no_effect = (
        temperature == 1 and not top_k and top_p in (None, 1) and generator is None
    )
    if not do_sample and not no_effect:
        raise ValueError("temperature, top_k, top_p and generator need do_sample=True")


# How the Unicode names begin of characters that need no space after them.
_UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "IDEOGRAPHIC",
    "FULLWIDTH",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
)


class WordStreamer:
    """Print a text while it is written, whole words at a time.

    Pass it to ``generate`` with a batch of one. A word is complete when a space
    or a line break follows; in scripts without spaces, each character is. Of a
    word of 40 characters and more, the pieces are printed.

    Args:
        tokenizer: has a method ``decode(ids)``.
        file: where to print; default: standard output.

    Source: methods as in ``transformers``, ``generation/streamers.py``.
    """

    def __init__(self, tokenizer, file=None):
        self.tokenizer = tokenizer
        self.file = file
        self.ids = []
        self.printed = 0  # number of characters

    def put(self, ids: Tensor) -> None:
        """Take the next ids, ``[n]`` or ``[1 n]``; ValueError if more texts."""
        if ids.ndim > 1 and len(ids) > 1:
            raise ValueError(f"{len(ids)} texts; a WordStreamer prints one")
        self.ids += ids.flatten().tolist()
        # Half a character decodes to U+FFFD, and may still become a whole one.
        text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        whole = max(text.rfind(" "), text.rfind("\n")) + 1  # up to here, whole words
        if text and unicodedata.name(text[-1], "").startswith(_UNSPACED):
            whole = len(text)
        if len(text) - max(whole, self.printed) >= 40:
            whole = len(text)
        if whole > self.printed:
            print(text[self.printed : whole], end="", flush=True, file=self.file)
            self.printed = whole

    def end(self) -> None:
        """Print what is left and a line break; be ready for the next text."""
        text = self.tokenizer.decode(self.ids)
        print(text[self.printed :], flush=True, file=self.file)
        self.ids = []
        self.printed = 0
