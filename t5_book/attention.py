"""Multi-head attention as T5 has it: no scaling and no bias vectors.

Built in chapter 6, "Attention: letting every token look at every other"
(chapters/attention.md). Edit the chapter, not this file.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["MultiHeadAttention", "attention_weights"]


def attention_weights(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute how much each query takes from each key.

    Args:
        queries: ``[b h q d]``.
        keys: ``[b h k d]``.
        mask: bool, broadcasts to ``[b h q k]``, True = attend. A query
            that may attend to nothing attends to all keys evenly.
        bias: broadcasts to ``[b h q k]`` and is added to the scores.

    Returns:
        ``[b h q k]``; each row of keys sums to 1.

    Source: paper, section 2.1; without the division by sqrt(d) of Vaswani
    et al. 2017.
    """
    scores = queries @ keys.transpose(2, 3)  # [b h q k]
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        # The lowest finite number, not -inf: a row without a key stays finite.
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


class MultiHeadAttention(nn.Module):
    """Attend from one sequence to the keys and values of another.

    Args:
        dim: features of input and output.
        heads: number of heads ``h``.
        dim_head: features ``d`` of a head; ``heads * dim_head`` may differ
            from ``dim``.
        dropout: probability of dropping an attention weight; default 0.

    Source: paper, section 2.1; initialisation of mesh-tensorflow,
    ``attention.py``.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float = 0.0):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, inner, bias=False)
        self.v = nn.Linear(dim, inner, bias=False)
        self.o = nn.Linear(inner, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        # T5 doesn't divide its scores by sqrt(dim_head): q starts smaller instead.
        nn.init.normal_(self.q.weight, std=(dim * dim_head) ** -0.5)
        nn.init.normal_(self.k.weight, std=dim**-0.5)
        nn.init.normal_(self.v.weight, std=dim**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split ``[b n (h d)]`` into heads, ``[b h n d]``."""
        b, n, inner = x.shape
        # A view costs least, and a step of generation makes four in each block.
        return x.view(b, n, self.heads, -1).transpose(1, 2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``context [b k dim]`` to its keys and values.

        This is not a part of ``forward``, so that the decoder can project
        the source once for a whole target.

        Returns:
            Two tensors ``[b h k d]``, for ``forward``.
        """
        keys = self.split_heads(self.k(context))  # [b h k d]
        values = self.split_heads(self.v(context))  # [b h k d]
        return keys, values

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Let ``x [b q dim]`` attend; return ``[b q dim]``.

        ``keys_values`` comes from the method of that name; ``mask`` and
        ``bias`` are those of ``attention_weights``.
        """
        keys, values = keys_values  # each [b h k d]
        queries = self.split_heads(self.q(x))  # [b h q d]
        mixed = self.mix(queries, keys, values, mask, bias)  # [b h q d]
        return self.o(rearrange(mixed, "b h q d -> b q (h d)"))

    def mix(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Give each query its share of the values, ``[b h q d]``."""
        weights = attention_weights(queries, keys, mask, bias)  # [b h q k]
        weights = self.dropout(weights)
        return weights @ values


# The ways to compute attention: a stack picks one by its name.
ATTENTIONS = {"plain": MultiHeadAttention}
