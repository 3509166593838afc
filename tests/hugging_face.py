"""Reference models of ``transformers`` with random weights, and a way to
copy their weights into ours."""

import torch
from transformers import T5Config as ReferenceConfig
from transformers import T5ForConditionalGeneration as Reference

from t5_book.t5 import T5

SIZES = dict(dim=48, heads=4, dim_head=8, depth=3, dec_depth=2, num_tokens=128)
LENGTHS = [1, 9, 10, 40, 140]
PLACES = {
    "attention_norm": (0, "layer_norm"),
    "attention": (0, "SelfAttention"),
    "self_norm": (0, "layer_norm"),
    "self_attention": (0, "SelfAttention"),
    "cross_norm": (1, "layer_norm"),
    "cross_attention": (1, "EncDecAttention"),
    "feed_forward_norm": (-1, "layer_norm"),
    "feed_forward": (-1, "DenseReluDense"),
}


def reference_name(name: str) -> str:
    """Translate the name of one of our weights to that of the reference."""
    stack, part, *rest = name.split(".")
    if stack in ("enc_emb", "dec_emb"):
        return "shared.weight"
    if stack == "head":
        return "lm_head.weight"
    if part == "norm":
        return f"{stack}.final_layer_norm.weight"
    if part == "biases":
        table = "layer.0.SelfAttention.relative_attention_bias.weight"
        return f"{stack}.block.{rest[0]}.{table}"
    block, place, *weight = rest
    layer, module = PLACES[place]
    layer = {"encoder": 1, "decoder": 2}[stack] if layer < 0 else layer
    return f"{stack}.block.{block}.layer.{layer}.{module}.{'.'.join(weight)}"


def copy_weights(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Load the weights of a reference T5 into ours."""
    weights = reference.state_dict()
    ours.load_state_dict(
        {name: weights[reference_name(name)] for name in ours.state_dict()}
    )


def make_pair(feed_forward="relu", seed=0, **ours) -> tuple[T5, Reference]:
    """A reference T5 with random weights, and ours with the same."""
    torch.manual_seed(seed)
    reference = Reference(
        ReferenceConfig(
            vocab_size=SIZES["num_tokens"],
            d_model=SIZES["dim"],
            d_kv=SIZES["dim_head"],
            num_heads=SIZES["heads"],
            num_layers=SIZES["depth"],
            num_decoder_layers=SIZES["dec_depth"],
            d_ff=2 * SIZES["dim"],
            feed_forward_proj=feed_forward,
            dropout_rate=0.0,
        )
    ).eval()
    for name, weight in reference.named_parameters():
        if weight.ndim == 1:  # norms start at one, which would hide bugs
            weight.data += 0.3 * torch.randn_like(weight)
        if "relative_attention_bias" in name:  # small, likewise
            weight.data *= 10
    model = make_ours(feed_forward=feed_forward, **ours).eval()
    copy_weights(model, reference)
    return model, reference


def make_ours(**extra) -> T5:
    """Our T5 in the sizes of the reference."""
    sides = {
        f"{side}_{name}": value
        for side in ("enc", "dec")
        for name, value in dict(
            num_tokens=SIZES["num_tokens"],
            depth=SIZES["depth"] if side == "enc" else SIZES["dec_depth"],
            heads=SIZES["heads"],
            dim_head=SIZES["dim_head"],
            mlp_mult=2,
        ).items()
    }
    return T5(dim=SIZES["dim"], **sides, **extra)


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative where the reference exceeds one."""
    return ((ours - reference).abs() / reference.abs().clamp(min=1)).max().item()


def padding_masks(batch: int, length: int) -> torch.Tensor:
    """A mask with padding on the right (row 0), on the left (row 1)."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    if length > 2:
        mask[0, length // 2 :] = False
        mask[1, : length // 3] = False
    return mask
