"""Masks and attention against ``transformers``."""

import pytest
import torch
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import T5Attention

from t5_book.attention import MultiHeadAttention, attention_weights
from t5_book.masks import causal_mask, expand_padding_mask
from tests.conftest import SIZES, difference, padding_masks, refuses

DIM, HEADS, DIM_HEAD = SIZES["dim"], SIZES["heads"], SIZES["dim_head"]

# --- Attention ------------------------------------------------------------


# A mask that broadcasts along the wrong axes fits by accident where the batch is
# as large as the length or the number of heads.
@torch.no_grad()
@pytest.mark.parametrize(
    "batch, q_len, k_len",
    [(3, 1, 1), (3, 40, 40), (9, 9, 9), (HEADS, 10, 10), (3, 140, 140)]
    + [(3, 7, 40), (9, 7, 9), (HEADS, 1, 9)],
)
def test_agrees_with_transformers(batch, q_len, k_len):
    """The reference adds its mask; the first rows may see nothing at all."""
    config = ReferenceConfig(d_model=DIM, num_heads=HEADS, d_kv=DIM_HEAD)
    config._attn_implementation = "eager"
    # Both as they are in training: by default ours drops nothing.
    ours, reference = MultiHeadAttention(DIM, HEADS, DIM_HEAD), T5Attention(config, layer_idx=0)
    for weight in ours.parameters():
        weight.data *= 1.5  # scores large enough for a wrong mask to show
    reference.load_state_dict(ours.state_dict())
    x, context = torch.randn(batch, q_len, DIM), torch.randn(batch, k_len, DIM)
    padding = expand_padding_mask(padding_masks(batch, k_len))
    causal = causal_mask(q_len, k_len)
    pairs = expand_padding_mask(torch.rand(batch, q_len, k_len) < 0.5)
    for mask in (None, padding, causal, causal & padding, pairs):
        for bias in (None, torch.randn(1, HEADS, q_len, k_len)):
            added = None if mask is None else torch.finfo(x.dtype).min * (~mask).float()
            expected = reference.eval()(x, added, context, position_bias=bias)[0]
            out = ours(x, ours.keys_values(context), mask, bias)
            assert difference(out, expected) <= 1e-5


def test_hidden_keys_get_nothing_at_all():
    mask = expand_padding_mask(padding_masks(3, 9))
    q, k = torch.randn(2, 3, HEADS, 9, 8)
    weights = attention_weights(q, k, mask, 100 * torch.randn(1, HEADS, 9, 9))
    assert (weights.masked_select(~mask) == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(3, HEADS, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_only_once(dtype):
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    k = torch.zeros(1, 1, 3000, 8, dtype=dtype)
    score = torch.randn(1, 1, 1, 3000).to(dtype)
    weights = attention_weights(q, k, bias=score)
    exact, info = score.double().softmax(dim=-1), torch.finfo(dtype)
    # Half a unit in the last place, and a little more: computed in float32,
    # a number midway between two may round either way.
    most = exact.clamp(min=info.smallest_normal) * info.eps / 2 * 1.001
    assert weights.dtype == dtype
    assert ((weights - exact).abs() <= most).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_without_any_key_attends_evenly(dtype):
    # Were the lowest number added, float16 would reach minus infinity.
    bias = torch.linspace(-40, -20, 9, dtype=dtype)
    q = torch.zeros(3, HEADS, 9, 8, dtype=dtype)
    nothing = torch.zeros(3, 1, 1, 9, dtype=torch.bool)
    weights = attention_weights(q, q, nothing, bias)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 9))


# --- Masks ----------------------------------------------------------------


def test_masks_are_expanded():
    mask, pairs = padding_masks(3, 40), torch.rand(3, 7, 40) < 0.5
    assert expand_padding_mask(mask).tolist() == mask[:, None, None].tolist()
    assert expand_padding_mask(pairs).tolist() == pairs[:, None].tolist()


def test_causal_mask_by_loop():
    for k_len in (1, 9, 40):
        for q_len in {1, (k_len + 1) // 2, k_len}:
            mask = causal_mask(q_len, k_len)
            positions = range(k_len - q_len, k_len)  # the last ones
            expected = [[k <= q for k in range(k_len)] for q in positions]
            assert mask.dtype == torch.bool
            assert mask.tolist() == [[expected]]


def test_wrong_masks_are_refused():
    for dtype in (torch.long, torch.uint8, torch.float32):
        mask = torch.ones(2, 5, dtype=dtype)
        refuses(lambda: expand_padding_mask(mask), dtype, error=TypeError)
    for shape in [(5,), (2, 1, 1, 5)]:
        mask = torch.ones(shape).bool()
        refuses(lambda: expand_padding_mask(mask), shape)
    refuses(lambda: causal_mask(4, 3), 4, 3)
