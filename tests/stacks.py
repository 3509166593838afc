"""What the tests of the encoder and of the decoder share."""

import torch
from hugging_face import SIZES, copy_weights, make_ours
from torch import Tensor, nn
from transformers import UMT5Config, UMT5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

KINDS = ["relu", "gated-gelu"]
SMALL = dict(dim=16, depth=2, heads=2, dim_head=4)


def make_umt5_pair():
    """Our T5 with a bias table for each layer, and UMT5 with the same."""
    torch.manual_seed(0)
    reference = UMT5ForConditionalGeneration(
        UMT5Config(
            vocab_size=SIZES["num_tokens"],
            d_model=SIZES["dim"],
            d_kv=SIZES["dim_head"],
            num_heads=SIZES["heads"],
            num_layers=SIZES["depth"],
            num_decoder_layers=SIZES["dec_depth"],
            d_ff=2 * SIZES["dim"],
            dropout_rate=0.0,
        )
    )
    model = make_ours(feed_forward="gated-gelu", bias_per_layer=True)
    copy_weights(model, reference)
    return model.eval(), reference.eval()


def with_large_biases(ours, reference):
    """Make the position biases of two stacks as large as the scores."""
    torch.manual_seed(1)
    for name, table in reference.named_parameters():
        if "relative_attention_bias" in name:
            table.data.normal_()
            block = int(name.split(".")[1])
            ours.biases[block].table.weight.data = table.data.clone()
    return ours, reference


def vectors(batch: int, length: int, seed: int = 0) -> Tensor:
    """Vectors as an embedding or an encoder gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, SIZES["dim"], generator=generator)


def long(mask: Tensor | None) -> Tensor | None:
    """A mask as the reference wants it."""
    return None if mask is None else mask.long()


def set_dropout(stack: nn.Module, probability: float) -> None:
    """Set every dropout of a stack, ours or the reference's."""
    for module in stack.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(module, T5Attention):
            module.dropout = probability


def record_dropouts(names: dict[str, nn.Dropout]) -> list:
    """Note each call of these dropouts: its name and the shape it gets."""
    calls = []
    for name, part in names.items():
        part.register_forward_hook(
            lambda part, inputs, _, name=name: calls.append(
                (name, tuple(inputs[0].shape))
            )
        )
    return calls
