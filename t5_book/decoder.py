"""The decoder: blocks that write the target and look at the source.

Built in chapter 10, "The decoder: causal self-attention and
cross-attention" (chapters/decoder.md). Edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

from t5_book.attention import ATTENTIONS
from t5_book.config import StackConfig
from t5_book.feed_forward import FEED_FORWARDS
from t5_book.masks import causal_mask, expand_padding_mask
from t5_book.relative_position import POSITION_BIASES
from t5_book.rms_norm import RMSNorm

__all__ = ["Decoder"]


class BlockCache:
    """The keys and values that one decoder block keeps between two steps.

    Attributes:
        source: keys and values of the source, each ``[b h s d]``.
        target: keys and values of the target so far, each ``[b h k d]``;
            None before the first token.
    """

    def __init__(self, source: tuple[Tensor, Tensor]):
        self.source = source
        self.target: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens ``[b h q d]``; return all, ``[b h k d]``."""
        if self.target is not None:
            keys = torch.cat([self.target[0], keys], dim=2)
            values = torch.cat([self.target[1], values], dim=2)
        self.target = keys, values
        return self.target

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows ``[b]`` of the target, in this order."""
        keys, values = self.target
        self.target = keys[rows], values[rows]


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention, feed-forward.

    Source: paper, section 2.1.
    """

    def __init__(self, config: StackConfig):
        super().__init__()
        attention = ATTENTIONS[config.attention]
        feed_forward = FEED_FORWARDS[config.feed_forward]
        self.self_norm = RMSNorm(config.dim)
        self.self_attention = attention(
            config.dim, config.heads, config.dim_head, config.dropout
        )
        self.cross_norm = RMSNorm(config.dim)
        self.cross_attention = attention(
            config.dim, config.heads, config.dim_head, config.dropout
        )
        self.feed_forward_norm = RMSNorm(config.dim)
        self.feed_forward = feed_forward(config.dim, config.mlp_dim, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        self_mask: Tensor | None,
        cross_mask: Tensor | None,
        bias: Tensor,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """Add to the stream ``x [b q dim]`` what the three sublayers find.

        Args:
            x: the stream.
            memory: what the encoder returned, ``[b s dim]``; not read where
                there is a cache, which holds the source's keys and values.
            self_mask: bool, broadcasts to ``[b h q k]``, True = attend.
            cross_mask: bool, broadcasts to ``[b h q s]``, True = attend.
            bias: position bias ``[1 h q k]``.
            cache: the block's; what is new in ``x`` is added to it. Its source
                may have fewer rows than ``x``: see ``Decoder.forward``.
        """
        y = self.self_norm(x)
        target = self.self_attention.keys_values(y)  # two of [b h q d]
        if cache is None:
            source = self.cross_attention.keys_values(memory)  # two of [b h s d]
        else:
            target = cache.extend(*target)  # two of [b h k d]
            source = cache.source
        x = x + self.dropout(self.self_attention(y, target, self_mask, bias))
        y = self.cross_norm(x)
        if cache is not None:
            # Targets of one source are more queries to the same keys.
            b, dim = source[0].shape[0], y.shape[2]
            y = y.reshape(b, -1, dim)  # [b (w q) dim]
        y = self.cross_attention(y, source, cross_mask).view_as(x)  # [(b w) q dim]
        x = x + self.dropout(y)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + self.dropout(y)


class DecoderCache:
    """What a decoder keeps while it writes the targets of one batch of sources.

    ``Decoder.new_cache`` makes it from the sources, so it can't be used
    with others.

    Attributes:
        blocks: a ``BlockCache`` for each block.
        cross_mask: the source's mask, ``[b 1 1 s]`` or ``[b 1 q s]``, or None.
        length: number of target tokens so far.
    """

    def __init__(self, blocks: list[BlockCache], cross_mask: Tensor | None):
        self.blocks = blocks
        self.cross_mask = cross_mask
        self.length = 0

    def position_biases(self, tables: nn.ModuleList, q: int, k: int) -> list[Tensor]:
        """What each table adds for the last ``q`` of ``k`` tokens, ``[1 h q k]``."""
        return [table(q, k) for table in tables]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows ``[b]`` of the targets, in this order.

        Rows may only change places among those with the same source.
        """
        for block in self.blocks:
            block.reorder(rows)


class Decoder(nn.Module):
    """Write a target while looking at a source: blocks, then a norm.

    Source: paper, section 2.1; order of operations of mesh-tensorflow,
    ``transformer_layers.py``.
    """

    def __init__(self, config: StackConfig):
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        # T5 learns one table for the whole stack; UMT5 one for each block.
        tables = config.depth if config.bias_per_layer else 1
        position_bias = POSITION_BIASES[config.attention]
        self.biases = nn.ModuleList(
            position_bias(
                config.heads,
                config.num_buckets,
                config.max_distance,
                bidirectional=False,
            )
            for _ in range(tables)
        )
        self.norm = RMSNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def new_cache(self, memory: Tensor, src_mask: Tensor | None = None) -> DecoderCache:
        """Project the source once, for all the steps in which a target is written.

        Args:
            memory: ``[b s dim]``, what the encoder returned.
            src_mask: bool ``[b s]``, True at real tokens; default: all real.

        Returns:
            A cache for this batch of sources, with no target token in it yet.
        """
        caches = []
        for block in self.blocks:
            keys, values = block.cross_attention.keys_values(memory)  # [b h s d]
            # Each step multiplies with them, and a view would be copied each time.
            caches.append(BlockCache((keys.contiguous(), values.contiguous())))
        cross_mask = None if src_mask is None else expand_padding_mask(src_mask)
        return DecoderCache(caches, cross_mask)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Write a batch of targets, or the next piece of it.

        Args:
            x: ``[b q dim]``, the target, or what follows the ``cache``. With a
                cache there may be several targets for each source: of ``w``,
                rows ``i*w`` to ``i*w + w - 1`` are those of source ``i``.
            memory: ``[b s dim]``, what the encoder returned. With a cache, pass
                neither this nor ``src_mask``: the cache was made from them.
            src_mask: bool ``[b s]``, True at real tokens of the source, or
                ``[b q s]`` for pairs; default: all real.
            tgt_mask: bool ``[b k]``, True at real tokens of the target, those
                in the cache included, or ``[b q k]`` for pairs; default: all
                real.
            cache: from ``new_cache``; ``x`` is appended to it. Without one,
                nothing outlives the call.

        Returns:
            ``[b q dim]``. At padding the numbers are finite and mean nothing.
        """
        q = x.shape[1]
        k = q
        if cache is not None:
            k = cache.length + q
            cross_mask = cache.cross_mask
            biases = cache.position_biases(self.biases, q, k)  # each [1 h q k]
            cache.length = k
        else:
            cross_mask = None if src_mask is None else expand_padding_mask(src_mask)
            biases = [bias(q, k) for bias in self.biases]  # each [1 h q k]
        # A single token is the last one and may see all there is.
        self_mask = causal_mask(q, k, x.device) if q > 1 else None  # [1 1 q k]
        if tgt_mask is not None:
            padding = expand_padding_mask(tgt_mask)  # [b 1 1 k] or [b 1 q k]
            self_mask = padding if self_mask is None else self_mask & padding
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            bias = biases[i if len(biases) > 1 else 0]
            past = None if cache is None else cache.blocks[i]
            x = block(x, memory, self_mask, cross_mask, bias, past)
        return self.dropout(self.norm(x))
