"""Relative position bias: what T5 adds to attention scores to know who is near.

Built in chapter 7, "Relative position bias: telling T5 who is near"
(chapters/relative_position.md). Edit the chapter, not this file.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["RelativePositionBias", "relative_position_bucket"]


def distance_bucket(distance: Tensor, side_buckets: int, max_distance: int) -> Tensor:
    """Sort distances into the buckets of one side: exact near, logarithmic far.

    Args:
        distance: int64, any shape, 0 or more.
        side_buckets: buckets for this side; half of them hold one distance each.
        max_distance: where the logarithmic scale ends. The last bucket opens
            before that: at 91 of 128 with 16 buckets, at 113 with 32.

    Returns:
        int64, the shape of ``distance``, from 0 to ``side_buckets - 1``.

    Source: paper, section 2.1; mesh-tensorflow, ``transformer_layers.py``.
    """
    exact = side_buckets // 2
    # Near distances don't use the logarithm. The clamp keeps it from log(0).
    # Without float() the ratio would have torch's default dtype, and bfloat16
    # has too few digits for it.
    ratio = distance.clamp(min=exact).float() / exact
    # From 0 at distance `exact` to 1 at `max_distance`
    scale = ratio.log() / math.log(max_distance / exact)
    far = exact + (scale * (side_buckets - exact)).long()
    far = far.clamp(max=side_buckets - 1)
    return torch.where(distance < exact, distance, far)


def check_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    """Refuse numbers that the bucket formula can't work with.

    Raises:
        ValueError: if two sides get an odd number of buckets, if a side
            gets fewer than 2, or if ``max_distance`` is not larger than
            the number of exact buckets of a side.
    """
    if bidirectional and num_buckets % 2:
        raise ValueError(
            f"num_buckets={num_buckets} is odd and can't be shared by two sides; "
            "pass an even number"
        )
    side = num_buckets // 2 if bidirectional else num_buckets
    if side < 2:
        raise ValueError(
            f"num_buckets={num_buckets} leaves {side} to a side, which needs at "
            f"least 2; pass {4 if bidirectional else 2} or more"
        )
    if max_distance <= side // 2:
        raise ValueError(
            f"max_distance={max_distance}, but distances below {side // 2} have a "
            f"bucket each; pass more than {side // 2}"
        )


def relative_position_bucket(
    relative_position: Tensor,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Tensor:
    """Sort relative positions into buckets.

    Args:
        relative_position: int64, any shape: position of the key minus
            position of the query, negative to the left.
        bidirectional: True gives half of the buckets to each side (the
            encoder), False gives all to the left (the decoder).
        num_buckets: number of buckets of both sides together.
        max_distance: as in ``distance_bucket``.

    Returns:
        int64, the shape of ``relative_position``, below ``num_buckets``.

    Raises:
        ValueError: as ``check_buckets``.

    Source: paper, section 2.1; mesh-tensorflow, ``transformer_layers.py``.
    """
    check_buckets(bidirectional, num_buckets, max_distance)
    if not bidirectional:
        distance = (-relative_position).clamp(min=0)
        return distance_bucket(distance, num_buckets, max_distance)
    half = num_buckets // 2
    bucket = distance_bucket(relative_position.abs(), half, max_distance)
    return bucket + half * (relative_position > 0)


def spread(by_distance: Tensor, k_len: int) -> Tensor:
    """Give each pair the number of its relative position.

    Args:
        by_distance: ``[h n]``, a number for each relative position of the
            last ``q`` of ``k_len`` positions, ``n = q + k_len - 1``.
        k_len: number of keys ``k``.

    Returns:
        ``[1 h q k]``.
    """
    key = torch.arange(k_len, device=by_distance.device)
    q_len = by_distance.shape[1] - k_len + 1
    # The last query's first key stands first, the farthest to the left.
    first = torch.arange(q_len - 1, -1, -1, device=by_distance.device)
    return by_distance[:, first[:, None] + key[None, :]][None]


class RelativePositionBias(nn.Module):
    """One learned number per bucket and head, to add to attention scores.

    T5 shares one such table among all layers of a stack; UMT5 has one in
    each layer. Cross-attention has none.

    Args:
        heads: number of heads ``h``.
        num_buckets: rows of the table; default 32.
        max_distance: as in ``distance_bucket``; default 128.
        bidirectional: True for an encoder, False for a decoder.

    Raises:
        ValueError: as ``check_buckets``.

    Source: paper, section 2.1; initialisation of mesh-tensorflow and t5x,
    Glorot uniform.
    """

    def __init__(
        self,
        heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ):
        super().__init__()
        check_buckets(bidirectional, num_buckets, max_distance)
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.table = nn.Embedding(num_buckets, heads)
        nn.init.xavier_uniform_(self.table.weight)

    def by_distance(self, q_len: int, k_len: int) -> Tensor:
        """Look up each relative position that occurs, from left to right.

        The queries are the last ``q_len`` of ``k_len`` positions.

        Returns:
            ``[h n]`` with ``n = q_len + k_len - 1``.

        Raises:
            ValueError: if there are more queries than keys.
        """
        if q_len > k_len:
            raise ValueError(
                f"{q_len} queries can't be the last of {k_len} keys; "
                "pass q_len <= k_len"
            )
        # The last query has its farthest key k_len - 1 to the left, the first
        # one q_len - 1 to the right.
        relative_position = torch.arange(
            1 - k_len, q_len, device=self.table.weight.device
        )  # [n]
        bucket = relative_position_bucket(
            relative_position, self.bidirectional, self.num_buckets, self.max_distance
        )
        return rearrange(self.table(bucket), "n h -> h n")

    def forward(self, q_len: int, k_len: int) -> Tensor:
        """Look up the bias of the last ``q_len`` of ``k_len`` positions.

        Returns:
            ``[1 h q k]``, which broadcasts over the batch.

        Raises:
            ValueError: if there are more queries than keys.
        """
        return spread(self.by_distance(q_len, k_len), k_len)


# A bias for each of the ATTENTIONS that wants it in this shape.
POSITION_BIASES = {"plain": RelativePositionBias}
