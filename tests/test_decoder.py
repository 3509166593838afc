"""The decoder (chapter 10) against the decoder of ``transformers``."""

import pytest
import torch
from hugging_face import (
    LENGTHS,
    SIZES,
    difference,
    make_pair,
    padding_masks,
)
from stacks import (
    KINDS,
    SMALL,
    long,
    make_umt5_pair,
    record_dropouts,
    set_dropout,
    vectors,
    with_large_biases,
)
from torch import nn

from t5_book.decoder import BlockCache, Decoder, DecoderBlock
from t5_book.relative_position import RelativePositionBias


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


def assert_same(pair, x, memory, mask=None, memory_mask=None):
    """Ours and the reference agree at real tokens and at padding."""
    ours, reference = pair
    with torch.no_grad():
        theirs = reference(
            inputs_embeds=x,
            attention_mask=long(mask),
            encoder_hidden_states=memory,
            encoder_attention_mask=long(memory_mask),
            use_cache=False,
        ).last_hidden_state
        written = ours(x, memory, mask=mask, memory_mask=memory_mask)
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
    assert_same(pair, vectors(3, t), vectors(3, s, 1), memory_mask=mask)


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
    assert pair[0](x, memory, target, source).isfinite().all()
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
    decoder = Decoder(**SMALL).eval()
    memory, target = torch.randn(2, 10, 16), torch.randn(2, 10, 16)
    changed = target.clone()
    changed[:, 7] += 1.0
    mask = torch.ones(2, 10).bool()
    mask[:, 6:] = False
    before = decoder(target, memory, memory_mask=mask)
    after = decoder(changed, memory, memory_mask=mask)
    assert reached(before, after) == [7, 8, 9]


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_cutting_the_source_equals_masking_it(batch):
    decoder = Decoder(**SMALL).eval()
    memory, target = torch.randn(batch, 9, 16), torch.randn(batch, 9, 16)
    mask = torch.ones(batch, 9).bool()
    mask[:, 5:] = False
    masked = decoder(target, memory, memory_mask=mask)
    cut = decoder(target, memory[:, :5])
    assert torch.allclose(masked, cut, atol=1e-6)


def test_cutting_the_target_equals_masking_it():
    decoder = Decoder(**SMALL).eval()
    memory, target = torch.randn(2, 9, 16), torch.randn(2, 12, 16)
    mask = torch.ones(2, 12).bool()
    mask[:, :5] = False  # on the left, where causality does not help
    masked = decoder(target, memory, mask)[:, 5:]
    cut = decoder(target[:, 5:], memory)
    assert torch.allclose(masked, cut, atol=1e-6)


# --- Cache ----------------------------------------------------------------


def in_pieces(decoder, x, memory, sizes, mask=None, memory_mask=None):
    """Feed a target in pieces, with a cache; a mask covers all so far."""
    cache, written = decoder.new_cache(), []
    for piece in x.split(sizes, dim=1):
        k = cache[0].length + piece.shape[1]
        so_far = None if mask is None else mask[:, :k]
        written.append(decoder(piece, memory, so_far, memory_mask, cache))
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
    mask, memory_mask = padding_masks(3, 150), padding_masks(3, 10)
    with torch.no_grad():
        whole = decoder(x, memory, mask, memory_mask)
        pieces = in_pieces(decoder, x, memory, sizes, mask, memory_mask)
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
    decoder = Decoder(**SMALL)
    calls = []
    for block in decoder.blocks:
        block.cross_attention.k.register_forward_hook(
            lambda *call: calls.append(call)
        )
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    in_pieces(decoder, x, memory, 1)
    assert len(calls) == len(decoder.blocks)


def test_a_call_without_a_cache_leaves_nothing_behind():
    decoder = Decoder(**SMALL)
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    assert torch.equal(decoder(x, memory), decoder(x, memory))


def test_block_cache_keeps_the_order():
    cache, keys = BlockCache(), torch.arange(6.0).reshape(1, 1, 6, 1)
    assert cache.length == 0
    for piece in keys.split([2, 3, 1], dim=2):
        all_keys, all_values = cache.extend(piece, -piece)
    assert torch.equal(all_keys, keys) and torch.equal(all_values, -keys)
    assert cache.length == 6


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
    decoder = Decoder(**SMALL | {"depth": 1}, feed_forward=kind)
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
    decoder = Decoder(**SMALL | {"depth": 1}, dropout=0.1)
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


def test_mlp_mult_may_be_a_fraction():
    block = DecoderBlock(768, 2, 4, mlp_mult=8 / 3)
    assert block.feed_forward.wi.out_features == 2048


def test_the_sizes_of_the_bias_reach_it():
    stack = Decoder(**SMALL, num_buckets=8, max_distance=16)
    bias = RelativePositionBias(2, 8, 16, bidirectional=False)
    bias.load_state_dict(stack.biases[0].state_dict())
    assert torch.equal(stack.biases[0](40, 40), bias(40, 40))


def test_every_weight_gets_a_gradient():
    decoder = Decoder(**SMALL, bias_per_layer=True)
    written = decoder(torch.randn(2, 5, 16), torch.randn(2, 6, 16))
    written.square().sum().backward()
    for name, weight in decoder.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


