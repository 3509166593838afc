"""RMSNorm against the norm of ``transformers`` and PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5LayerNorm

from t5_book.rms_norm import RMSNorm
from tests.conftest import SIZES, difference

DIM = SIZES["dim"]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.fixture
def pair():
    """Ours and the reference with the same random gains."""
    torch.manual_seed(0)
    ours, reference = RMSNorm(DIM), T5LayerNorm(DIM)
    nn.init.normal_(ours.weight, mean=1.0, std=0.3)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


# --- Agreement ------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 1e3])
def test_agrees_with_transformers(pair, size):
    ours, reference = pair
    x = size * (2 + 3 * torch.randn(3, 9, DIM))  # the mean is not zero
    assert difference(ours(x), reference(x)) <= 1e-6


def test_agrees_where_epsilon_counts(pair):
    ours, reference = pair
    x = 1e-3 * torch.randn(3, 9, DIM)  # eps is half of what is under the root
    assert difference(ours(x), reference(x)) <= 1e-6
    assert difference(ours(x), RMSNorm(DIM, eps=1e-8)(x)) > 0.1


@HALVES
def test_agrees_in_half_precision(pair, dtype):
    ours, reference = (norm.to(dtype) for norm in pair)
    x = (300 * torch.randn(3, 9, DIM)).to(dtype)  # squares overflow float16
    assert ours(x).dtype == dtype
    step = torch.finfo(dtype).eps  # transformers rounds once more or less
    assert difference(ours(x).float(), reference(x).float()) <= 2 * step


@HALVES
def test_agrees_with_float32_gains_on_half_precision_input(pair, dtype):
    ours, reference = pair
    x = torch.randn(3, 9, DIM).to(dtype)
    assert ours(x).dtype == torch.float32
    assert difference(ours(x), reference(x)) <= 1e-6


def test_float64_has_statistics_in_float64():
    x = torch.randn(3, 9, DIM, dtype=torch.float64)
    expected = F.rms_norm(x, (DIM,), eps=1e-6)
    assert difference(RMSNorm(DIM).double()(x), expected) <= 1e-14


# --- Properties -----------------------------------------------------------


def test_starts_with_gains_of_one_and_nothing_else():
    weights = dict(RMSNorm(DIM).named_parameters())
    assert list(weights) == ["weight"]
    assert torch.equal(weights["weight"], torch.ones(DIM))


def test_a_vector_of_zeros_stays_zero_and_has_a_gradient():
    x = torch.zeros(1, DIM, requires_grad=True)
    out = RMSNorm(DIM)(x)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all()


def test_gradients_are_right():
    norm = RMSNorm(5).double()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


def test_each_token_is_on_its_own(pair):
    ours, _ = pair
    x = torch.randn(3, 9, DIM)
    changed = x.clone()
    changed[1, 4] = 99.0
    same = (ours(x) == ours(changed)).all(dim=-1)
    assert same.sum() == 26 and not same[1, 4]
