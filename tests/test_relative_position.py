"""Relative position bias against ``transformers`` and whole numbers."""

import pytest
import torch
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import T5Attention

from t5_book.attention import MultiHeadAttention
from t5_book.masks import causal_mask, expand_padding_mask
from t5_book.relative_position import (
    RelativePositionBias,
    check_buckets,
    distance_bucket,
    relative_position_bucket,
)
from tests.conftest import SIZES, difference, padding_masks

DIM, HEADS, DIM_HEAD = SIZES["dim"], SIZES["heads"], SIZES["dim_head"]
SETTINGS = [(32, 128), (16, 64), (32, 20), (8, 128), (20, 100), (64, 512)]
BOTH_WAYS = pytest.mark.parametrize("bidirectional", [True, False])


def make_pair(bidirectional, num_buckets=32, max_distance=128):
    """Ours and a layer of the reference, with the same large bias."""
    torch.manual_seed(0)
    config = ReferenceConfig(
        d_model=DIM,
        num_heads=HEADS,
        d_kv=DIM_HEAD,
        dropout_rate=0.0,
        is_decoder=not bidirectional,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
    )
    config._attn_implementation = "eager"
    reference = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    reference.relative_attention_bias.weight.data.normal_()
    ours = RelativePositionBias(HEADS, num_buckets, max_distance, bidirectional)
    ours.table.load_state_dict(reference.relative_attention_bias.state_dict())
    return ours, reference.eval()


def exact_bucket(distance, side_buckets, max_distance):
    """The bucket of a distance in whole numbers, which are not rounded."""
    exact = side_buckets // 2
    far = side_buckets - exact
    if distance < exact:
        return distance
    fits = [
        distance**far * exact**j >= max_distance**j * exact**far for j in range(far)
    ]
    return exact - 1 + sum(fits)


# --- Buckets --------------------------------------------------------------


@BOTH_WAYS
def test_buckets_agree_with_transformers(bidirectional):
    relative = torch.arange(-1200, 1201)
    for setting in SETTINGS:
        ours = relative_position_bucket(relative, bidirectional, *setting)
        theirs = T5Attention._relative_position_bucket
        assert torch.equal(ours, theirs(relative, bidirectional, *setting)), setting


@pytest.mark.parametrize("max_distance", [40, 64, 100, 128, 256, 512])
def test_buckets_equal_integer_arithmetic(max_distance):
    distance = torch.arange(2 * max_distance + 1)
    for side_buckets in (2, 3, 5, 8, 16, 20, 32, 64):
        setting = side_buckets, max_distance
        truth = [exact_bucket(n, *setting) for n in distance.tolist()]
        assert distance_bucket(distance, *setting).tolist() == truth, setting


def test_starts_of_the_released_setting():
    def starts(buckets):
        return [buckets.index(bucket) for bucket in sorted(set(buckets))]

    past = -torch.arange(1000)
    decoder = relative_position_bucket(past, bidirectional=False).tolist()
    encoder = relative_position_bucket(past).tolist()
    right = relative_position_bucket(-past).tolist()
    assert starts(decoder)[:16] == list(range(16))
    assert starts(decoder)[16:] == [
        16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113,
    ]  # fmt: skip
    assert starts(encoder) == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    assert right[0] == 0
    assert right[1:] == [16 + bucket for bucket in encoder[1:]]


def test_the_future_is_distance_zero_to_the_decoder():
    future = torch.arange(0, 300)
    assert (relative_position_bucket(future, bidirectional=False) == 0).all()


# --- Bias -----------------------------------------------------------------


@BOTH_WAYS
def test_bias_agrees_with_transformers(bidirectional):
    for setting in SETTINGS:
        ours, reference = make_pair(bidirectional, *setting)
        expected = reference.compute_bias(400, 400)
        assert ours(400, 400).shape == (1, HEADS, 400, 400)
        assert torch.equal(ours(400, 400), expected), setting


