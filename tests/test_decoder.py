"""The decoder against the decoder of ``transformers``."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from t5_book.decoder import Decoder
from t5_book.masks import causal_mask
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
    """Both decoders; a table large enough for a wrong bias to show."""
    model, reference = make_pair(request.param)
    return with_large_biases(model.decoder, reference.decoder)


@pytest.fixture(scope="module")
def umt5():
    """Both decoders with a bias table for each layer."""
    model, reference = make_umt5_pair()
    return with_large_biases(model.decoder, reference.decoder)


def assert_same(pair, x, memory, tgt_mask=None, src_mask=None):
    """Ours and the reference agree at real tokens and at padding."""
    ours, reference = pair
    with torch.no_grad():
        theirs = reference(
            inputs_embeds=x,
            attention_mask=long(tgt_mask),
            encoder_hidden_states=memory,
            encoder_attention_mask=long(src_mask),
            use_cache=False,
        ).last_hidden_state
        written = ours(x, memory, src_mask, tgt_mask)
        assert difference(written, theirs) <= 1e-5


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("s", LENGTHS)
def test_agrees_with_padding_in_source_and_target(pair, s, t):
    source, target = padding_masks(3, s), padding_masks(3, t).flip(0)
    assert_same(pair, vectors(3, t), vectors(3, s, 1), target, source)


@pytest.mark.parametrize("s, t", [(1, 9), (10, 1), (40, 140), (10, 10)])
def test_agrees_without_padding(pair, s, t):
    assert_same(pair, vectors(3, t), vectors(3, s, 1))


@pytest.mark.parametrize("s, t", [(10, 9), (9, 10), (10, 10)])
def test_agrees_with_padding_in_the_source_alone(pair, s, t):
    mask = padding_masks(3, s)
    assert_same(pair, vectors(3, t), vectors(3, s, 1), src_mask=mask)


@pytest.mark.parametrize(
    "batch, s, t",
    [(9, 9, 9), (9, 9, 5), (9, 5, 9), (40, 40, 40)],
    ids=["both", "source", "target", "both, long"],
)
def test_agrees_where_batch_equals_length(pair, batch, s, t):
    x, memory = vectors(batch, t), vectors(batch, s, 1)
    assert_same(
        pair, x, memory, padding_masks(batch, t), padding_masks(batch, s)
    )


@pytest.mark.parametrize("s, t", [(4, 4), (10, 7)])
def test_agrees_where_batch_equals_heads(pair, s, t):
    heads = SIZES["heads"]
    x, memory = vectors(heads, t), vectors(heads, s, 1)
    assert_same(
        pair, x, memory, padding_masks(heads, t), padding_masks(heads, s)
    )


def test_padding_alone_is_finite_and_agrees(pair):
    source, target = torch.ones(3, 9).bool(), torch.ones(3, 7).bool()
    source[0], target[1] = False, False
    x, memory = vectors(3, 7), vectors(3, 9, 1)
    assert pair[0](x, memory, source, target).isfinite().all()
    assert_same(pair, x, memory, target, source)


@pytest.mark.parametrize("s, t", [(9, 10), (10, 9), (40, 140), (10, 10)])
def test_bias_per_layer_agrees_with_umt5(umt5, s, t):
    assert len(umt5[0].biases) == SIZES["dec_depth"]
    source, target = padding_masks(3, s), padding_masks(3, t)
    assert_same(umt5, vectors(3, t), vectors(3, s, 1), target, source)


# --- Masks kept apart -----------------------------------------------------


def reached(before, after):
    """Positions of the first example whose vectors differ."""
    return (before != after)[0].any(dim=-1).nonzero().flatten().tolist()


def test_source_padding_hides_no_target_token():
    """Bug three: source and target of one length, padding at 6 to 9."""
    decoder = Decoder(small()).eval()
    memory, target = torch.randn(2, 10, 16), torch.randn(2, 10, 16)
    changed = target.clone()
    changed[:, 7] += 1.0
    mask = torch.ones(2, 10).bool()
    mask[:, 6:] = False
    before = decoder(target, memory, mask)
    after = decoder(changed, memory, mask)
    assert reached(before, after) == [7, 8, 9]


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_cutting_the_source_equals_masking_it(batch):
    decoder = Decoder(small()).eval()
    memory, target = torch.randn(batch, 9, 16), torch.randn(batch, 9, 16)
    mask = torch.ones(batch, 9).bool()
    mask[:, 5:] = False
    masked = decoder(target, memory, mask)
    cut = decoder(target, memory[:, :5])
    assert torch.allclose(masked, cut, atol=1e-6)


def test_cutting_the_target_equals_masking_it():
    decoder = Decoder(small()).eval()
    memory, target = torch.randn(2, 9, 16), torch.randn(2, 12, 16)
    mask = torch.ones(2, 12).bool()
    mask[:, :5] = False  # on the left, where causality does not help
    masked = decoder(target, memory, tgt_mask=mask)[:, 5:]
    cut = decoder(target[:, 5:], memory)
    assert torch.allclose(masked, cut, atol=1e-6)


# --- Cache ----------------------------------------------------------------


def in_pieces(decoder, x, memory, sizes, tgt_mask=None, src_mask=None):
    """Feed a target in pieces, with a cache; its mask covers all so far."""
    cache, written = decoder.new_cache(memory, src_mask), []
    for piece in x.split(sizes, dim=1):
        k = cache.length + piece.shape[1]
        so_far = None if tgt_mask is None else tgt_mask[:, :k]
        written.append(decoder(piece, tgt_mask=so_far, cache=cache))
    assert cache.length == x.shape[1]
    return torch.cat(written, dim=1)


@pytest.mark.parametrize(
    "sizes",
    [1, 7, [1, 149], [130, 1, 1, 1, 17], [150]],
    ids=["ones", "sevens", "first", "past 128", "whole"],
)
@pytest.mark.parametrize("each", [False, True], ids=["shared", "per layer"])
def test_pieces_equal_the_whole(pair, umt5, each, sizes):
    decoder, _ = umt5 if each else pair
    x, memory = vectors(3, 150), vectors(3, 10, 1)
    mask, src_mask = padding_masks(3, 150), padding_masks(3, 10)
    with torch.no_grad():
        whole = decoder(x, memory, src_mask, mask)
        pieces = in_pieces(decoder, x, memory, sizes, mask, src_mask)
    assert pieces.isfinite().all()
    assert difference(pieces[mask], whole[mask]) <= 1e-5


def test_pieces_equal_the_whole_of_the_reference(pair):
    ours, reference = pair
    x, memory = vectors(3, 150), vectors(3, 10, 1)
    with torch.no_grad():
        whole = reference(
            inputs_embeds=x, encoder_hidden_states=memory, use_cache=False
        ).last_hidden_state
        pieces = in_pieces(ours, x, memory, [1, 100, 29, 1, 19])
    assert difference(pieces, whole) <= 1e-5


def test_the_memory_is_projected_once():
    decoder = Decoder(small())
    calls = []
    for block in decoder.blocks:
        block.cross_attention.k.register_forward_hook(
            lambda *call: calls.append(call)
        )
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    in_pieces(decoder, x, memory, 1)
    assert len(calls) == len(decoder.blocks)


def test_a_call_without_a_cache_leaves_nothing_behind():
    decoder = Decoder(small())
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    assert torch.equal(decoder(x, memory), decoder(x, memory))


def test_rows_can_change_places_and_be_followed_twice():
    decoder = Decoder(small()).eval()
    x, memory = torch.randn(3, 4, 16), torch.randn(1, 5, 16).expand(3, -1, -1)
    cache, rows = decoder.new_cache(memory), torch.tensor([2, 0, 2])
    decoder(x[:, :3], cache=cache)
    cache.reorder(rows)
    after = decoder(x[:, 3:], cache=cache)
    whole = torch.cat([x[rows, :3], x[:, 3:]], dim=1)
    assert difference(after, decoder(whole, memory)[:, 3:]) <= 1e-5


def test_blocks_can_be_computed_twice():
    """``torch.utils.checkpoint`` forgets what is inside and computes it again."""
    decoder = Decoder(small())
    x = torch.randn(2, 6, 16, requires_grad=True)
    memory = torch.randn(2, 5, 16, requires_grad=True)
    mask, bias = causal_mask(6, 6), decoder.biases[0](6, 6).detach()
    block = decoder.blocks[0]
    again = checkpoint(block, x, memory, mask, None, bias, use_reentrant=False)
    slopes = torch.autograd.grad(again.square().sum(), (x, memory))
    plain = torch.autograd.grad(block(x, memory, mask, None, bias).square().sum(), (x, memory))
    for ours, theirs in zip(slopes, plain):
        assert difference(ours, theirs) <= 1e-5


def test_a_decoder_computes_its_blocks_twice():
    """Each block recomputed for the gradient, as to save memory in training."""
    decoder = Decoder(small())
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16, requires_grad=True)
    [plain] = torch.autograd.grad(decoder(x, memory).square().sum(), memory)
    for block in decoder.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    [again] = torch.autograd.grad(decoder(x, memory).square().sum(), memory)
    assert difference(again, plain) <= 1e-5


# --- Dropout --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_drops_what_the_reference_drops(kind):
    """From one seed both draw the same masks in the same order.

    A dropout too many, too few or at another place draws other masks.
    """
    model, reference = make_pair(kind)
    reference.set_attn_implementation("eager")
    ours, theirs = model.decoder.train(), reference.decoder.train()
    set_dropout(ours, 0.2)
    set_dropout(theirs, 0.2)
    x, memory = vectors(3, 10), vectors(3, 9, 1)
    torch.manual_seed(5)
    expected = theirs(
        inputs_embeds=x, encoder_hidden_states=memory, use_cache=False
    ).last_hidden_state
    torch.manual_seed(5)
    assert difference(ours(x, memory), expected) <= 1e-5


def dropouts(decoder):
    """Where the decoder of depth 1 drops, by the name of the place."""
    block = decoder.blocks[0]
    return {
        "both ends": decoder.dropout,
        "self-attention weights": block.self_attention.dropout,
        "cross-attention weights": block.cross_attention.dropout,
        "sublayer outputs": block.dropout,
        "hidden features": block.feed_forward.dropout,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_each_place_drops_alone(kind):
    decoder = Decoder(small(depth=1, feed_forward=kind))
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    quiet = decoder(x, memory)
    for part in dropouts(decoder).values():
        part.p = 0.5
        assert not torch.equal(decoder(x, memory), quiet)
        decoder.eval()
        assert torch.equal(decoder(x, memory), quiet)
        decoder.train()
        part.p = 0.0
    assert len(dropouts(decoder)) == sum(
        isinstance(part, nn.Dropout) for part in decoder.modules()
    )


def test_what_is_dropped_in_which_order():
    decoder = Decoder(small(depth=1, dropout=0.1))
    assert all(part.p == 0.1 for part in dropouts(decoder).values())
    calls = record_dropouts(dropouts(decoder))
    decoder(torch.randn(2, 5, 16), torch.randn(2, 6, 16))
    assert calls == [
        ("both ends", (2, 5, 16)),
        ("self-attention weights", (2, 2, 5, 5)),
        ("sublayer outputs", (2, 5, 16)),
        ("cross-attention weights", (2, 2, 5, 6)),
        ("sublayer outputs", (2, 5, 16)),
        ("hidden features", (2, 5, 64)),
        ("sublayer outputs", (2, 5, 16)),
        ("both ends", (2, 5, 16)),
    ]


# --- Sizes, gradients, compilation ----------------------------------------


def test_the_sizes_of_the_bias_reach_it():
    stack = Decoder(small(num_buckets=8, max_distance=16))
    bias = RelativePositionBias(2, 8, 16, bidirectional=False)
    bias.load_state_dict(stack.biases[0].state_dict())
    assert torch.equal(stack.biases[0](40, 40), bias(40, 40))


def test_every_weight_gets_a_gradient():
    decoder = Decoder(small(bias_per_layer=True))
    written = decoder(torch.randn(2, 5, 16), torch.randn(2, 6, 16))
    written.square().sum().backward()
    for name, weight in decoder.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


# --- Masks of pairs --------------------------------------------------------


def test_masks_of_pairs_say_what_masks_of_padding_say():
    decoder = Decoder(small()).eval()
    x, memory = torch.randn(3, 9, 16), torch.randn(3, 7, 16)
    own, source = padding_masks(3, 9), padding_masks(3, 7)
    pairs = own[:, None].expand(3, 9, 9), source[:, None].expand(3, 9, 7)
    one = decoder(x, memory, source, own)
    assert torch.equal(one, decoder(x, memory, pairs[1], pairs[0]))


def test_each_target_token_has_rows_of_its_own():
    """Token 5 alone is blind to target token 3, token 6 to source token 2."""
    decoder = Decoder(small(depth=1)).eval()
    x, memory = torch.randn(2, 9, 16), torch.randn(2, 7, 16)
    own, source = torch.ones(2, 9, 9).bool(), torch.ones(2, 9, 7).bool()
    own[1, 5, 3] = source[1, 6, 2] = False
    before = decoder(x, memory, source, own)
    moved, read = x.clone(), memory.clone()
    moved[:, 3] += 1.0
    read[:, 2] += 1.0
    same = (before == decoder(moved, memory, source, own)).all(dim=-1)
    assert same[:, 3:].nonzero().tolist() == [[1, 2]] and same[:, :3].all()
    same = (before == decoder(x, read, source, own)).all(dim=-1)
    assert same.nonzero().tolist() == [[1, 6]]
