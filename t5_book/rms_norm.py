"""RMSNorm: T5's layer normalisation, which rescales and never recentres.

Built in chapter 5, "RMSNorm: layer normalisation without the mean"
(chapters/rms_norm.md). Edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale its features.

    No mean is subtracted and no bias is added. The statistics are taken in
    float32 (in float64 for float64 input), whatever the dtype of the input.

    Args:
        dim: number of features ``d``.
        eps: added to the mean square, so that a vector of zeros stays
            finite; default 1e-6, as in every released T5.

    Source: paper, section 2.1; Zhang and Sennrich 2019; t5x, ``layers.py``.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [... d]``; return ``[... d]`` in the dtype of ``weight``."""
        # In float16 the square of 300 is infinite, and that of 0.0001 is zero.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().mean(dim=-1, keepdim=True)  # [... 1]
        normed = wide * torch.rsqrt(mean_square + self.eps)
        return self.weight * normed.to(self.weight.dtype)
