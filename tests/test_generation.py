"""Greedy generation (chapter 12) against ``transformers``."""

import pytest
import torch
from hugging_face import SIZES, difference, padding_masks
from test_t5 import TINY, ids, make_all
from torch import nn

from t5_book.generation import evaluating, generate
from t5_book.t5 import T5


@pytest.fixture(scope="module", params=["v1.0", "v1.1", "umt5"])
def pair(request):
    """Our T5 and the reference with the same weights."""
    return make_writers(request.param)


def make_writers(kind):
    """A pair whose texts vary.

    A fresh tied T5 repeats what it has read: its stream still holds the
    embedding. Smaller embeddings give the other layers a say.
    """
    ours, reference = make_all(kind)
    if ours.config.tie_head:
        ours.enc_emb.weight.data *= 0.03
        reference.shared.weight.data = ours.enc_emb.weight.data
    return ours, reference


def with_ids(model, **special):
    """The same model, with other special tokens."""
    config = vars(model.config) | special
    other = T5(**config).eval()
    other.load_state_dict(model.state_dict())
    return other


def write_slowly(model, src, mask, steps):
    """Greedy generation by the formula: no cache, no end."""
    tgt = torch.full_like(src[:, :1], model.config.start_id)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(src, tgt, mask=mask)
            tgt = torch.cat([tgt, logits[:, -1:].argmax(-1)], dim=1)
    return tgt[:, 1:]


def cut(rows, eos):
    """Rows as lists, each up to its first eos."""
    lists = rows.tolist()
    return [r[: r.index(eos) + 1] if eos in r else r for r in lists]


