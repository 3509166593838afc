"""RMSNorm: T5's layer normalisation, which rescales and never recentres.

Built in chapter 5, "Rescale without recentring" (chapters/rms_norm.md).
Edit the chapter, not this file.
"""

import torch
from torch import Tensor, nn

__all__ = [
    "RMSNorm",
]


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale its features.

    No mean is subtracted and no bias is added. The statistics are taken in
    float32 (in float64 for float64 input), whatever the type of the input.

    Args:
        dim: number of features ``d``.
        eps: added to the mean square, so that a vector of zeros stays
            finite; default 1e-6, as in every released T5.

    Built in chapter 5, "Rescale without recentring" (paper, section 2.1;
    Zhang and Sennrich 2019; code of mesh-tensorflow, ``transformer.py``).
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [... d]``; return ``[... d]``, typed as ``weight``.

        Raises:
            ValueError: if ``x`` does not have ``dim`` features.
        """
        dim = self.weight.shape[0]
        if x.shape[-1] != dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, whose last axis is not "
                f"the {dim} features of this RMSNorm; pass dim={dim} "
                "features, or build the norm with the dim of x"
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().mean(dim=-1, keepdim=True)  # [... 1]
        normed = wide * torch.rsqrt(mean_square + self.eps)
        return self.weight * normed.to(self.weight.dtype)
