"""Pairs of models, ours and ``transformers``', that write varied texts.

All are float64. In float32 two tokens can be so nearly equal that the order
of a sum decides between them, and that order depends on the processor.
"""

import torch
from hugging_face import (
    FAMILIES,
    copy_weights,
    exact_norms,
    keywords,
    make_reference,
    padding_masks,
)
from torch import Tensor, nn

from t5_book.t5 import T5

VOCAB = 60
START = dict(decoder_start_token_id=0, pad_token_id=0)


def make_writers(family: str, seed: int = 0) -> tuple[T5, nn.Module]:
    """A reference with strong random weights, and ours with the same."""
    sizes = dict(vocab_size=VOCAB, d_model=32, d_ff=48)
    # So small, their rows end at many places.
    sizes |= dict(d_kv=4) if family == "byt5" else dict(num_layers=2)
    reference = make_reference(family, **sizes)
    torch.manual_seed(10 * list(FAMILIES).index(family) + seed)
    for name, weight in reference.named_parameters():
        weight.data = strong_weight(name, weight, family)
    ours = T5(**keywords(family, reference.config)).eval()
    copy_weights(ours, reference)
    return ours.double(), exact_norms(reference.double())


def strong_weight(name: str, weight: Tensor, family: str) -> Tensor:
    """Random numbers with which a token depends on all before it."""
    noise = torch.randn_like(weight)
    tied = family == "t5"  # a large embedding would repeat what it reads
    if weight.ndim == 1:
        large = tied and "decoder.final" in name
        return (30 if large else 1) * (1 + 0.3 * noise)
    if "relative_attention_bias" in name:
        return noise
    if "lm_head" in name:
        return noise * 0.3
    if "shared" in name:
        return noise * (0.05 if tied else 0.3)
    return noise * 1.5 * weight.shape[1] ** -0.5


def make_ending_writers(family: str, seed: int = 0) -> tuple[T5, nn.Module]:
    """The same, with an eos that ends rows at many different places."""
    ours, reference = make_writers(family, seed)
    eos = choose_eos(write_slowly(ours, *sources(), steps=14))
    return with_ids(ours, eos_id=eos), reference


def sources(b: int = 5, s: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random sources with padding on both sides, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(2, VOCAB, (b, s), generator=generator)
    return src, padding_masks(max(b, 2), s)[:b]


def with_ids(model: T5, **special) -> T5:
    """The same model, with other special tokens."""
    other = T5(**vars(model.config) | special).eval()
    other.load_state_dict(model.state_dict())
    return other.to(model.head.weight.dtype)


@torch.no_grad()
def write_slowly(model, src, mask=None, steps=14) -> Tensor:
    """Greedy generation by the formula: no cache, no end."""
    tgt = torch.full_like(src[:, :1], model.config.start_id)
    for _ in range(steps):
        logits = model(src, tgt, mask=mask)
        tgt = torch.cat([tgt, logits[:, -1:].argmax(-1)], dim=1)
    return tgt[:, 1:]


def cut(rows: Tensor, eos: int, skip: int = 0) -> list[list[int]]:
    """Rows as lists, each up to its first eos after ``skip`` tokens."""
    lists = rows.tolist()
    return [
        row[: row.index(eos, skip) + 1] if eos in row[skip:] else row
        for row in lists
    ]


def choose_eos(written: Tensor) -> int:
    """A token that ends rows at as many different places as possible."""
    found = [token for token in written[:, 1:].unique().tolist() if token]
    return max(found, key=lambda eos: len(set(map(len, cut(written, eos)))))


def write_with_reference(reference, ours: T5, src, mask=None, **options):
    """What ``transformers`` writes, without the start token.

    ``prefix`` is given to it as it wants it, with the start token; the 50
    likeliest tokens are no limit unless asked for. Asked for more than
    the ids, it returns all that it has.
    """
    if "prefix" in options:
        prefix = options.pop("prefix")
        start = torch.zeros(len(prefix), 1, dtype=torch.long)
        options["decoder_input_ids"] = torch.cat([start, prefix], dim=1)
    options = dict(do_sample=False, num_beams=1, top_k=0) | START | options
    if not options["do_sample"]:
        del options["top_k"]
    written = reference.generate(
        input_ids=src,
        attention_mask=None if mask is None else mask.long(),
        eos_token_id=ours.config.eos_id,
        **options,
    )
    return written[:, 1:] if isinstance(written, Tensor) else written
