"""What the tests of the encoder and of the decoder share."""

import torch
from hugging_face import SIZES, make_family
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from t5_book.config import StackConfig

KINDS = ["relu", "gated-gelu"]


def small(**options) -> StackConfig:
    """The configuration of a small stack."""
    sizes = dict(dim=16, depth=2, heads=2, dim_head=4, mlp_dim=64)
    return StackConfig(**sizes | options)



def make_umt5_pair():
    """Our T5 with a bias table for each layer, and UMT5 with the same."""
    return make_family("umt5")


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
