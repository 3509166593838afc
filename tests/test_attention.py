"""Masks and attention against ``transformers`` and PyTorch."""

import pytest
import torch
from torch.nn import functional as F
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import T5Attention

from t5_book.attention import MultiHeadAttention, attention_weights
from t5_book.masks import causal_mask, expand_padding_mask
from tests.conftest import SIZES, difference, padding_masks

DIM, HEADS, DIM_HEAD = SIZES["dim"], SIZES["heads"], SIZES["dim_head"]
# A mask that broadcasts along the wrong axes fits by accident where the batch is
# as large as the length or the number of heads.
SHAPES = [(3, 1), (3, 40), (9, 9), (HEADS, 10), (3, 140)]
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(scope="module")
def pair():
    """Ours and the reference with the same random weights."""
    torch.manual_seed(0)
    config = ReferenceConfig(
        d_model=DIM, num_heads=HEADS, d_kv=DIM_HEAD, dropout_rate=0.0
    )
    config._attn_implementation = "eager"
    ours = MultiHeadAttention(DIM, HEADS, DIM_HEAD)
    for weight in ours.parameters():
        weight.data *= 1.5  # scores large enough for a wrong mask to show
    reference = T5Attention(config, layer_idx=0)
    reference.load_state_dict(ours.state_dict())
    return ours.eval(), reference.eval()


@torch.no_grad()
def assert_same(pair, x, context, mask=None, bias=None):
    """Ours and the reference agree; the reference adds its mask."""
    ours, reference = pair
    added = None if mask is None else LOWEST * (~mask).float()
    states = None if context is x else context
    expected = reference(x, added, states, position_bias=bias)[0]
    out = ours(x, ours.keys_values(context), mask, bias)
    assert out.shape == x.shape
    assert difference(out, expected) <= 1e-5


# --- Agreement ------------------------------------------------------------


@pytest.mark.parametrize("batch, length", SHAPES)
def test_self_attention_agrees(pair, batch, length):
    x = torch.randn(batch, length, DIM)
    bias = torch.randn(1, HEADS, length, length)
    padding = expand_padding_mask(padding_masks(batch, length))
    causal = causal_mask(length, length)
    pairs = torch.rand(batch, length, length) < 0.5
    # Left padding and the future: the first rows may see nothing at all.
    for mask in (None, padding, causal, causal & padding, expand_padding_mask(pairs)):
        assert_same(pair, x, x, mask)
        assert_same(pair, x, x, mask, bias)


@pytest.mark.parametrize("batch, q_len, k_len", [(3, 7, 40), (9, 7, 9), (HEADS, 1, 9)])
def test_cross_attention_agrees(pair, batch, q_len, k_len):
    x = torch.randn(batch, q_len, DIM)
    context = torch.randn(batch, k_len, DIM)
    pairs = torch.rand(batch, q_len, k_len) < 0.5
    for mask in (padding_masks(batch, k_len), pairs):
        assert_same(pair, x, context, expand_padding_mask(mask))


def test_agrees_with_pytorch_at_scale_one(pair):
    ours, _ = pair
    x, context = torch.randn(3, 7, DIM), torch.randn(3, 40, DIM)
    mask = expand_padding_mask(padding_masks(3, 40))
    keys, values = ours.keys_values(context)
    queries = ours.split_heads(ours.q(x))
    expected = F.scaled_dot_product_attention(queries, keys, values, mask, scale=1.0)
    expected = ours.o(expected.transpose(1, 2).flatten(2))
    assert difference(ours(x, (keys, values), mask), expected) <= 1e-5


def test_agrees_with_loops():
    """One number at a time, with nothing that could broadcast."""
    q, k = torch.randn(2, HEADS, 5, 3), torch.randn(2, HEADS, 6, 3)
    mask, bias = padding_masks(2, 6), torch.randn(1, HEADS, 5, 6)
    weights = attention_weights(q, k, expand_padding_mask(mask), bias)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, HEADS, 5))):
        scores = [q[b, h, i] @ k[b, h, j] + bias[0, h, i, j] for j in range(6)]
        shares = [s.exp() * m for s, m in zip(scores, mask[b], strict=True)]
        expected = torch.stack(shares) / sum(shares)
        assert torch.allclose(weights[b, h, i], expected, atol=1e-6)


# --- Properties -----------------------------------------------------------


@pytest.mark.parametrize("batch", [3, 9, HEADS])
def test_padding_does_not_change_the_result(pair, batch):
    ours, _ = pair
    x, mask = torch.randn(batch, 9, DIM), padding_masks(batch, 9)
    out = ours(x, ours.keys_values(x), expand_padding_mask(mask))
    for row in range(batch):
        alone = x[row : row + 1, mask[row]]
        alone = ours(alone, ours.keys_values(alone))
        assert torch.allclose(out[row, mask[row]], alone[0], atol=1e-5)


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


def test_weights_are_drawn_as_t5_draws_them():
    torch.manual_seed(0)
    drawn = MultiHeadAttention(dim=512, heads=6, dim_head=64)
    expected = {
        "q.weight": (512 * 64) ** -0.5,
        "k.weight": 512**-0.5,
        "v.weight": 512**-0.5,
        "o.weight": (6 * 64) ** -0.5,
    }
    weights = dict(drawn.named_parameters())
    assert set(weights) == set(expected)  # and no bias
    for name, std in expected.items():
        assert abs(weights[name].std() / std - 1) < 0.01, name


def test_dropout_falls_on_the_weights():
    torch.manual_seed(0)
    attend = MultiHeadAttention(8, 1, 8, dropout=0.5)
    x = torch.randn(1, 400, 8)
    for projection in (attend.v, attend.o):
        torch.nn.init.eye_(projection.weight)
    itself = torch.full((1, 1, 400, 400), -1e4)
    itself[0, 0].fill_diagonal_(1e4)  # every token attends to itself
    out = attend(x, attend.keys_values(x), bias=itself)
    dropped = (out == 0).all(dim=-1)
    assert torch.allclose(out, 2 * x * ~dropped[..., None])
    assert 120 < dropped.sum() < 280
    attend.eval()
    assert torch.allclose(attend(x, attend.keys_values(x), bias=itself), x)


# --- Masks ----------------------------------------------------------------


def test_masks_are_expanded():
    mask = padding_masks(3, 40)
    expanded = expand_padding_mask(mask)
    assert expanded.shape == (3, 1, 1, 40)
    assert torch.equal(expanded[:, 0, 0], mask)
    pairs = torch.rand(3, 7, 40) < 0.5
    expanded = expand_padding_mask(pairs)
    assert expanded.shape == (3, 1, 7, 40)
    assert torch.equal(expanded[:, 0], pairs)


def test_causal_mask_by_loop():
    for k_len in (1, 9, 40):
        for q_len in {1, (k_len + 1) // 2, k_len}:
            mask = causal_mask(q_len, k_len)
            positions = range(k_len - q_len, k_len)  # the last ones
            expected = [[k <= q for k in range(k_len)] for q in positions]
            assert mask.dtype == torch.bool
            assert mask.shape == (1, 1, q_len, k_len)
            assert mask[0, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.long, torch.uint8, torch.float32])
def test_a_mask_of_another_dtype_is_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        expand_padding_mask(torch.ones(2, 5, dtype=dtype))


@pytest.mark.parametrize("shape", [(5,), (2, 1, 1, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError) as error:
        expand_padding_mask(torch.ones(shape, dtype=torch.bool))
    assert str(shape) in str(error.value)


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="4.*3"):
        causal_mask(4, 3)
