"""Attention in less time and memory, with the same numbers.

Built in chapter 21, "Make it fast: attention in less time and memory"
(chapters/make_it_fast.md). Edit the chapter, not this file.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t5_book.attention import ATTENTIONS, MultiHeadAttention
from t5_book.relative_position import (
    POSITION_BIASES,
    RelativePositionBias,
    spread,
)

__all__ = ["ChunkedAttention", "FusedAttention"]


class FusedAttention(MultiHeadAttention):
    """Attention in one call of PyTorch where its kernel can do it.

    Under ``attention="sdpa"``. The mask becomes a part of the bias.
    """

    def mix(self, queries, keys, values, mask, bias):
        """Give each query its share of the values, ``[b h q d]``."""
        if mask is not None:
            sees = mask.any(dim=-1, keepdim=True)  # [b 1 q 1]
            # Zeros score every key the same: an even mean where all is hidden.
            queries = queries.masked_fill(~sees, 0.0)
            lowest = torch.finfo(queries.dtype).min
            hidden = torch.zeros_like(sees, dtype=queries.dtype)
            hidden = hidden.masked_fill(sees, lowest)  # [b 1 q 1]
            bias = torch.where(mask, 0.0 if bias is None else bias, hidden)
        if bias is not None:
            bias = bias.to(queries.dtype)  # under autocast they differ
        learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        drops = self.dropout.p if self.training else 0.0
        if queries.is_cpu and (learns or drops > 0):
            # On the CPU the kernel has neither gradients for a bias nor dropout.
            scores = queries @ keys.mT  # [b h q k]
            if bias is not None:
                scores += bias
            return self.dropout(scores.softmax(dim=-1)) @ values
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, dropout_p=drops, scale=1.0
        )


ATTENTIONS["sdpa"] = FusedAttention
POSITION_BIASES["sdpa"] = RelativePositionBias


class BiasByDistance(RelativePositionBias):
    """The bias as a number for each distance, which takes next to no memory."""

    def forward(self, q_len: int, k_len: int) -> Tensor:
        """Look up the bias of each relative position, ``[h n]``."""
        return self.by_distance(q_len, k_len)


class ChunkedAttention(FusedAttention):
    """Attention for a few queries at a time, which forgets their scores.

    Under ``attention="chunked"``. Going back, it computes them once more.
    Its bias is that of ``BiasByDistance``.
    """

    # Bytes of scores at a time. glibc returns a tensor of 32 MiB to the system at
    # once; smaller ones can leave holes between what is kept for the way back.
    chunk = 2**25

    def mix(self, queries, keys, values, mask, bias):
        """Give each query its share of the values, ``[b h q d]``."""
        b, h, q_len, _ = queries.shape
        row = b * h * keys.shape[2] * queries.element_size()
        c = max(1, self.chunk // row)  # queries at a time
        pieces, mixed = [], torch.empty_like(queries)  # [b h q d]
        for start in range(0, q_len, c):
            stop = min(start + c, q_len)
            piece = queries[:, :, start:stop]  # [b h c d]
            rows = mask
            if mask is not None and mask.shape[2] > 1:
                rows = mask[:, :, start:stop]  # [b 1 c k]
            part = bias
            if bias is not None:
                # Query i sees the k_len numbers from q_len - 1 - i on.
                last = q_len - 1 - start + keys.shape[2]
                part = bias[:, q_len - stop : last]  # [h c+k-1]
            given = piece, keys, values, rows, part
            if torch.is_grad_enabled():
                pieces.append(checkpoint(self.whole, *given, use_reentrant=False))
            else:
                # What stays must not lie between what goes: the holes would be
                # too small for the scores of the next queries.
                mixed[:, :, start:stop] = self.whole(*given)
        return torch.cat(pieces, dim=2) if pieces else mixed

    def whole(self, queries, keys, values, mask, by_distance):
        """All scores of these queries at once."""
        bias = None
        if by_distance is not None:
            bias = spread(by_distance, keys.shape[2])  # [1 h c k]
        return super().mix(queries, keys, values, mask, bias)


ATTENTIONS["chunked"] = ChunkedAttention
POSITION_BIASES["chunked"] = BiasByDistance
