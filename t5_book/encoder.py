"""The encoder: blocks that read the source and add to what they read.

Built in chapter 9, "The encoder: a residual stream through a stack of
blocks" (chapters/encoder.md). Edit the chapter, not this file.
"""

from torch import Tensor, nn

from t5_book.attention import ATTENTIONS
from t5_book.config import StackConfig
from t5_book.feed_forward import FEED_FORWARDS
from t5_book.masks import expand_padding_mask
from t5_book.relative_position import POSITION_BIASES
from t5_book.rms_norm import RMSNorm

__all__ = ["Encoder"]


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward, each added to the residual stream.

    Source: paper, section 2.1.
    """

    def __init__(self, config: StackConfig):
        super().__init__()
        attention = ATTENTIONS[config.attention]
        feed_forward = FEED_FORWARDS[config.feed_forward]
        self.attention_norm = RMSNorm(config.dim)
        self.attention = attention(
            config.dim, config.heads, config.dim_head, config.dropout
        )
        self.feed_forward_norm = RMSNorm(config.dim)
        self.feed_forward = feed_forward(config.dim, config.mlp_dim, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Add to the stream ``x [b s dim]`` what the sublayers find.

        Args:
            x: the stream.
            mask: bool, broadcasts to ``[b h s s]``, True = attend.
            bias: position bias ``[1 h s s]``.
        """
        y = self.attention_norm(x)
        y = self.attention(y, self.attention.keys_values(y), mask, bias)
        x = x + self.dropout(y)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + self.dropout(y)


class Encoder(nn.Module):
    """Read a source: blocks, then a norm.

    Source: paper, section 2.1; order of operations of mesh-tensorflow,
    ``gin/defaults.gin``.
    """

    def __init__(self, config: StackConfig):
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.depth))
        # T5 learns one table for the whole stack; UMT5 one for each block.
        tables = config.depth if config.bias_per_layer else 1
        position_bias = POSITION_BIASES[config.attention]
        self.biases = nn.ModuleList(
            position_bias(
                config.heads,
                config.num_buckets,
                config.max_distance,
                bidirectional=True,
            )
            for _ in range(tables)
        )
        self.norm = RMSNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, src_mask: Tensor | None = None) -> Tensor:
        """Read a batch of sources.

        Args:
            x: ``[b s dim]``, a vector for each token.
            src_mask: bool ``[b s]``, True at real tokens, or ``[b s s]``, True
                where two may meet; default: all real.

        Returns:
            ``[b s dim]``. At padding the numbers are finite and mean nothing.
        """
        s = x.shape[1]
        mask = None if src_mask is None else expand_padding_mask(src_mask)
        biases = [bias(s, s) for bias in self.biases]  # each [1 h s s]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, biases[i if len(biases) > 1 else 0])
        return self.dropout(self.norm(x))
