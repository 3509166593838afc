"""The encoder: blocks that read the source and add to what they read.

Built in chapter 9, "Read the source" (chapters/encoder.md). Edit the
chapter, not this file.
"""

from itertools import cycle

import torch
from torch import Tensor, nn

from t5_book.attention import MultiHeadAttention, expand_padding_mask
from t5_book.feed_forward import make_feed_forward
from t5_book.relative_position import RelativePositionBias
from t5_book.rms_norm import RMSNorm

__all__ = [
    "Encoder",
    "EncoderBlock",
    "check_ids",
    "check_sequence",
    "fit_padding_mask",
]


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward, each added to the stream.

    The arguments are those of ``Encoder``.

    Built in chapter 9, "Read the source" (paper, section 2.1).
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int,
        mlp_mult: float = 4, dropout: float = 0.0,
        feed_forward: str = "relu",
    ):
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.attention = MultiHeadAttention(dim, heads, dim_head, dropout)
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = make_feed_forward(
            feed_forward, dim, mlp_mult, dropout
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
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


def check_sequence(name: str, x: Tensor, dim: int) -> None:
    """Make sure that ``x`` is a batch of sequences of vectors.

    Args:
        name: what to call it in the error, such as ``"source"``.
        x: should be ``[b n dim]`` with at least one example and one token.
        dim: features that a vector must have.

    Raises:
        ValueError: if the shape is another.

    Built in chapter 9, "Read the source".
    """
    shape = tuple(x.shape)
    if len(shape) != 3 or shape[2] != dim or 0 in shape:
        raise ValueError(
            f"{name} has shape {shape}; pass (batch, length, {dim}) with "
            "at least one example and one token"
        )


def check_ids(name: str, ids: Tensor, num_tokens: int) -> None:
    """Refuse ids ``[b n]`` that a table of ``num_tokens`` rows lacks.

    Raises TypeError, ValueError or IndexError for type, shape or range;
    the error calls the ids by ``name``.

    Built in chapter 9, "Read the source".
    """
    if not isinstance(ids, Tensor):
        hint = "pass torch.tensor([ids]) for a batch of one"
        raise TypeError(f"{name} ids are {type(ids)}; {hint}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} ids are {ids.dtype}; pass ids.long()")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"{name} ids have shape {tuple(ids.shape)}; pass (batch, "
            "length) with at least one example and one token"
        )
    if ids.is_meta or torch.compiler.is_compiling():
        return  # there are no numbers to look at
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= num_tokens:
        raise IndexError(
            f"{name} ids run from {low} to {high}, but the vocabulary "
            f"holds 0 to {num_tokens - 1}"
        )


def fit_padding_mask(
    name: str, mask: Tensor | None, shape: tuple[int, int], queries: int
) -> Tensor | None:
    """Check a mask against the sequence that it hides, and expand it.

    Args:
        name: what to call the sequence in an error, such as ``"source"``.
        mask: bool ``[b k]``, True at real tokens, or ``[b q k]``, True
            where query and token may meet; None if nothing is hidden.
        shape: ``(b, k)`` of the sequence.
        queries: number of queries ``q`` that attend to it.

    Returns:
        bool ``[b 1 1 k]`` or ``[b 1 q k]`` as attention needs it, or None.

    Raises:
        TypeError: if ``mask`` is not boolean.
        ValueError: if its shape is not that of the sequence.

    Built in chapter 9, "Read the source".
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} mask is {type(mask)}; pass a bool tensor")
    b, k = shape
    if tuple(mask.shape) not in ((b, k), (b, queries, k)):
        raise ValueError(
            f"{name} mask has shape {tuple(mask.shape)} but the {name} has "
            f"shape {(b, k)}; pass one True or False for each token, or "
            f"for each pair of {queries} queries and {k} tokens"
        )
    return expand_padding_mask(mask)


class Encoder(nn.Module):
    """Read a source: ``depth`` blocks, then a norm.

    Args:
        dim: features of a vector.
        depth: number of blocks.
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

    Built in chapter 9, "Read the source" (paper, section 2.1; order of
    operations of mesh-tensorflow, ``gin/defaults.gin``).
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
            EncoderBlock(*sizes) for _ in range(depth)
        )
        self.biases = nn.ModuleList(
            RelativePositionBias(heads, num_buckets, max_distance)
            for _ in range(depth if bias_per_layer else 1)
        )
        self.norm = RMSNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read a batch of sources.

        Args:
            x: ``[b s dim]``, a vector for each token.
            mask: bool ``[b s]``, True at real tokens, or ``[b s s]``, True
                where two may meet (chapter 16); default: all real.

        Returns:
            ``[b s dim]``. At padding the numbers are finite and mean
            nothing.

        Raises:
            TypeError: if ``mask`` is not boolean.
            ValueError: if ``x`` or ``mask`` has the wrong shape.
        """
        check_sequence("source", x, self.norm.weight.shape[0])
        b, s, _ = x.shape
        mask = fit_padding_mask("source", mask, (b, s), queries=s)
        biases = [bias(s, s) for bias in self.biases]  # each [1 h s s]
        x = self.dropout(x)
        for block, bias in zip(self.blocks, cycle(biases)):
            x = block(x, mask, bias)
        return self.dropout(self.norm(x))
