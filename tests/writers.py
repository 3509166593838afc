"""Pairs of models, ours and ``transformers``', that write varied texts."""

import torch
from hugging_face import copy_weights, padding_masks
from torch import Tensor, nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers import T5Config as ReferenceConfig
from transformers import T5ForConditionalGeneration as Reference

from t5_book.t5 import T5

FAMILIES = ["t5", "t5-v1_1", "mt5", "byt5", "umt5"]
VOCAB = 60
START = dict(decoder_start_token_id=0, pad_token_id=0)


def sizes_of(family: str) -> dict:
    """The sizes of a small member of a family, named as the reference does.

    A released ByT5 has three times as many encoder blocks as decoder
    blocks, and heads that do not fill the width of the model.
    """
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, num_heads=4, d_ff=48)
    sizes |= dict(num_layers=2, num_decoder_layers=2)
    if family == "byt5":
        sizes |= dict(
            d_kv=4, num_heads=6, num_layers=4, num_decoder_layers=1
        )
    return sizes


def make_reference(family: str, seed: int) -> nn.Module:
    """A model of ``transformers`` with strong random weights.

    ``transformers`` 5.23 ties the head of every fresh model; all families
    but the first are released untied, so we untie it.
    """
    torch.manual_seed(10 * FAMILIES.index(family) + seed)
    config, kind = {
        "mt5": (MT5Config, MT5ForConditionalGeneration),
        "umt5": (UMT5Config, UMT5ForConditionalGeneration),
    }.get(family, (ReferenceConfig, Reference))
    gated = "relu" if family == "t5" else "gated-gelu"
    sizes = sizes_of(family) | START
    reference = kind(
        config(**sizes, feed_forward_proj=gated, dropout_rate=0.0)
    ).eval()
    if family != "t5":
        head = torch.empty(VOCAB, reference.config.d_model)
        reference.lm_head.weight = nn.Parameter(head)
        reference.config.scale_decoder_outputs = False
    for name, weight in reference.named_parameters():
        weight.data = strong_weight(name, weight, family)
    return reference


def strong_weight(name: str, weight: Tensor, family: str) -> Tensor:
    """Random numbers with which a token depends on all before it."""
    noise = torch.randn_like(weight)
    tied = family == "t5"  # a large embedding would repeat what it reads
    if weight.ndim == 1:
        large = tied and "decoder.final" in name
        return (30 if large else 1) * (1 + 0.3 * noise)
    if "relative_attention_bias" in name:
        return noise
    if "lm_head" in name:  # that of UMT5 is scaled by 32 ** -0.5
        return noise * (2.0 if family == "umt5" else 0.3)
    if "shared" in name:
        return noise * (0.05 if tied else 0.3)
    return noise * 1.5 * weight.shape[1] ** -0.5


def make_writers(family: str, seed: int = 0) -> tuple[T5, nn.Module]:
    """Our model and the reference, with the same weights.

    ``transformers`` 5.23 scales the logits of UMT5, although its head is
    untied; so for this comparison ours does, too.
    """
    reference = make_reference(family, seed)
    theirs, config = reference.config, {}
    depths = {"enc": theirs.num_layers, "dec": theirs.num_decoder_layers}
    for side, depth in depths.items():
        config[f"{side}_num_tokens"] = theirs.vocab_size
        config[f"{side}_depth"] = depth
        config[f"{side}_heads"] = theirs.num_heads
        config[f"{side}_dim_head"] = theirs.d_kv
        config[f"{side}_mlp_mult"] = theirs.d_ff / theirs.d_model
    if family != "t5":
        config |= dict(feed_forward="gated-gelu", tie_head=False)
    if family == "umt5":
        config |= dict(bias_per_layer=True, scale_logits=True)
    ours = T5(dim=theirs.d_model, **config).eval()
    copy_weights(ours, reference)
    return ours, reference


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
    return other


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
