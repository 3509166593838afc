"""Feed-forward layers: with a ReLU (T5 1.0) or a gated GELU (T5 1.1).

Built in chapter 8, "Feed-forward layers: computing on each token alone"
(chapters/feed_forward.md). Edit the chapter, not this file.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FeedForward", "GatedFeedForward"]


class FeedForward(nn.Module):
    """Map each token to hidden features, through a ReLU, and back (T5 1.0).

    Args:
        dim: features ``d`` of input and output.
        mlp_dim: hidden features ``f``.
        dropout: probability of dropping a hidden feature; default 0.

    Source: paper, section 2.1; initialisation of mesh-tensorflow,
    ``layers.py``.
    """

    def __init__(self, dim: int, mlp_dim: int, dropout: float = 0.0):
        super().__init__()
        self.wi = nn.Linear(dim, mlp_dim, bias=False)
        self.wo = nn.Linear(mlp_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.wi.weight, std=dim**-0.5)
        nn.init.normal_(self.wo.weight, std=mlp_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [... d]`` to ``[... d]``, each token by itself."""
        hidden = F.relu(self.wi(x))  # [... f]
        return self.wo(self.dropout(hidden))


class GatedFeedForward(nn.Module):
    """Let a GELU of one map gate another, and map back (T5 1.1).

    Args:
        dim: features ``d`` of input and output.
        mlp_dim: hidden features ``f``.
        dropout: probability of dropping a hidden feature; default 0.

    Source: Shazeer 2020; mesh-tensorflow, ``ops.py``, for the GELU in its
    tanh form.
    """

    def __init__(self, dim: int, mlp_dim: int, dropout: float = 0.0):
        super().__init__()
        self.wi_0 = nn.Linear(dim, mlp_dim, bias=False)
        self.wi_1 = nn.Linear(dim, mlp_dim, bias=False)
        self.wo = nn.Linear(mlp_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.wi_0.weight, std=dim**-0.5)
        nn.init.normal_(self.wi_1.weight, std=dim**-0.5)
        nn.init.normal_(self.wo.weight, std=mlp_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [... d]`` to ``[... d]``, each token by itself."""
        gate = F.gelu(self.wi_0(x), approximate="tanh")  # [... f]
        hidden = gate * self.wi_1(x)  # [... f]
        return self.wo(self.dropout(hidden))


# The feed-forward layers, by the names that T5's settings use.
FEED_FORWARDS = {"relu": FeedForward, "gated-gelu": GatedFeedForward}