# --- Errors ---------------------------------------------------------------


def refusal(*inputs, decoder=None, **more):
    """The text of the error with which inputs are refused."""
    decoder = decoder or Decoder(**SMALL)
    with pytest.raises(ValueError) as error:
        decoder(*inputs, **more)
    return str(error.value)


def test_a_source_mask_is_refused_as_a_target_mask():
    x, memory = torch.randn(2, 12, 16), torch.randn(2, 9, 16)
    text = refusal(x, memory, mask=torch.ones(2, 9).bool())
    assert "target mask has shape (2, 9)" in text
    assert "the target has shape (2, 12)" in text


def test_a_target_mask_is_refused_as_a_source_mask():
    x, memory = torch.randn(2, 12, 16), torch.randn(2, 9, 16)
    text = refusal(x, memory, memory_mask=torch.ones(2, 12).bool())
    assert "source mask has shape (2, 12)" in text
    assert "the source has shape (2, 9)" in text


def test_masks_of_pairs_say_what_masks_of_padding_say():
    decoder = Decoder(**SMALL).eval()
    x, memory = torch.randn(3, 9, 16), torch.randn(3, 7, 16)
    own, source = padding_masks(3, 9), padding_masks(3, 7)
    pairs = own[:, None].expand(3, 9, 9), source[:, None].expand(3, 9, 7)
    one = decoder(x, memory, own, source)
    assert torch.equal(one, decoder(x, memory, *pairs))


def test_each_target_token_has_rows_of_its_own():
    """Token 5 alone is blind to target token 3, token 6 to source token 2."""
    decoder = Decoder(**SMALL | {"depth": 1}).eval()
    x, memory = torch.randn(2, 9, 16), torch.randn(2, 7, 16)
    own, source = torch.ones(2, 9, 9).bool(), torch.ones(2, 9, 7).bool()
    own[1, 5, 3] = source[1, 6, 2] = False
    before = decoder(x, memory, own, source)
    moved, read = x.clone(), memory.clone()
    moved[:, 3] += 1.0
    read[:, 2] += 1.0
    same = (before == decoder(moved, memory, own, source)).all(dim=-1)
    assert same[:, 3:].nonzero().tolist() == [[1, 2]] and same[:, :3].all()
    same = (before == decoder(x, read, own, source)).all(dim=-1)
    assert same.nonzero().tolist() == [[1, 6]]


@pytest.mark.parametrize("name", ["mask", "memory_mask"])
@pytest.mark.parametrize("shape", [(2, 1, 5), (2, 5, 1), (2, 4, 6), (2, 6, 5)])
def test_a_mask_of_other_pairs_is_refused(name, shape):
    x, memory = torch.randn(2, 4, 16), torch.randn(2, 5, 16)
    if name == "mask":
        x = torch.randn(2, 5, 16)
    text = refusal(x, memory, **{name: torch.ones(shape).bool()})
    kind = "target" if name == "mask" else "source"
    assert f"{kind} mask has shape {shape}" in text
    assert f"{x.shape[1]} queries and 5 tokens" in text


def test_with_a_cache_the_mask_covers_all_tokens_so_far():
    decoder = Decoder(**SMALL)
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    cache = decoder.new_cache()
    decoder(x, memory, cache=cache)
    mask = torch.ones(2, 3).bool()
    text = refusal(x, memory, mask, decoder=decoder, cache=cache)
    assert "target mask has shape (2, 3)" in text
    assert "the target has shape (2, 6)" in text


@pytest.mark.parametrize("name", ["mask", "memory_mask"])
def test_a_mask_of_another_type_is_refused(name):
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    with pytest.raises(TypeError, match="torch.int64.*mask.bool"):
        Decoder(**SMALL)(x, memory, **{name: torch.ones(2, 5).long()})


@pytest.mark.parametrize("shape", [(2, 5, 17), (5, 16), (2, 0, 16)])
def test_a_sequence_of_another_shape_is_refused(shape):
    good, bad = torch.randn(2, 5, 16), torch.zeros(shape)
    assert f"target has shape {shape}" in refusal(bad, good)
    assert f"memory has shape {shape}" in refusal(good, bad)


def test_as_many_targets_as_sources():
    text = refusal(torch.randn(3, 5, 16), torch.randn(2, 9, 16))
    assert "target has 3 examples but memory has 2" in text


@pytest.mark.parametrize("shape", [(2, 8), (3, 9)])
def test_a_cache_for_another_source_is_refused(shape):
    decoder = Decoder(**SMALL)
    cache = decoder.new_cache()
    decoder(torch.randn(2, 1, 16), torch.randn(2, 9, 16), cache=cache)
    x, memory = torch.randn(shape[0], 1, 16), torch.randn(*shape, 16)
    text = refusal(x, memory, decoder=decoder, cache=cache)
    assert "holds a source of shape (2, 9)" in text
    assert f"memory has shape {shape}" in text


def test_a_cache_for_another_depth_is_refused():
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    text = refusal(x, memory, cache=[BlockCache()])
    assert "the cache is for 1 blocks but the decoder has 2" in text
