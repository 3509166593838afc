"""The encoder against the encoder stack of ``transformers``."""

import pytest
import torch
from torch import nn

from t5_book.encoder import Encoder
from t5_book.relative_position import RelativePositionBias
from tests.conftest import (
    KINDS,
    LENGTHS,
    SIZES,
    difference,
    long,
    make_pair,
    make_umt5_pair,
    padding_masks,
    record_dropouts,
    set_dropout,
    small,
    vectors,
    with_large_biases,
)


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """Both encoders; a table large enough for a wrong bias to show."""
    model, reference = make_pair(request.param)
    return with_large_biases(model.encoder, reference.encoder)


def assert_same(pair, x, mask=None):
    """Ours and the reference agree at real tokens and at padding."""
    ours, reference = pair
    with torch.no_grad():
        theirs = reference(
            inputs_embeds=x,
            attention_mask=long(mask),
        ).last_hidden_state
        assert difference(ours(x, mask), theirs) <= 1e-5


@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_without_padding(pair, length):
    assert_same(pair, vectors(3, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_padding_on_both_sides(pair, length):
    assert_same(pair, vectors(3, length), padding_masks(3, length))


@pytest.mark.parametrize("batch, length", [(9, 9), (40, 40)])
def test_agrees_where_batch_equals_length(pair, batch, length):
    assert_same(pair, vectors(batch, length), padding_masks(batch, length))


@pytest.mark.parametrize("length", [4, 10])
def test_agrees_where_batch_equals_heads(pair, length):
    heads = SIZES["heads"]
    assert_same(pair, vectors(heads, length), padding_masks(heads, length))


def test_a_source_of_padding_alone_is_finite_and_agrees(pair):
    mask = torch.ones(3, 9).bool()
    mask[1] = False
    assert pair[0](vectors(3, 9), mask).isfinite().all()
    assert_same(pair, vectors(3, 9), mask)


@pytest.mark.parametrize("length", LENGTHS)
def test_bias_per_layer_agrees_with_umt5(length):
    model, reference = make_umt5_pair()
    pair = with_large_biases(model.encoder, reference.encoder)
    assert len(model.encoder.biases) == SIZES["depth"]
    assert_same(pair, vectors(3, length), padding_masks(3, length))


# --- Dropout --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_drops_what_the_reference_drops(kind):
    """From one seed both draw the same masks in the same order.

    A dropout too many, too few or at another place draws other masks.
    """
    model, reference = make_pair(kind)
    reference.set_attn_implementation("eager")
    ours, theirs = model.encoder.train(), reference.encoder.train()
    set_dropout(ours, 0.2)
    set_dropout(theirs, 0.2)
    x, mask = vectors(3, 10), padding_masks(3, 10)
    torch.manual_seed(5)
    expected = theirs(inputs_embeds=x, attention_mask=mask.long())
    torch.manual_seed(5)
    assert difference(ours(x, mask), expected.last_hidden_state) <= 1e-5


def dropouts(encoder):
    """Where the encoder of depth 1 drops, by the name of the place."""
    block = encoder.blocks[0]
    return {
        "both ends": encoder.dropout,
        "attention weights": block.attention.dropout,
        "sublayer outputs": block.dropout,
        "hidden features": block.feed_forward.dropout,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_each_place_drops_alone(kind):
    encoder = Encoder(small(depth=1, feed_forward=kind))
    x = torch.randn(2, 5, 16)
    quiet = encoder(x)
    for part in dropouts(encoder).values():
        part.p = 0.5
        assert not torch.equal(encoder(x), quiet)
        encoder.eval()
        assert torch.equal(encoder(x), quiet)
        encoder.train()
        part.p = 0.0
    assert len(dropouts(encoder)) == sum(
        isinstance(part, nn.Dropout) for part in encoder.modules()
    )


def test_what_is_dropped_in_which_order():
    encoder = Encoder(small(depth=1, dropout=0.1))
    assert all(part.p == 0.1 for part in dropouts(encoder).values())
    calls = record_dropouts(dropouts(encoder))
    encoder(torch.randn(2, 5, 16))
    assert calls == [
        ("both ends", (2, 5, 16)),
        ("attention weights", (2, 2, 5, 5)),
        ("sublayer outputs", (2, 5, 16)),
        ("hidden features", (2, 5, 64)),
        ("sublayer outputs", (2, 5, 16)),
        ("both ends", (2, 5, 16)),
    ]


# --- Sizes, gradients, compilation ----------------------------------------


def test_the_sizes_of_the_bias_reach_it():
    stack = Encoder(small(num_buckets=8, max_distance=16))
    bias = RelativePositionBias(2, 8, 16)
    bias.load_state_dict(stack.biases[0].state_dict())
    assert torch.equal(stack.biases[0](40, 40), bias(40, 40))


def test_every_weight_gets_a_gradient():
    encoder = Encoder(small(bias_per_layer=True))
    encoder(torch.randn(2, 5, 16)).square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


# --- Masks of pairs --------------------------------------------------------


@pytest.mark.parametrize("batch, length", [(3, 9), (9, 9), (4, 10)])
def test_padding_may_be_told_pair_by_pair(batch, length):
    model, _ = make_pair()
    x, mask = vectors(batch, length), padding_masks(batch, length)
    pairs = mask[:, None].expand(-1, length, -1)
    with torch.no_grad():
        one, two = model.encoder(x, mask), model.encoder(x, pairs)
    assert torch.equal(one, two)


def test_each_query_has_a_row_of_its_own():
    """Query 2 alone is blind to token 4, and only in example 1."""
    encoder = Encoder(small(depth=1)).eval()
    pairs = torch.ones(3, 5, 5).bool()
    pairs[1, 2, 4] = False
    x = torch.randn(3, 5, 16)
    moved = x.clone()
    moved[:, 4] += 1.0
    before, after = encoder(x, pairs), encoder(moved, pairs)
    same = (before == after).all(dim=-1)
    assert same.nonzero().tolist() == [[1, 2]]
