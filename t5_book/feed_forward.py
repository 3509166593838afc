"""Feed-forward layers: with a ReLU (T5 1.0) or a gated GELU (T5 1.1).

Built in chapter 8, "Think about each token alone"
(chapters/feed_forward.md). Edit the chapter, not this file.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "FEED_FORWARDS",
    "FeedForward",
    "GatedFeedForward",
    "make_feed_forward",
]


class FeedForward(nn.Module):
    """Map each token to hidden units, through a ReLU, and back (T5 1.0).

    Args:
        dim: features ``d`` of input and output.
        dim_hidden: number of hidden units.
        dropout: probability of dropping a hidden unit; default 0.

    Built in chapter 8, "Think about each token alone" (paper, section 2.1;
    initialisation of mesh-tensorflow, ``layers.py``).
    """

    def __init__(self, dim: int, dim_hidden: int, dropout: float = 0.0):
        super().__init__()
        self.wi = nn.Linear(dim, dim_hidden, bias=False)
        self.wo = nn.Linear(dim_hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.wi.weight, std=dim**-0.5)
        nn.init.normal_(self.wo.weight, std=dim_hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``x [... d]`` to ``[... d]``, each token alone."""
        return self.wo(self.dropout(F.relu(self.wi(x))))


class GatedFeedForward(nn.Module):
    """Let a GELU of one map gate another, and map back (T5 1.1).

    Args:
        dim: features ``d`` of input and output.
        dim_hidden: number of hidden units.
        dropout: probability of dropping a hidden unit; default 0.

    Built in chapter 8, "Think about each token alone" (Shazeer 2020; code
    of mesh-tensorflow, ``ops.py``: GELU in its tanh form).
    """

    def __init__(self, dim: int, dim_hidden: int, dropout: float = 0.0):
        super().__init__()
        self.wi_0 = nn.Linear(dim, dim_hidden, bias=False)
        self.wi_1 = nn.Linear(dim, dim_hidden, bias=False)
        self.wo = nn.Linear(dim_hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.wi_0.weight, std=dim**-0.5)
        nn.init.normal_(self.wi_1.weight, std=dim**-0.5)
        nn.init.normal_(self.wo.weight, std=dim_hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``x [... d]`` to ``[... d]``, each token alone."""
        gate = F.gelu(self.wi_0(x), approximate="tanh")
        return self.wo(self.dropout(gate * self.wi_1(x)))


# The kinds of feed-forward layers, by the names that T5's settings use.
FEED_FORWARDS = {"relu": FeedForward, "gated-gelu": GatedFeedForward}


def make_feed_forward(
    kind: str, dim: int, mlp_mult: float, dropout: float = 0.0
) -> nn.Module:
    """Make the feed-forward layer of a block.

    Args:
        kind: "relu" (T5 1.0) or "gated-gelu" (T5 1.1).
        dim: features of input and output.
        mlp_mult: hidden units per feature; may be a fraction. The number
            of hidden units is ``round(dim * mlp_mult)``.
        dropout: probability of dropping a hidden unit; default 0.

    Raises:
        ValueError: if the kind is unknown, or no hidden unit is left.

    Built in chapter 8, "Think about each token alone".
    """
    if kind not in FEED_FORWARDS:
        known = " or ".join(repr(name) for name in FEED_FORWARDS)
        raise ValueError(f"no feed-forward layer {kind!r}; pass {known}")
    dim_hidden = round(dim * mlp_mult)
    if dim_hidden < 1:
        raise ValueError(
            f"mlp_mult={mlp_mult} times dim={dim} is {dim_hidden} hidden "
            "units; pass a larger mlp_mult"
        )
    return FEED_FORWARDS[kind](dim, dim_hidden, dropout)
