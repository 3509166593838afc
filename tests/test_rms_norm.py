"""RMSNorm against the norm of ``transformers`` and PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5LayerNorm

from t5_book.rms_norm import RMSNorm
from tests.conftest import SIZES, difference

DIM = SIZES["dim"]


@pytest.fixture
def pair():
    """Ours and the reference with the same random gains."""
    ours, reference = RMSNorm(DIM), T5LayerNorm(DIM)
    nn.init.normal_(ours.weight, mean=1.0, std=0.3)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 1e3])
def test_agrees_with_transformers(pair, size):
    ours, reference = pair
    noise = torch.randn(3, 9, DIM)
    # At 1e-3 eps is half of what is under the root.
    for x in (size * noise, size * (2 + 3 * noise)):
        assert difference(ours(x), reference(x)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_agrees_in_half_precision(pair, dtype):
    ours, reference = pair
    x = (300 * torch.randn(3, 9, DIM)).to(dtype)  # squares overflow float16
    assert ours(x).dtype == torch.float32  # that of the gains
    assert difference(ours(x), reference(x)) <= 1e-6
    ours, reference = ours.to(dtype), reference.to(dtype)
    assert ours(x).dtype == dtype
    step = torch.finfo(dtype).eps  # transformers rounds once more or less
    assert difference(ours(x).float(), reference(x).float()) <= 2 * step


def test_float64_has_statistics_in_float64():
    x = torch.randn(3, 9, DIM, dtype=torch.float64)
    for eps in (1e-6, 1e-2):
        expected = F.rms_norm(x, (DIM,), eps=eps)
        assert difference(RMSNorm(DIM, eps).double()(x), expected) <= 1e-14


def test_a_vector_of_zeros_stays_zero_and_has_a_gradient():
    x = torch.zeros(1, DIM, requires_grad=True)
    out = RMSNorm(DIM)(x)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all()
