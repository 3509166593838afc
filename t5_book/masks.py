"""Masks: who may attend to whom. All are boolean, True = attend.

A mask over ``(b, n)`` says which tokens are real. Attention scores are
``(b, h, q, k)``, and a mask meets them only in the shapes made here.

Built in chapter 6, "Attention: letting every token look at every other"
(chapters/attention.md) and chapter 16, "Other objectives, and packing"
(chapters/objectives.md). Edit the chapter, not this file.
"""

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["causal_mask", "expand_padding_mask"]


def expand_padding_mask(mask: Tensor) -> Tensor:
    """Make a padding mask, or a mask of pairs, fit attention scores.

    Args:
        mask: bool, True where a key may be attended to: ``[b k]`` by all
            queries, or ``[b q k]`` by this query.

    Returns:
        bool ``[b 1 1 k]`` or ``[b 1 q k]``, which broadcasts to ``[b h q k]``.

    Raises:
        TypeError: if ``mask`` is not boolean.
        ValueError: if ``mask`` does not have two or three axes.
    """
    # On integers ~ flips bits: ~1 is -2, which counts as True.
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; pass a boolean mask: mask.bool()")
    if mask.ndim not in (2, 3):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; pass (batch, keys) or "
            "(batch, queries, keys)"
        )
    if mask.ndim == 3:
        return rearrange(mask, "b q k -> b 1 q k")
    return rearrange(mask, "b k -> b 1 1 k")


def causal_mask(q_len: int, k_len: int, device: torch.device | None = None) -> Tensor:
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
    """
    if q_len > k_len:
        raise ValueError(
            f"{q_len} queries can't be the last of {k_len} keys; pass q_len <= k_len"
        )
    full = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    # The last query may see all keys, the one before it all but one.
    return full.tril(diagonal=k_len - q_len)[None, None]  # [1 1 q k]


def segment_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """Let tokens of a packed row meet those of their own segment alone.

    Args:
        queries: int64 ``[b q]``, the number of each token's segment.
        keys: int64 ``[b k]``, the same for the keys; 0 is padding.

    Returns:
        bool ``[b q k]``; nobody attends to padding.

    Source: t5x, ``network.py``.
    """
    same = queries[:, :, None] == keys[:, None, :]  # [b q k]
    return same & (keys != 0)[:, None, :]
