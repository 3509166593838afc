"""Encoder and decoder against those of ``transformers``; masks of pairs; the cache."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.conftest import (
    LENGTHS,
    SIZES,
    difference,
    make_family,
    padding_masks,
    seeded,
    small_t5,
)

BUCKETS = dict(relative_attention_num_buckets=20, relative_attention_max_distance=100)
KINDS = {"t5": {}, "t5-v1_1": BUCKETS, "umt5": dict(num_layers=2)}  # two tables
SHAPES = [(3, s, t) for s in LENGTHS for t in LENGTHS]
# Batches as large as a length or as the number of heads
SHAPES += [(9, 9, 9), (9, 9, 5), (9, 5, 9), (40, 40, 40), (4, 4, 4), (4, 10, 7)]


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """Ours and the reference: ReLU; gated, other buckets; a bias for each layer."""
    return make_family(request.param, **KINDS[request.param])


def vectors(batch, length, seed=0):
    """Vectors as an embedding or an encoder gives them."""
    return torch.randn(batch, length, SIZES["dim"], generator=seeded(seed))


@torch.no_grad()
@pytest.mark.parametrize("batch, s, t", SHAPES)
def test_stacks_agree_at_real_tokens_and_at_padding(pair, batch, s, t):
    ours, reference = pair
    x, memory = vectors(batch, t), vectors(batch, s, 1)
    mask, own = padding_masks(batch, s), padding_masks(batch, t).flip(0)
    theirs = reference.encoder(inputs_embeds=memory, attention_mask=mask.long())
    assert difference(ours.encoder(memory, mask), theirs.last_hidden_state) <= 1e-5
    for tgt_mask in (None, own):
        theirs = reference.decoder(
            inputs_embeds=x,
            attention_mask=None if tgt_mask is None else tgt_mask.long(),
            encoder_hidden_states=memory,
            encoder_attention_mask=mask.long(),
            use_cache=False,
        ).last_hidden_state
        assert difference(ours.decoder(x, memory, mask, tgt_mask), theirs) <= 1e-5


# --- Masks of pairs -------------------------------------------------------


def unmoved(call, x, position):
    """Example and place of each vector that a change of ``x`` leaves as it is."""
    moved = x.clone()
    moved[:, position] += 1.0
    return (call(x) == call(moved)).all(dim=-1).nonzero().tolist()


def test_each_query_has_a_row_of_its_own():
    """In example 1 alone a token does not see another."""
    model, x, memory = small_t5(), torch.randn(3, 9, 16), torch.randn(3, 7, 16)
    encode, own = torch.ones(3, 7, 7).bool(), torch.ones(3, 9, 9).bool()
    cross = torch.ones(3, 9, 7).bool()
    encode[1, 2, 4] = own[1, 5, 3] = cross[1, 6, 2] = False
    assert unmoved(lambda memory: model.encoder(memory, encode), memory, 4) == [[1, 2]]
    before = [[row, place] for row in range(3) for place in range(3)]  # the past
    still = unmoved(lambda x: model.decoder(x, memory, cross, own), x, 3)
    assert still == sorted([*before, [1, 5]])
    still = unmoved(lambda memory: model.decoder(x, memory, cross, own), memory, 2)
    assert still == [[1, 6]]


@pytest.mark.parametrize("batch, s, t", [(3, 7, 9), (9, 9, 9), (2, 10, 4)])
def test_padding_may_be_told_pair_by_pair(batch, s, t):
    model, x, memory = small_t5(), torch.randn(batch, t, 16), torch.randn(batch, s, 16)
    mask, own = padding_masks(batch, s), padding_masks(batch, t)
    rows = mask[:, None].expand(-1, s, -1)
    assert torch.equal(model.encoder(memory, rows), model.encoder(memory, mask))
    rows, own_rows = mask[:, None].expand(-1, t, -1), own[:, None].expand(-1, t, -1)
    written = model.decoder(x, memory, rows, own_rows)
    assert torch.equal(written, model.decoder(x, memory, mask, own))


# --- The decoder's cache --------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sizes", [1, 7, [1, 149], [130, 1, 1, 1, 17], [150]], ids=str)
def test_pieces_equal_the_whole(pair, sizes):
    """Fed in pieces, each with the target's mask so far."""
    decoder, x, memory = pair[0].decoder, vectors(3, 150), vectors(3, 10, 1)
    mask, src_mask = padding_masks(3, 150), padding_masks(3, 10)
    cache, written = decoder.new_cache(memory, src_mask), []
    for piece in x.split(sizes, dim=1):
        so_far = mask[:, : cache.length + piece.shape[1]]
        written.append(decoder(piece, tgt_mask=so_far, cache=cache))
    assert cache.length == 150
    pieces, whole = torch.cat(written, dim=1), decoder(x, memory, src_mask, mask)
    assert pieces.isfinite().all()
    assert difference(pieces[mask], whole[mask]) <= 1e-5


def test_the_memory_is_projected_once():
    decoder, calls = small_t5(depth=2).decoder, []
    for block in decoder.blocks:
        block.cross_attention.k.register_forward_hook(lambda *call: calls.append(call))
    cache = decoder.new_cache(torch.randn(2, 5, 16))
    for piece in torch.randn(2, 6, 16).split(1, dim=1):
        decoder(piece, cache=cache)
    assert len(calls) == 2


def test_rows_can_change_places_and_be_followed_twice():
    decoder, rows = small_t5(depth=2).decoder, torch.tensor([2, 0, 2])
    x, memory = torch.randn(3, 4, 16), torch.randn(1, 5, 16).expand(3, -1, -1)
    cache = decoder.new_cache(memory)
    decoder(x[:, :3], cache=cache)
    cache.reorder(rows)
    after = decoder(x[:, 3:], cache=cache)
    whole = torch.cat([x[rows, :3], x[:, 3:]], dim=1)
    assert difference(after, decoder(whole, memory)[:, 3:]) <= 1e-5


def test_without_a_cache_blocks_can_be_computed_twice():
    """As ``torch.utils.checkpoint`` does, to save memory in training."""
    decoder = small_t5(depth=2).decoder
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16, requires_grad=True)
    [plain] = torch.autograd.grad(decoder(x, memory).square().sum(), memory)
    for block in decoder.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    [again] = torch.autograd.grad(decoder(x, memory).square().sum(), memory)
    assert difference(again, plain) <= 1e-5
