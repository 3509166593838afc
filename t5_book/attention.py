"""Multi-head attention as T5 has it: no scaling and no bias vectors.

Built in chapter 6, "Let every token look at every other"
(chapters/attention.md). Edit the chapter, not this file.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

__all__ = [
    "MultiHeadAttention",
    "attention_weights",
    "causal_mask",
    "expand_padding_mask",
]


def expand_padding_mask(mask: Tensor) -> Tensor:
    """Make a padding mask, or a mask of pairs, fit attention scores.

    Args:
        mask: bool, True where a key may be attended to: ``[b k]`` by all
            queries, or ``[b q k]`` by this query.

    Returns:
        bool ``[b 1 1 k]`` or ``[b 1 q k]``, which broadcasts to
        ``[b h q k]``.

    Raises:
        TypeError: if ``mask`` is not boolean.
        ValueError: if ``mask`` does not have two or three axes.

    Built in chapter 6, "Let every token look at every other".
    """
    if mask.dtype != torch.bool:
        raise TypeError(
            f"padding mask is {mask.dtype}; pass a boolean mask, "
            "True where a token is real: mask.bool()"
        )
    if mask.ndim not in (2, 3):
        raise ValueError(
            f"padding mask has shape {tuple(mask.shape)}; pass one of "
            "shape (batch, length) or (batch, queries, keys)"
        )
    if mask.ndim == 3:
        return rearrange(mask, "b q k -> b 1 q k")
    return rearrange(mask, "b k -> b 1 1 k")


def causal_mask(q_len: int, k_len: int, device=None) -> Tensor:
    """Let each position see itself and what comes before it.

    The queries are the last ``q_len`` of the ``k_len`` positions. So one
    function serves a whole target (``q_len == k_len``) and a step of
    generation, where one new query meets all earlier keys.

    Args:
        q_len: number of queries ``q``.
        k_len: number of keys ``k``, at least ``q_len``.
        device: where the mask is made; default: torch's default device.

    Returns:
        bool ``[1 1 q k]``, True where a query may attend to a key.

    Raises:
        ValueError: if there are more queries than keys.

    Built in chapter 6, "Let every token look at every other".
    """
    if q_len > k_len:
        raise ValueError(
            f"{q_len} queries cannot be the last of {k_len} keys; "
            "pass q_len <= k_len"
        )
    full = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    return full.tril(diagonal=k_len - q_len)[None, None]


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

    Built in chapter 6, "Let every token look at every other" (paper,
    section 2.1; without the division by sqrt(d) of Vaswani et al. 2017).
    """
    scores = einsum(queries, keys, "b h q d, b h k d -> b h q k")
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest)
    statistics = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=statistics).to(scores.dtype)


class MultiHeadAttention(nn.Module):
    """Attend from one sequence to the keys and values of another.

    Args:
        dim: features of input and output.
        heads: number of heads ``h``.
        dim_head: features ``d`` of a head; ``heads * dim_head`` may differ
            from ``dim``.
        dropout: probability of dropping an attention weight; default 0.

    Built in chapter 6, "Let every token look at every other" (paper,
    section 2.1; initialisation of mesh-tensorflow, ``attention.py``).
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, dropout: float = 0.0
    ):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, heads * dim_head, bias=False)
        self.k = nn.Linear(dim, heads * dim_head, bias=False)
        self.v = nn.Linear(dim, heads * dim_head, bias=False)
        self.o = nn.Linear(heads * dim_head, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as T5 does: ``q`` holds the factor 1/sqrt(d)."""
        inner, dim = self.q.weight.shape
        dim_head = inner // self.heads
        nn.init.normal_(self.q.weight, std=(dim * dim_head) ** -0.5)
        nn.init.normal_(self.k.weight, std=dim**-0.5)
        nn.init.normal_(self.v.weight, std=dim**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split ``[b n (h d)]`` into heads, ``[b h n d]``."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``context [b k dim]`` to its keys and values.

        Returns:
            Two tensors ``[b h k d]``, for ``forward``.
        """
        keys = self.split_heads(self.k(context))
        values = self.split_heads(self.v(context))
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
        keys, values = keys_values
        queries = self.split_heads(self.q(x))  # [b h q d]
        weights = attention_weights(queries, keys, mask, bias)
        weights = self.dropout(weights)  # [b h q k]
        mixed = einsum(weights, values, "b h q k, b h k d -> b h q d")
        return self.o(rearrange(mixed, "b h q d -> b q (h d)"))