def choose_eos(written):
    """A token that ends rows at as many different places as possible."""
    lengths = {
        eos: {len(row) for row in cut(written, eos)}
        for eos in written[:, 1:].unique().tolist()
    }
    return max(lengths, key=lambda eos: len(lengths[eos]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padded", [True, False])
def test_agrees_token_for_token(pair, padded, seed):
    ours, reference = pair
    src = ids(5, 12, seed)
    mask = padding_masks(5, 12) if padded else torch.ones(5, 12).bool()
    eos = choose_eos(write_slowly(ours, src, mask, 30))
    written = generate(
        with_ids(ours, eos_id=eos), src, mask, max_new_tokens=30
    )
    theirs = reference.generate(
        input_ids=src,
        attention_mask=mask.long(),
        max_new_tokens=30,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos,
        pad_token_id=0,
        decoder_start_token_id=0,
    )[:, 1:]
    assert len({len(row) for row in cut(written, eos)}) > 1
    assert cut(written, eos) == cut(theirs, eos)


@pytest.mark.parametrize("masked", [True, False])
def test_cached_equals_uncached_beyond_128_tokens(pair, masked):
    model, _ = pair
    src, tgt = ids(3, 20), ids(3, 150, 1)
    mask = padding_masks(3, 20) if masked else None
    with torch.no_grad():
        memory, cache = model.encode(src, mask), model.decoder.new_cache()
        whole = model.decode(tgt, memory, mask)
        steps = [
            model.decode(tgt[:, t : t + 1], memory, mask, cache=cache)
            for t in range(150)
        ]
    assert difference(torch.cat(steps, dim=1), whole) <= 1e-5


def test_pieces_of_any_length_equal_the_whole(pair):
    model, _ = pair
    src, tgt = ids(3, 20), ids(3, 150, 1)
    with torch.no_grad():
        memory, cache = model.encode(src), model.decoder.new_cache()
        whole = model.decode(tgt, memory)
        pieces = [
            model.decode(piece, memory, cache=cache)
            for piece in tgt.split([1, 100, 3, 46], dim=1)
        ]
    assert difference(torch.cat(pieces, dim=1), whole) <= 1e-5


def test_writes_what_the_formula_writes(pair):
    src, mask = ids(4, 10), padding_masks(4, 10)
    slow = write_slowly(pair[0], src, mask, 140)
    model = with_ids(pair[0], eos_id=choose_eos(slow))
    eos = model.config.eos_id
    written = generate(model, src, mask, max_new_tokens=140)
    assert cut(written, eos) == cut(slow, eos)


def test_a_batch_writes_what_each_row_writes_alone(pair):
    src, mask = ids(4, 10), padding_masks(4, 10)
    slow = write_slowly(pair[0], src, mask, 25)
    model = with_ids(pair[0], eos_id=choose_eos(slow))
    eos = model.config.eos_id
    written = cut(generate(model, src, mask, max_new_tokens=25), eos)
    for row, real, expected in zip(src, mask, written):
        alone = generate(model, row[real][None], max_new_tokens=25)
        assert alone.tolist() == [expected]


def test_rows_that_are_done_are_padded():
    src = ids(4, 10)
    model, _ = make_writers("v1.0")
    eos = choose_eos(write_slowly(model, src, None, 25))
    model = with_ids(model, eos_id=eos, pad_id=3)
    written = generate(model, src, max_new_tokens=25)
    ends = [len(row) for row in cut(written, eos)]
    assert min(ends) < max(ends) == written.shape[1]
    for row, end in zip(written.tolist(), ends):
        assert set(row[end:]) <= {3}


class Scripted(nn.Module):
    """Writes given rows, whatever it reads; stands in for a decoder."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.read = torch.tensor(rows), []

    def decode(self, tgt, memory, mask=None, cache=None):
        self.read.append(tgt[:, 0].tolist())
        self.graph = torch.is_grad_enabled() or memory.requires_grad
        step = self.rows[:, len(self.read) - 1 : len(self.read)]
        return nn.functional.one_hot(step, 32).float()


def scripted(rows, **config):
    """A T5 whose decoder follows a script."""
    model = T5(**TINY | config)
    script = Scripted(rows)
    model.decode = script.decode
    return model, script


def test_the_loop_ends_when_all_rows_are_done():
    rows = [[5, 1, 6, 7, 8], [5, 6, 7, 1, 8], [1, 5, 6, 7, 8]]
    model, script = scripted(rows)
    written = generate(model, ids(3, 4, high=32), max_new_tokens=5)
    assert written.tolist() == [[5, 1, 0, 0], [5, 6, 7, 1], [1, 0, 0, 0]]
    assert len(script.read) == 4


def test_it_reads_the_start_token_and_then_its_own():
    model, script = scripted([[5, 6, 7, 1]], start_id=9)
    generate(model, ids(1, 4, high=32), max_new_tokens=3)
    assert script.read == [[9], [5], [6]]


def test_it_keeps_no_graph():
    model, script = scripted([[5, 6, 1]])
    generate(model, ids(1, 4, high=32))
    assert not script.graph


@pytest.mark.parametrize("n", [1, 2, 7])
def test_it_stops_at_max_new_tokens(n):
    model, _ = scripted([[5] * 9])
    written = generate(model, ids(1, 4, high=32), max_new_tokens=n)
    assert written.tolist() == [[5] * n]


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_token(n):
    with pytest.raises(ValueError, match=f"max_new_tokens is {n}; pass >= 1"):
        generate(T5(**TINY), ids(1, 4, high=32), max_new_tokens=n)


def test_each_key_is_projected_once():
    model = T5(**TINY | {"eos_id": 31}).eval()
    model.head.weight.data[31] = 0  # never the likeliest for long
    rows = {"self_attention": 0, "cross_attention": 0}
    block = model.decoder.blocks[0]
    for name in rows:

        def count(module, inputs, output, name=name):
            rows[name] += output.shape[1]

        getattr(block, name).v.register_forward_hook(count)
    written = generate(model, ids(1, 6, high=31), max_new_tokens=12)
    assert rows == {
        "self_attention": written.shape[1],
        "cross_attention": 6,
    }


def test_the_method_is_the_function():
    model = T5(**TINY).eval()
    src, mask = ids(3, 6, high=32), padding_masks(3, 6)
    expected = generate(model, src, mask, max_new_tokens=5)
    assert torch.equal(model.generate(src, mask, max_new_tokens=5), expected)


def test_dropout_is_off_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model = T5(**TINY, dropout=0.5).train()
    src = ids(4, 6, high=32)
    first = model.generate(src, max_new_tokens=20)
    assert torch.equal(first, model.generate(src, max_new_tokens=20))
    assert model.training and model.decoder.dropout.training
    assert not first.is_inference() and not first.requires_grad
    assert all(p.grad is None for p in model.parameters())
    model.loss(src, first).backward()  # what it wrote can be learned from


def test_evaluating_restores_every_part_even_after_an_error():
    model = T5(**TINY).train()
    model.encoder.eval()
    before = [part.training for part in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model) as same:
        assert same is model
        assert not any(part.training for part in model.modules())
        raise RuntimeError
    assert [part.training for part in model.modules()] == before
    assert {True, False} == set(before)


def test_the_mask_reaches_cross_attention():
    """A mask that stops at the encoder lets the decoder read padding."""
    model, _ = make_all("v1.1")
    src = ids(2, 10)
    mask = torch.ones(2, 10).bool()
    mask[:, 6:] = False
    other = src.clone()
    other[:, 6:] = SIZES["num_tokens"] - 1
    written = [generate(model, s, mask, max_new_tokens=9) for s in (src, other)]
    assert torch.equal(*written)