@BOTH_WAYS
def test_queries_are_the_last_positions(bidirectional):
    ours, reference = make_pair(bidirectional)
    for q_len, k_len in [(1, 1), (1, 140), (5, 9), (5, 140)]:
        past = k_len - q_len
        expected = reference.compute_bias(q_len, k_len, past_seen_tokens=past)
        assert torch.equal(ours(q_len, k_len), expected)
        assert torch.equal(ours(q_len, k_len), ours(k_len, k_len)[:, :, past:])


@torch.no_grad()
@BOTH_WAYS
@pytest.mark.parametrize("batch, length", [(3, 140), (9, 9), (HEADS, 10)])
def test_attention_with_bias_agrees(bidirectional, batch, length):
    """The reference computes its own bias; nothing is handed to it."""
    bias, reference = make_pair(bidirectional)
    attend = MultiHeadAttention(DIM, HEADS, DIM_HEAD)
    reference.load_state_dict(attend.state_dict(), strict=False)
    x = torch.randn(batch, length, DIM)
    mask = expand_padding_mask(padding_masks(batch, length))
    if not bidirectional:
        mask = mask & causal_mask(length, length)
    added = torch.finfo(x.dtype).min * (~mask).float()
    out = attend(x, attend.keys_values(x), mask, bias(length, length))
    assert difference(out, reference(x, added)[0]) <= 1e-5


def test_each_head_has_its_own_column():
    bias = RelativePositionBias(HEADS)
    weights = dict(bias.named_parameters())
    assert [tuple(w.shape) for w in weights.values()] == [(32, HEADS)]
    before = bias(9, 9)
    bias.table.weight.data[:, 2] += 1
    moved = (bias(9, 9) - before).abs().amax(dim=(0, 2, 3)) > 0.5
    assert moved.tolist() == [False, False, True, False]


def test_table_is_drawn_by_glorot():
    torch.manual_seed(0)
    weight = RelativePositionBias(heads=64).table.weight
    bound = (6 / (32 + 64)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.05


def test_used_rows_get_a_gradient_and_no_others():
    bias = RelativePositionBias(HEADS)
    bias(140, 140).sum().backward()
    used = bias.table.weight.grad.abs().sum(dim=1) > 0
    assert (~used).nonzero().flatten().tolist() == [16]


def test_buckets_stay_exact_in_half_precision():
    ours, half = RelativePositionBias(HEADS), RelativePositionBias(HEADS)
    half.load_state_dict(ours.state_dict())
    half.bfloat16()
    expected = ours(140, 140).bfloat16()
    assert torch.equal(half(140, 140), expected)
    torch.set_default_dtype(torch.bfloat16)  # what divided integers become
    try:
        assert torch.equal(half(140, 140), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiles_to_one_graph():
    bias = RelativePositionBias(HEADS)
    compiled = torch.compile(bias, fullgraph=True, backend="eager")
    assert torch.equal(compiled(9, 40), bias(9, 40))


# --- Errors ---------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, message",
    [
        ((True, 33, 128), "33.*even"),
        ((True, 2, 128), "2 leaves 1 .* 4 or more"),
        ((False, 1, 128), "1 leaves 1 .* 2 or more"),
        ((True, 32, 8), "max_distance=8.*more than 8"),
        ((False, 32, 16), "max_distance=16.*more than 16"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, message):
    bidirectional, num_buckets, max_distance = setting
    with pytest.raises(ValueError, match=message):
        check_buckets(*setting)
    with pytest.raises(ValueError, match=message):
        relative_position_bucket(torch.arange(3), *setting)
    with pytest.raises(ValueError, match=message):
        RelativePositionBias(HEADS, num_buckets, max_distance, bidirectional)


@pytest.mark.parametrize(
    "setting", [(True, 4, 2), (False, 2, 2), (False, 33, 128), (True, 32, 9)]
)
def test_the_smallest_settings_that_work(setting):
    buckets = relative_position_bucket(torch.arange(-300, 301), *setting)
    assert buckets.min() == 0 and buckets.max() == setting[1] - 1


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="5.*3"):
        RelativePositionBias(HEADS)(5, 3)
