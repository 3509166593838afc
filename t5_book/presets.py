"""The sizes of the released models, as keywords of ``T5``.

Built in chapter 11, "The whole T5: embeddings, two stacks, a head and a
loss" (chapters/t5.md). Edit the chapter, not this file.
"""

__all__ = ["PRESETS"]


def _sizes(
    num_tokens, *, dim, mlp_dim, depth, heads, dim_head=64, dec_depth=None
) -> dict:
    """The keywords that one size sets; both sides have the same width."""
    sizes = {"dim": dim, "enc_depth": depth, "dec_depth": dec_depth or depth}
    for side in ("enc", "dec"):
        sizes[f"{side}_num_tokens"] = num_tokens
        sizes[f"{side}_heads"] = heads
        sizes[f"{side}_dim_head"] = dim_head
        sizes[f"{side}_mlp_mult"] = mlp_dim / dim
    return sizes


_T5 = {
    "small": dict(dim=512, mlp_dim=2048, depth=6, heads=8),
    "base": dict(dim=768, mlp_dim=3072, depth=12, heads=12),
    "large": dict(dim=1024, mlp_dim=4096, depth=24, heads=16),
    "3b": dict(dim=1024, mlp_dim=16384, depth=24, heads=32, dim_head=128),
    "11b": dict(dim=1024, mlp_dim=65536, depth=24, heads=128, dim_head=128),
}
_V1_1 = {
    "small": dict(dim=512, mlp_dim=1024, depth=8, heads=6),
    "base": dict(dim=768, mlp_dim=2048, depth=12, heads=12),
    "large": dict(dim=1024, mlp_dim=2816, depth=24, heads=16),
    "xl": dict(dim=2048, mlp_dim=5120, depth=24, heads=32),
    "xxl": dict(dim=4096, mlp_dim=10240, depth=24, heads=64),
}
_BYT5 = {
    "small": dict(dim=1472, mlp_dim=3584, depth=12, dec_depth=4, heads=6),
    "base": dict(dim=1536, mlp_dim=3968, depth=18, dec_depth=6, heads=12),
    "large": dict(dim=1536, mlp_dim=3840, depth=36, dec_depth=12, heads=16),
    "xl": dict(dim=2560, mlp_dim=6720, depth=36, dec_depth=12, heads=32),
    "xxl": dict(dim=4672, mlp_dim=12352, depth=36, dec_depth=12, heads=64),
}
_UMT5 = {size: row for size, row in _V1_1.items() if size != "large"}
_GATED = {"feed_forward": "gated-gelu", "tie_head": False}

# family: its sizes, its vocabulary, and what else sets it apart from T5 1.0
_FAMILIES = {
    "t5": (_T5, 32128, {}),
    "t5-v1_1": (_V1_1, 32128, _GATED),
    "flan-t5": (_V1_1, 32128, _GATED),
    "mt5": (_V1_1, 250112, _GATED),
    "byt5": (_BYT5, 384, _GATED),
    "umt5": (_UMT5, 256384, {**_GATED, "bias_per_layer": True}),
}

# ``T5(**PRESETS["t5-small"])``: keywords by family and size
PRESETS: dict[str, dict] = {
    f"{family}-{size}": {**_sizes(num_tokens, **row), **options}
    for family, (rows, num_tokens, options) in _FAMILIES.items()
    for size, row in rows.items()
}
