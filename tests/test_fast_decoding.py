"""Decoding in memory set aside, several targets to a source, and beside training."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from threading import Event, Thread
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from t5_book.batches import Batch
from t5_book.beams import beam_search
from t5_book.decoder import BlockCache
from t5_book.evaluation import evaluate
from t5_book.generation import DecodingState, generate
from t5_book.inference import evaluation_view
from t5_book.static_cache import StaticBlockCache, StaticCache
from tests.conftest import (
    FAMILIES,
    VOCAB,
    difference,
    make_ending_writers,
    padding_masks,
    seeded,
    small_t5,
    sources,
)

# --- Memory set aside -----------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """A T5 of each family, in float64, whose texts vary and end."""
    return make_ending_writers(request.param)[0]


@torch.no_grad()
def logits_in_pieces(model, tgt, src, mask, ends, **options):
    """Logits after each of the pieces of a target."""
    state = DecodingState(model, model.encode(src, mask), mask, **options)
    return [state.next_logits(tgt[:, :t]).clone() for t in ends], state


@pytest.mark.parametrize("room", [1, 2, 100, 131, 256])
def test_memory_set_aside_changes_no_logits(model, room):
    """Past distance 113, where the last bucket opens, and past its room."""
    src, mask = sources(3, 9)
    tgt = sources(3, 131, seed=2)[0]
    ends = [1, 2, 3, 8, 60, 61, 112, 113, 114, 115, 128, 129, 130, 131]
    plain, _ = logits_in_pieces(model, tgt, src, mask, ends)
    found, state = logits_in_pieces(model, tgt, src, mask, ends, room=room)
    for ours, expected in zip(found, plain):
        assert difference(ours, expected) <= 1e-10
    assert isinstance(state.cache, StaticCache) and state.cache.length == 131
    stored = state.cache.blocks[0].store.shape[3]
    assert stored == room if room >= 131 else 131 <= stored < 262


def test_what_lies_behind_the_last_token_is_not_read():
    """Fresh memory may hold anything, NaN too."""
    model = small_t5(depth=2).double().eval()
    src, mask = torch.randint(2, 32, (2, 5), generator=seeded(1)), padding_masks(2, 5)
    tgt = torch.randint(2, 32, (2, 9), generator=seeded(2))
    with torch.no_grad():
        memory = model.encode(src, mask)
        state = DecodingState(model, memory, mask, room=9)
        state.next_logits(tgt[:, :1])
        for block in state.cache.blocks:
            with torch.inference_mode():
                block.store[:, :, :, 1:] = torch.nan
        whole = DecodingState(model, memory, mask, use_cache=False)
        for t in range(2, 10):
            found = state.next_logits(tgt[:, :t])
            assert difference(found, whole.next_logits(tgt[:, :t])) <= 1e-10


def test_a_static_cache_keeps_what_a_growing_one_keeps():
    source = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    plain, static = BlockCache(source), StaticBlockCache(source, room=3)
    for q in (2, 1, 1, 7, 1):
        new = torch.randn(6, 4, q, 8), torch.randn(6, 4, q, 8)
        for ours, theirs in zip(static.extend(*new), plain.extend(*new)):
            assert torch.equal(ours, theirs)
        rows = torch.randint(0, 6, (6,), generator=seeded(q))
        plain.reorder(rows)
        static.reorder(rows)
    assert static.room == 12 and static.store.shape == (2, 6, 4, 12, 8)


def test_memory_is_taken_once_and_written_in_place():
    model = small_t5(depth=2).eval()
    src = torch.full((2, 5), 7)
    tgt = torch.randint(2, 32, (2, 20), generator=seeded(2))
    with torch.no_grad():
        state = DecodingState(model, model.encode(src), room=20)
        places = set()
        for t in range(1, 21):
            state.next_logits(tgt[:, :t])
            places.add(state.cache.blocks[1].store.data_ptr())
            state.reorder(torch.tensor([1, 0]))
    assert len(places) == 1


def test_a_large_maximum_takes_little_memory(model):
    """The room begins small: nobody writes a billion tokens."""
    stores, make_room = [], StaticBlockCache.make_room

    def noting(self, *arguments):
        make_room(self, *arguments)
        stores.append(self.store.shape[3])

    with patch.object(StaticBlockCache, "make_room", noting):
        # A sampled text ends sooner or later.
        written = generate(
            model, *sources(2), max_new_tokens=10**9, do_sample=True, temperature=9.0
        )
    assert max(stores) <= max(256, 2 * written.shape[1])


def test_the_bias_is_looked_up_once_for_all_steps(model):
    calls = []
    hooks = [
        table.register_forward_hook(lambda *call: calls.append(call[1]))
        for table in model.decoder.biases
    ]
    generate(model, *sources(2), max_new_tokens=12, min_new_tokens=6)
    for hook in hooks:
        hook.remove()
    assert calls == [(1, 13)] * len(model.decoder.biases)


# --- Several targets to a source ------------------------------------------


@pytest.mark.parametrize("w", [1, 2, 3])
@pytest.mark.parametrize("q", [1, 4])
def test_targets_of_one_source_share_its_keys_and_mask(w, q):
    model = small_t5(depth=2).double().eval()
    memory = torch.randn(3, 7, 16, dtype=torch.float64)
    mask, x = padding_masks(3, 7), torch.randn(3 * w, q + 1, 16, dtype=torch.float64)
    cache = model.decoder.new_cache(memory, mask)
    found = [model.decoder(x[:, :q], cache=cache), model.decoder(x[:, q:], cache=cache)]
    copies = memory.repeat_interleave(w, dim=0), mask.repeat_interleave(w, dim=0)
    expected = model.decoder(x, *copies)
    assert difference(torch.cat(found, dim=1), expected) <= 1e-10
    assert cache.blocks[0].source[0].shape[0] == 3
    assert cache.blocks[0].source[0].is_contiguous()


def test_beams_do_not_look_at_padding(model):
    src, mask = sources(2, 10)[0], torch.ones(2, 10).bool()
    mask[0, 6:] = mask[1, :3] = False
    other = src.masked_fill(~mask, VOCAB - 1)
    options = dict(num_beams=3, num_return_sequences=3, max_new_tokens=10)
    first, second = [beam_search(model, s, mask, **options) for s in (src, other)]
    assert torch.equal(first.ids, second.ids)
    assert difference(first.scores, second.scores) <= 1e-10


@pytest.mark.parametrize("w", [2, 5])
def test_beams_in_memory_set_aside_find_what_they_find_without_a_cache(model, w):
    options = dict(num_beams=w, num_return_sequences=w, max_new_tokens=14)
    fast, slow = [
        beam_search(model, *sources(), use_cache=use, **options) for use in (True, False)
    ]
    assert torch.equal(fast.ids, slow.ids)
    assert difference(fast.scores, slow.scores) <= 1e-10


# --- What a caller gets ---------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_what_is_returned_can_be_changed_and_learned_from(training, use_cache):
    model = small_t5(dropout=0.1).train(training)
    src = torch.full((2, 4), 7)
    options = dict(max_new_tokens=5, min_new_tokens=2, use_cache=use_cache)
    sampled = generate(model, src, do_sample=True, top_k=5, top_p=0.9, **options)
    found = beam_search(model, src, num_beams=3, **options)
    for result in (sampled, generate(model, src, **options), *found):
        assert not result.is_inference() and not result.requires_grad
        result += 1
    ids = sampled.clamp(max=31)
    model.loss(src, ids).backward()
    assert all(weight.grad is not None for weight in model.parameters())


class Keeper:
    """A streamer that changes what it got, after the end."""

    def __init__(self):
        self.kept = []

    def put(self, ids):
        self.kept.append(ids)

    def end(self):
        for ids in self.kept:
            ids += 1


def test_a_streamer_may_change_what_it_gets():
    model, streamer = small_t5().eval(), Keeper()
    src = torch.full((1, 4), 7)
    expected = generate(model, src, max_new_tokens=6)
    written = generate(model, src, max_new_tokens=6, streamer=streamer)
    assert torch.equal(written, expected)
    assert len(streamer.kept) == 1 + written.shape[1]


# --- Beside training ------------------------------------------------------


def noisy(**changes):
    """A T5 in training mode, with much dropout, in float64."""
    return small_t5(depth=2, dropout=0.5, **changes).double().train()


def test_a_view_shares_weights_ties_and_settings():
    model = noisy()
    model.register_buffer("kept", torch.zeros(3))
    model.anything = object()
    view = evaluation_view(model)
    assert not any(part.training for part in view.modules())
    assert all(part.training for part in model.modules())
    mine, shared = dict(model.named_parameters()), dict(view.named_parameters())
    assert mine.keys() == shared.keys()
    assert all(mine[name] is shared[name] for name in mine)
    assert view.kept is model.kept and view.anything is model.anything
    assert view.dec_emb is view.enc_emb and view.head.weight is view.enc_emb.weight
    own = {id(part) for part in model.modules()}
    assert not own & {id(part) for part in view.modules()}
    assert evaluation_view(view) is view


def test_a_model_in_evaluation_mode_is_its_own_view():
    model = noisy().eval()
    assert evaluation_view(model) is model
    model.decoder.blocks[1].dropout.train()
    assert evaluation_view(model) is not model


def test_hooks_fire_and_their_owners_are_not_copied():
    model, calls = noisy(), []
    model.decoder.norm.register_forward_hook(lambda *call: calls.append("after"))
    model.decoder.norm.register_forward_pre_hook(lambda *call: calls.append("before"))
    written = generate(model, torch.full((1, 4), 7), max_new_tokens=3)
    assert calls == ["before", "after"] * written.shape[1]


def test_a_forward_that_was_replaced_is_that_of_the_view():
    """As blocks are, to be computed twice in training."""
    model, src = noisy(), torch.full((3, 4), 7)
    expected = generate(model, src, max_new_tokens=8)
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for _ in range(3):
        assert torch.equal(generate(model, src, max_new_tokens=8), expected)
    assert all(part.training for part in model.modules())


def test_modules_in_a_list_are_those_of_the_view():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.parts = {"list": [self.dropout, self.dropout]}

        def forward(self, x):
            for part in self.parts["list"]:
                x = part(x)
            return x

    model = Twice()
    view = evaluation_view(model)
    assert torch.equal(view(torch.ones(9)), torch.ones(9))
    assert not torch.equal(model(torch.ones(9)), torch.ones(9))


@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_a_compiled_model_writes_beside_training(how):
    model, src = noisy(), torch.full((2, 4), 7)
    expected = generate(model, src, max_new_tokens=6)
    compiled = model
    if how == "whole":
        compiled = torch.compile(model, backend="eager")
    elif how == "part":
        model.decoder = torch.compile(model.decoder, backend="eager")
    else:
        model.compile(backend="eager")
    for _ in range(2):
        assert torch.equal(generate(compiled, src, max_new_tokens=6), expected)
        assert torch.equal(compiled.generate(src, max_new_tokens=6), expected)
    assert model.training and all(part.training for part in model.modules())


def texts(model, src):
    """Greedy, sampled and searched."""
    options = dict(max_new_tokens=8)
    return [
        generate(model, src, **options).tolist(),
        generate(model, src, do_sample=True, generator=seeded(3), **options).tolist(),
        beam_search(model, src, num_beams=3, **options).ids.tolist(),
    ]


def test_threads_write_and_measure_beside_a_training_loop():
    """Each text is the one that a thread alone writes; each step has dropout."""
    model = noisy()
    rows = torch.randint(2, 32, (4, 3, 6), generator=seeded(1))
    batch = Batch(rows[0], torch.ones(3, 6).bool(), rows[1])
    expected = [texts(model, src) for src in rows]
    loss = evaluate(model, [batch])
    modes, losses, stop = [], [], Event()
    model.decoder.blocks[0].dropout.register_forward_hook(
        lambda part, *call: modes.append(part.training)
    )

    def train():
        while not stop.is_set():
            before = len(modes)
            losses.append(model.loss(rows[0], rows[1]).item())
            assert len(modes) > before

    def work(number):
        found = texts(model, rows[number % 4])
        return found == expected[number % 4] and evaluate(model, [batch]) == loss

    trainer = Thread(target=train)
    trainer.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(16)))
    finally:
        stop.set()
        trainer.join()
    # Without dropout the loss would be the same each time.
    assert len(losses) > 2 and len(set(losses)) == len(losses)
    assert all(part.training for part in model.modules())


# --- Out to other engines -------------------------------------------------


@pytest.mark.skipif(not find_spec("ctranslate2"), reason="needs ctranslate2")
def test_ctranslate2_writes_the_same(tmp_path):
    """What ``save_pretrained`` wrote goes through its converter as it is."""
    from benchmarks.decoding_speed import SHAPES, converted, make_t5, write_converted

    model = make_t5(SHAPES["tiny"])
    src = torch.randint(3, 100, (4, 9), generator=seeded(1))
    ours = model.generate(src, max_new_tokens=12, min_new_tokens=12)
    theirs = write_converted(converted(model, tmp_path), src, tokens=12, beams=1)
    assert torch.equal(ours, theirs)
