"""Relative position bias against ``transformers`` and whole numbers."""

import pytest
import torch
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import T5Attention

from t5_book.relative_position import (
    RelativePositionBias,
    check_buckets,
    distance_bucket,
    relative_position_bucket,
)
from tests.conftest import refuses

HEADS = 4
SETTINGS = [(32, 128), (16, 64), (32, 20), (8, 128), (20, 100), (64, 512)]

# --- Buckets --------------------------------------------------------------


def exact_bucket(distance, side_buckets, max_distance):
    """The bucket of a distance in whole numbers, which are not rounded."""
    exact = side_buckets // 2
    far = side_buckets - exact
    if distance < exact:
        return distance
    fits = [distance**far * exact**j >= max_distance**j * exact**far for j in range(far)]
    return exact - 1 + sum(fits)


@pytest.mark.parametrize("max_distance", [40, 64, 100, 128, 256, 512])
def test_buckets_equal_integer_arithmetic(max_distance):
    distance = torch.arange(2 * max_distance + 1)
    for side_buckets in (2, 3, 5, 8, 16, 20, 32, 64):
        setting = side_buckets, max_distance
        truth = [exact_bucket(n, *setting) for n in distance.tolist()]
        assert distance_bucket(distance, *setting).tolist() == truth, setting


def test_starts_of_the_released_setting():
    past = -torch.arange(1000)
    decoder = relative_position_bucket(past, bidirectional=False).tolist()
    encoder = relative_position_bucket(past).tolist()
    right = relative_position_bucket(-past).tolist()
    far = [19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert [decoder.index(bucket) for bucket in range(32)] == [*range(17), *far]
    far = [12, 16, 23, 32, 46, 64, 91]
    assert [encoder.index(bucket) for bucket in range(16)] == [*range(9), *far]
    assert right == [0, *[16 + bucket for bucket in encoder[1:]]]


@pytest.mark.parametrize(
    "setting, words",
    [
        ((True, 33, 128), [33, "even"]),
        ((True, 2, 128), [2, "leaves 1 ", "4 or more"]),
        ((False, 1, 128), [1, "leaves 1 ", "2 or more"]),
        ((True, 32, 8), ["max_distance=8", "more than 8"]),
        ((False, 32, 16), ["max_distance=16", "more than 16"]),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, words):
    bidirectional, *sizes = setting
    refuses(lambda: check_buckets(*setting), *words)
    refuses(lambda: relative_position_bucket(torch.arange(3), *setting), *words)
    refuses(lambda: RelativePositionBias(HEADS, *sizes, bidirectional), *words)


def test_the_smallest_settings_that_work():
    for setting in [(True, 4, 2), (False, 2, 2), (False, 33, 128), (True, 32, 9)]:
        buckets = relative_position_bucket(torch.arange(-300, 301), *setting)
        assert buckets.min() == 0 and buckets.max() == setting[1] - 1, setting


# --- Bias -----------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_agrees_with_transformers(bidirectional, setting):
    buckets, max_distance = setting
    config = ReferenceConfig(num_heads=HEADS, is_decoder=not bidirectional)
    config.relative_attention_num_buckets = buckets
    config.relative_attention_max_distance = max_distance
    reference = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    reference.relative_attention_bias.weight.data.normal_()
    ours = RelativePositionBias(HEADS, *setting, bidirectional)
    ours.table.load_state_dict(reference.relative_attention_bias.state_dict())
    relative = torch.arange(-1200, 1201)
    theirs = reference._relative_position_bucket(relative, bidirectional, *setting)
    assert torch.equal(relative_position_bucket(relative, bidirectional, *setting), theirs)
    assert torch.equal(ours(400, 400), reference.compute_bias(400, 400))
    # The queries are the last of the positions.
    for q_len, k_len in [(1, 1), (1, 140), (5, 9), (5, 140)]:
        past = k_len - q_len
        expected = reference.compute_bias(q_len, k_len, past_seen_tokens=past)
        assert torch.equal(ours(q_len, k_len), expected)


def test_buckets_stay_exact_in_half_precision():
    bias = RelativePositionBias(HEADS)
    expected = bias(140, 140).bfloat16()
    assert torch.equal(bias.bfloat16()(140, 140), expected)
    torch.set_default_dtype(torch.bfloat16)  # what divided integers become
    try:
        assert torch.equal(bias(140, 140), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_more_queries_than_keys_are_refused():
    refuses(lambda: RelativePositionBias(HEADS)(5, 3), 5, 3)
