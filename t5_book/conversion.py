"""Names of weights and entries of config.json: ours, and those of the releases.

Built in chapter 15, "Released weights: loading T5, mT5, ByT5, UMT5 and
Flan-T5" (chapters/pretrained.md). Edit the chapter, not this file.
"""

import re

from t5_book.checks import check_flag, check_integer
from t5_book.config import T5Config

__all__ = []

# How names begin, here: in released files. {} is the number of the block.
NAMES = {
    "enc_emb": "shared",
    "head": "lm_head",
    "encoder.norm": "encoder.final_layer_norm",
    "encoder.biases.{}.table": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    "encoder.blocks.{}.attention_norm": "encoder.block.{}.layer.0.layer_norm",
    "encoder.blocks.{}.attention": "encoder.block.{}.layer.0.SelfAttention",
    "encoder.blocks.{}.feed_forward_norm": "encoder.block.{}.layer.1.layer_norm",
    "encoder.blocks.{}.feed_forward": "encoder.block.{}.layer.1.DenseReluDense",
    "decoder.norm": "decoder.final_layer_norm",
    "decoder.biases.{}.table": "decoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    "decoder.blocks.{}.self_norm": "decoder.block.{}.layer.0.layer_norm",
    "decoder.blocks.{}.self_attention": "decoder.block.{}.layer.0.SelfAttention",
    "decoder.blocks.{}.cross_norm": "decoder.block.{}.layer.1.layer_norm",
    "decoder.blocks.{}.cross_attention": "decoder.block.{}.layer.1.EncDecAttention",
    "decoder.blocks.{}.feed_forward_norm": "decoder.block.{}.layer.2.layer_norm",
    "decoder.blocks.{}.feed_forward": "decoder.block.{}.layer.2.DenseReluDense",
}
OUR_NAMES = {theirs: ours for ours, theirs in NAMES.items()}


def released_name(name: str) -> str:
    """Translate the name of one of our weights to that in released files.

    A name that no T5 has stays as it is.

    Source: ``transformers``, ``modeling_t5.py``.
    """
    return translate(name, NAMES)


def our_name(released: str) -> str:
    """Translate the name of a weight in released files to ours."""
    return translate(released, OUR_NAMES)


def translate(name: str, names: dict[str, str]) -> str:
    """Replace how a name begins, keeping the number of its block."""
    number = re.search(r"\.(\d+)\.", name)  # the first in the name is the block's
    pattern = name
    if number:
        pattern = name.replace(number[0], ".{}.", 1)
    for old, new in names.items():
        if pattern.startswith(f"{old}."):
            renamed = new + pattern.removeprefix(old)
            return renamed.replace("{}", number[1], 1) if number else renamed
    return name


# An entry of config.json, and the keywords of T5 that it sets. Of d_ff we have
# the multiple of d_model, so it is not in the list.
ENTRIES = {
    "d_model": ["dim"],
    "vocab_size": ["enc_num_tokens", "dec_num_tokens"],
    "num_layers": ["enc_depth"],
    "num_decoder_layers": ["dec_depth"],
    "num_heads": ["enc_heads", "dec_heads"],
    "d_kv": ["enc_dim_head", "dec_dim_head"],
    "feed_forward_proj": ["feed_forward"],
    "dropout_rate": ["dropout"],
    "relative_attention_num_buckets": ["num_buckets"],
    "relative_attention_max_distance": ["max_distance"],
    "pad_token_id": ["pad_id"],
    "eos_token_id": ["eos_id"],
    "decoder_start_token_id": ["start_id"],
}
SIZES = ("d_model", "vocab_size", "num_layers", "num_heads", "d_kv", "d_ff")


def our_config(entries: dict) -> T5Config:
    """Translate the entries of a ``config.json``; the head is left at its default.

    Raises:
        ValueError: if it is not the configuration of a T5.

    Source: ``transformers``, ``configuration_t5.py``.
    """
    entries = {name: value for name, value in entries.items() if value is not None}
    family = entries.get("model_type")
    if family not in ("t5", "mt5", "umt5"):
        raise ValueError(
            f"config.json has model_type {family!r}; this book loads 't5', 'mt5' "
            "and 'umt5'"
        )
    epsilon = entries.get("layer_norm_epsilon", 1e-6)
    if epsilon != 1e-6:
        raise ValueError(f"config.json: layer_norm_epsilon is {epsilon!r}, not 1e-06")
    missing = [name for name in SIZES if name not in entries]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for name in SIZES:
        check_integer(f"config.json: {name}", entries[name], 1)
        if entries[name] >= 2**31:
            raise ValueError(
                f"config.json: {name} is {entries[name]}, which is too much"
            )
    defaults = {
        "feed_forward_proj": "relu" if family == "t5" else "gated-gelu",
        "dropout_rate": 0.1,
        "num_decoder_layers": entries["num_layers"],
        "decoder_start_token_id": entries.get("pad_token_id", 0),
    }
    entries = {**defaults, **entries}
    keywords = {"bias_per_layer": family == "umt5"}
    for entry, ours in ENTRIES.items():
        if entry in entries:
            keywords |= dict.fromkeys(ours, entries[entry])
    for side in ("enc", "dec"):
        keywords[f"{side}_mlp_mult"] = entries["d_ff"] / entries["d_model"]
    try:
        return T5Config(**keywords)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"config.json: {error}") from None


def logits_scaled(entries: dict, tied: bool) -> bool | None:
    """What ``config.json`` says of scaled logits; None: as usual.

    Args:
        entries: those of ``config.json``.
        tied: whether the head is the embedding.

    Raises:
        ValueError: if it says something else than true or false.
    """
    if tied and entries.get("model_type") == "mt5":
        return False
    name = "scale_decoder_outputs" if tied else "scale_logits"
    if entries.get(name) is not None:
        check_flag(f"config.json: {name}", entries[name])
    return entries.get(name)


def released_config(config: T5Config) -> dict:
    """The entries of ``config.json`` for a model.

    Raises:
        ValueError: if the two sides differ in more than depth, or if they
            have two embeddings: the format has no words for that.
    """
    differing = []
    if not config.tie_token_emb:
        differing.append("two embeddings")
    values = {"d_ff": [config.encoder.mlp_dim, config.decoder.mlp_dim]}
    for entry, names in ENTRIES.items():
        values[entry] = [getattr(config, name) for name in names]
    entries = {}
    for entry, sides in values.items():
        entries[entry] = sides[0]
        if sides[0] != sides[-1]:
            differing.append(f"{entry} {sides[0]} and {sides[-1]}")
    if differing:
        raise ValueError(
            f"config.json can't describe a T5 with {', '.join(differing)}; keep this "
            "one as model.state_dict() and model.config.to_json()"
        )
    family = "umt5" if config.bias_per_layer else "t5"
    entries["architectures"] = [f"{family.upper()}ForConditionalGeneration"]
    entries["is_encoder_decoder"] = True
    entries["model_type"] = family
    entries["tie_word_embeddings"] = config.tie_head
    if config.scale_logits is not None:
        entries["scale_decoder_outputs"] = config.scale_logits
        if not config.tie_head:
            entries["scale_logits"] = config.scale_logits
    return entries
