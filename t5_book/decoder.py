"""The decoder: blocks that write the target and look at the source.

Built in chapter 10, "Write the target" (chapters/decoder.md). Edit the
chapter, not this file.
"""

from itertools import cycle

import torch
from torch import Tensor, nn

from t5_book.attention import MultiHeadAttention, causal_mask
from t5_book.encoder import check_sequence, fit_padding_mask
from t5_book.feed_forward import make_feed_forward
from t5_book.relative_position import RelativePositionBias
from t5_book.rms_norm import RMSNorm

__all__ = [
    "BlockCache",
    "Decoder",
    "DecoderBlock",
]


class BlockCache:
    """The keys and values that one decoder block has computed so far.

    Attributes:
        target: keys and values of the target so far, each ``[b h k d]``;
            None before the first token.
        memory: keys and values of the source, each ``[b h s d]``; None
            before the first look at it.

    Built in chapter 10, "Write the target".
    """

    def __init__(self):
        self.target: tuple[Tensor, Tensor] | None = None
        self.memory: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Number of target tokens so far."""
        return 0 if self.target is None else self.target[0].shape[2]

    def extend(
        self, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens ``[b h q d]``; return all, ``[b h k d]``."""
        if self.target is not None:
            keys = torch.cat([self.target[0], keys], dim=2)
            values = torch.cat([self.target[1], values], dim=2)
        self.target = keys, values
        return self.target

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows ``[b]`` of the target, in this order."""
        self.target = tuple(part[rows] for part in self.target)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention, feed-forward.

    The arguments are those of ``Decoder``.

    Built in chapter 10, "Write the target" (paper, section 2.1).
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int,
        mlp_mult: float = 4, dropout: float = 0.0,
        feed_forward: str = "relu",
    ):
        super().__init__()
        sizes = dim, heads, dim_head, dropout
        self.self_norm = RMSNorm(dim)
        self.self_attention = MultiHeadAttention(*sizes)
        self.cross_norm = RMSNorm(dim)
        self.cross_attention = MultiHeadAttention(*sizes)
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = make_feed_forward(
            feed_forward, dim, mlp_mult, dropout
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Tensor, self_mask: Tensor,
        cross_mask: Tensor | None, bias: Tensor, cache: BlockCache,
    ) -> Tensor:
        """Add to ``x [b q dim]`` what the three sublayers find.

        ``self_mask`` broadcasts to ``[b h q k]`` and ``cross_mask`` to
        ``[b h q s]``, True = attend; ``bias`` is ``[1 h q k]``; ``memory``
        ``[b s dim]`` is projected once for each ``cache``.
        """
        y = self.self_norm(x)
        so_far = cache.extend(*self.self_attention.keys_values(y))
        y = self.self_attention(y, so_far, self_mask, bias)
        x = x + self.dropout(y)
        if cache.memory is None:
            cache.memory = self.cross_attention.keys_values(memory)
        y = self.cross_norm(x)
        y = self.cross_attention(y, cache.memory, cross_mask)
        x = x + self.dropout(y)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + self.dropout(y)


class Decoder(nn.Module):
    """Write a target while looking at a source: blocks, then a norm.

    Args:
        dim: features of a vector, in the target and in the memory.
        depth: number of blocks, at least 1.
        heads: attention heads ``h`` of each block.
        dim_head: features of a head.
        mlp_mult: hidden features of the feed-forward layer as a multiple
            of ``dim``, rounded where it is a fraction; default 4.
        dropout: probability, in each of T5's five places; default 0.
        feed_forward: ``"relu"`` (T5 1.0, default) or ``"gated-gelu"``.
        num_buckets: buckets of the position bias; default 32.
        max_distance: distance in tokens from which on all share the last
            bucket; default 128.
        bias_per_layer: a bias table for each block, as UMT5 has it;
            default: one table for all.

    Built in chapter 10, "Write the target" (paper, section 2.1; order of
    operations of mesh-tensorflow, ``transformer_layers.py``).
    """

    def __init__(
        self, dim: int, depth: int, heads: int, dim_head: int,
        mlp_mult: float = 4, dropout: float = 0.0,
        feed_forward: str = "relu", num_buckets: int = 32,
        max_distance: int = 128, bias_per_layer: bool = False,
    ):
        super().__init__()
        sizes = dim, heads, dim_head, mlp_mult, dropout, feed_forward
        self.blocks = nn.ModuleList(
            DecoderBlock(*sizes) for _ in range(depth)
        )
        self.biases = nn.ModuleList(
            RelativePositionBias(heads, num_buckets, max_distance, False)
            for _ in range(depth if bias_per_layer else 1)
        )
        self.norm = RMSNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def check_inputs(self, x: Tensor, memory: Tensor) -> None:
        """Make sure that target and memory fit the stack and each other."""
        for name, part in (("target", x), ("memory", memory)):
            check_sequence(name, part, self.norm.weight.shape[0])
        if x.shape[0] != memory.shape[0]:
            raise ValueError(
                f"target has {x.shape[0]} examples but memory has "
                f"{memory.shape[0]}; each target needs its own source"
            )

    def new_cache(self) -> list[BlockCache]:
        """An empty cache, for one batch of sources."""
        return [BlockCache() for _ in self.blocks]

    def check_cache(self, cache: list[BlockCache], memory: Tensor) -> None:
        """Make sure that a cache fits the stack and the memory."""
        if len(cache) != len(self.blocks):
            raise ValueError(
                f"the cache is for {len(cache)} blocks but the decoder has "
                f"{len(self.blocks)}; make it with decoder.new_cache()"
            )
        if cache[0].memory is None:
            return
        b, _, s, _ = cache[0].memory[0].shape
        if (b, s) != memory.shape[:2]:
            raise ValueError(
                f"the cache holds a source of shape {(b, s)} but memory "
                f"has shape {tuple(memory.shape[:2])}; begin each source "
                "with decoder.new_cache()"
            )

    def self_mask(self, x: Tensor, mask: Tensor | None, k: int) -> Tensor:
        """What ``x``, the last of ``k`` tokens, may see: ``[b 1 q k]``."""
        b, q, _ = x.shape
        not_later = causal_mask(q, k, x.device)
        real = fit_padding_mask("target", mask, (b, k), queries=q)
        return not_later if real is None else not_later & real

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: list[BlockCache] | None = None,
    ) -> Tensor:
        """Write (the next piece of) a batch of targets.

        Args:
            x: ``[b q dim]``, the target, or what follows the ``cache``.
            memory: ``[b s dim]``, what the encoder returned.
            mask: bool ``[b k]``, True at real tokens of the **target**,
                those in the cache included; default: all real.
            memory_mask: bool ``[b s]``, True at real tokens of the
                **source**; default: all real. Both masks may be of
                pairs, ``[b q k]`` and ``[b q s]`` (chapter 16).
            cache: from ``new_cache``; ``x`` is appended to it.

        Returns:
            ``[b q dim]``. At padding the numbers are finite and mean
            nothing.

        Raises:
            TypeError: if a mask is not boolean.
            ValueError: if shapes do not fit together.
        """
        cache = self.new_cache() if cache is None else cache
        self.check_inputs(x, memory)
        self.check_cache(cache, memory)
        q, k = x.shape[1], cache[0].length + x.shape[1]
        self_mask = self.self_mask(x, mask, k)
        source = memory.shape[:2]  # (b, s)
        cross_mask = fit_padding_mask("source", memory_mask, source, q)
        biases = [bias(q, k) for bias in self.biases]  # each [1 h q k]
        x = self.dropout(x)
        for block, bias, kept in zip(self.blocks, cycle(biases), cache):
            x = block(x, memory, self_mask, cross_mask, bias, kept)
        return self.dropout(self.norm(x))
