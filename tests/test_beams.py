"""Beam search against ``transformers`` and brute force."""

from inspect import signature
from itertools import product

import pytest
import torch

from t5_book.beams import (
    Beams,
    Texts,
    beam_search,
    grow_beams,
    keep_best,
    may_improve,
    take_beams,
)
from t5_book.generation import generate
from t5_book.t5 import T5
from tests.conftest import (
    FAMILIES,
    VOCAB,
    cut,
    make_ending_writers,
    sources,
    with_ids,
    write_with_reference,
)

pytestmark = pytest.mark.rounding

PENALTIES = [0.0, 0.6, 1.0, 2.0]
STOPPING = [False, True, "never"]
SMALL = dict(
    dim=16, enc_num_tokens=9, enc_depth=1, enc_heads=2, enc_dim_head=4,
    enc_mlp_mult=2, dec_num_tokens=5, dec_depth=1, dec_heads=2,
    dec_dim_head=4, dec_mlp_mult=2, tie_token_emb=False, tie_head=False,
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """Our T5 and the reference with the same weights."""
    return make_ending_writers(request.param)


@pytest.fixture(scope="module")
def model():
    """A T5 whose texts vary and end."""
    return make_ending_writers("t5-v1_1")[0]


def assert_same(pair, *inputs, **options):
    """Ours, with and without a cache, and the reference find the same.

    After the eos ``transformers`` 5.23 writes more of them, since our
    padding id is 0; ours pads.
    """
    (ours, reference), eos = pair, pair[0].config.eos_id
    options = dict(num_beams=4, max_new_tokens=10) | options
    p = options["prefix"].shape[1] if "prefix" in options else 0
    theirs = write_with_reference(
        reference, ours, *inputs, **options,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    expected = theirs.sequences[:, 1:]
    for use_cache in (True, False):
        ids, scores = beam_search(
            ours, *inputs, use_cache=use_cache, **options
        )
        assert ids.shape == expected.shape and ids.dtype == torch.int64
        assert cut(ids, eos, p) == cut(expected, eos, p)
        for row, text in zip(ids.tolist(), cut(ids, eos, p)):
            assert set(row[len(text) :]) <= {0}
        assert (scores - theirs.sequences_scores).abs().max() <= 1e-5
    return ids


# --- Agreement with transformers ------------------------------------------


@pytest.mark.parametrize("early_stopping", STOPPING)
@pytest.mark.parametrize("length_penalty", PENALTIES)
def test_agrees_token_for_token(pair, length_penalty, early_stopping):
    options = dict(
        length_penalty=length_penalty, early_stopping=early_stopping
    )
    two = assert_same(pair, *sources(), num_return_sequences=2, **options)
    assert len(two) == 10
    one = beam_search(pair[0], *sources(), max_new_tokens=10, **options).ids
    assert torch.equal(one, two[::2, : one.shape[1]])


def test_agrees_where_the_options_make_a_difference():
    """Else the agreement above would say little."""
    pair, found = make_ending_writers("t5"), {}
    for penalty, early in product(PENALTIES, STOPPING):
        options = dict(length_penalty=penalty, early_stopping=early)
        ids = assert_same(
            pair, *sources(12), num_return_sequences=4, **options
        )
        found[penalty, early] = str(cut(ids, pair[0].config.eos_id))
    assert len({found[penalty, False] for penalty in PENALTIES}) == 4
    for penalty in (1.0, 2.0):
        assert len({found[penalty, early] for early in STOPPING}) == 3


def test_one_text_agrees_without_a_mask(pair):
    assert_same(pair, sources()[0])


@pytest.mark.parametrize("num_beams", [2, 3, 7])
def test_any_number_of_beams_agrees(num_beams):
    pair = make_ending_writers("byt5", seed=1)
    options = dict(num_beams=num_beams, num_return_sequences=num_beams)
    assert_same(pair, *sources(), **options)


@pytest.mark.parametrize("least", [1, 6])
def test_the_least_length_agrees(pair, least):
    eos = pair[0].config.eos_id
    ids = assert_same(
        pair, *sources(), min_new_tokens=least, num_return_sequences=4
    )
    assert min(map(len, cut(ids, eos))) > least


def test_a_text_may_end_right_after_the_least_length():
    ours = make_ending_writers("t5", seed=1)[0]
    eos, shortest = ours.config.eos_id, {}
    for least in range(1, 6):
        found = beam_search(
            ours, *sources(12), min_new_tokens=least, max_new_tokens=8,
            num_return_sequences=4, length_penalty=0.0,
        )  # fmt: skip
        shortest[least] = min(map(len, cut(found.ids, eos)))
    assert shortest == {least: least + 1 for least in range(1, 6)}


@pytest.mark.parametrize("p, least", [(1, 0), (3, 4)])
def test_a_prefix_agrees(pair, p, least):
    prefix = sources(5, p, seed=7)[0]
    options = dict(prefix=prefix, min_new_tokens=least)
    ids = assert_same(pair, *sources(), num_return_sequences=2, **options)
    assert torch.equal(ids[:, :p], prefix.repeat_interleave(2, dim=0))


# --- Against brute force --------------------------------------------------


def all_texts(n, eos, tokens):
    """Every text of at most ``n`` tokens that ends or is stopped."""
    others = [token for token in range(tokens) if token != eos]
    ended = [
        [*start, eos]
        for length in range(n)
        for start in product(others, repeat=length)
    ]
    return ended + [list(text) for text in product(others, repeat=n)]


@torch.no_grad()
def log_probability(model, src, text):
    """Log-probability of a text, by the whole model."""
    labels = torch.tensor([text])
    logits = model(src, model.shift_right(labels)).double()
    each = logits.log_softmax(-1).gather(2, labels[..., None])
    return each.sum().item()


@pytest.fixture(scope="module")
def small():
    """A model, a source, and the log-probability of every text."""
    torch.manual_seed(0)
    model, src = T5(**SMALL).double().eval(), torch.tensor([[3, 8]])
    model.head.weight.data *= 3
    texts = all_texts(3, eos=1, tokens=5)
    return (
        model,
        src,
        texts,
        [log_probability(model, src, t) for t in texts],
    )


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", STOPPING)
def test_with_enough_beams_it_finds_every_text(
    small, length_penalty, early_stopping
):
    model, src, texts, sums = small
    scores = [
        total / len(text) ** length_penalty
        for text, total in zip(texts, sums)
    ]
    order = sorted(range(len(texts)), key=scores.__getitem__, reverse=True)
    found = beam_search(
        model, src, num_beams=90, num_return_sequences=90, max_new_tokens=3,
        length_penalty=length_penalty, early_stopping=early_stopping,
    )  # fmt: skip
    assert len(texts) == 85
    assert cut(found.ids[:85], 1) == [texts[i] for i in order]
    expected = torch.tensor([scores[i] for i in order], dtype=torch.float64)
    assert torch.allclose(found.scores[:85], expected, rtol=0, atol=1e-9)
    # There are no more texts than that.
    assert (found.scores[85:] == -torch.inf).all()
    assert (found.ids[85:] == 0).all()


# --- Its own properties ---------------------------------------------------


@pytest.mark.parametrize("length_penalty", PENALTIES)
def test_one_beam_is_greedy(pair, length_penalty):
    src, mask = sources(8)
    options = dict(max_new_tokens=12)
    one = beam_search(
        pair[0], src, mask, num_beams=1, length_penalty=length_penalty,
        **options,
    )  # fmt: skip
    assert torch.equal(one.ids, generate(pair[0], src, mask, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_sums_over_a_power_of_the_length(model, dtype):
    model, (src, mask) = with_ids(model).to(dtype), sources(3)
    for penalty in PENALTIES:
        ids, scores = beam_search(
            model, src, mask, length_penalty=penalty, max_new_tokens=8
        )
        for row, text in enumerate(cut(ids, model.config.eos_id)):
            alone = src[row][mask[row]][None]
            total = log_probability(model, alone, text)
            expected = total / len(text) ** penalty
            assert scores[row].item() == pytest.approx(expected, abs=1e-4)


def test_a_batch_finds_what_each_row_finds_alone(model):
    (src, mask), eos = sources(4), model.config.eos_id
    options = dict(num_return_sequences=3, max_new_tokens=12)
    ids, scores = beam_search(model, src, mask, **options)
    for row in range(4):
        alone = beam_search(model, src[row][mask[row]][None], **options)
        mine = slice(3 * row, 3 * row + 3)
        assert cut(ids[mine], eos) == cut(alone.ids, eos)
        assert torch.allclose(scores[mine], alone.scores, atol=1e-5)


def test_cached_equals_uncached_beyond_the_last_bucket(pair):
    options = dict(prefix=sources(2, 125)[0], max_new_tokens=8)
    ours = with_ids(pair[0], eos_id=VOCAB - 1)
    fast, slow = [
        beam_search(ours, *sources(2), use_cache=c, **options)
        for c in (True, False)
    ]
    assert fast.ids.shape[1] > 130
    assert torch.equal(fast.ids, slow.ids)
    assert torch.allclose(fast.scores, slow.scores, atol=1e-5)


def test_rows_are_padded_with_the_padding_id(model):
    other = with_ids(model, pad_id=3)
    ids = beam_search(other, *sources(12), max_new_tokens=10).ids
    ends = [len(row) for row in cut(ids, model.config.eos_id)]
    assert min(ends) < max(ends)
    for row, end in zip(ids.tolist(), ends):
        assert set(row[end:]) <= {3}


def test_no_column_is_padding_alone(model):
    eos, longest = model.config.eos_id, []
    for row in range(12):
        src = sources(12)[0][row : row + 1]
        ids = beam_search(model, src, max_new_tokens=12).ids
        assert cut(ids, eos) == ids.tolist()
        longest.append(ids.shape[1])
    assert len(set(longest)) > 2


def calls_of(part):
    """The shapes that a part of a model gets, call by call."""
    shapes = []
    part.register_forward_pre_hook(
        lambda part, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    return shapes


def test_sources_are_read_once_and_tokens_one_by_one():
    model = make_ending_writers("t5-v1_1", seed=1)[0]
    src, mask = sources(3, 6)
    read, wrote = calls_of(model.encoder), calls_of(model.decoder)
    projected = calls_of(model.decoder.blocks[0].cross_attention.k)
    options = dict(prefix=sources(3, 2)[0], min_new_tokens=4)
    beam_search(model, src, mask, num_beams=5, **options)
    assert read == [(3, 6)] and projected == [(3, 6)]
    assert wrote[0] == (15, 3) and set(wrote[1:]) == {(15, 1)}


def test_early_stopping_saves_steps():
    model = make_ending_writers("t5-v1_1")[0]
    wrote, steps = calls_of(model.decoder), {}
    for row in range(6):
        src = sources(6)[0][row : row + 1]
        steps[row] = []
        for early_stopping in (True, False, "never"):
            wrote.clear()
            options = dict(early_stopping=early_stopping, max_new_tokens=20)
            beam_search(model, src, **options)
            steps[row].append(len(wrote))
        assert steps[row] == sorted(steps[row])
    assert any(len(set(row)) == 3 for row in steps.values())


def test_the_method_does_either(model):
    src, mask = sources()
    options = dict(num_beams=3, length_penalty=0.6, num_return_sequences=2)
    options |= dict(early_stopping=True, min_new_tokens=3, max_new_tokens=9)
    options |= dict(prefix=sources(5, 2, seed=7)[0], use_cache=False)
    expected = beam_search(model, src, mask, **options).ids
    assert torch.equal(model.generate(src, mask, **options), expected)
    greedy = model.generate(src, mask, num_beams=1, max_new_tokens=7)
    assert torch.equal(greedy, generate(model, src, mask, max_new_tokens=7))
    # What has no effect on one beam may stay, so that widths can be compared.
    options = dict(length_penalty=0.6, early_stopping="never")
    assert torch.equal(
        model.generate(src, mask, **options), generate(model, src, mask)
    )


def test_the_method_samples(model):
    options = dict(do_sample=True, temperature=2.0, top_k=9, top_p=0.8)
    options |= dict(max_new_tokens=6, use_cache=False)
    written = [
        write(*sources(), generator=torch.Generator().manual_seed(2), **options)
        for write in (model.generate, lambda *x, **y: generate(model, *x, **y))
    ]
    assert torch.equal(*written)


def test_the_method_has_the_options_of_both():
    method = signature(T5.generate).parameters
    for function in (generate, beam_search):
        for name, parameter in signature(function).parameters.items():
            assert method[name].kind == parameter.kind
            if name != "num_beams":  # one beam by default
                assert method[name].default == parameter.default
    assert method["num_beams"].default == 1


@pytest.mark.parametrize(
    "option, message",
    [
        (dict(do_sample=True), "num_beams is 2.*do_sample=False"),
        (dict(top_k=3), "top_k.* do_sample"),
        (dict(temperature=0.5), "temperature.* do_sample"),
        (dict(streamer=print), "num_beams is 2.* stream"),
        (dict(num_beams=1, num_return_sequences=2), "sequences is 2.* 1"),
        (dict(num_beams=0), "num_beams is 0"),
    ],
    ids=str,
)
def test_the_method_refuses_what_it_cannot_use(option, message):
    src = torch.full((2, 4), 5)
    with pytest.raises(ValueError, match=message):
        T5(**SMALL).generate(src, **dict(num_beams=2) | option)


def test_dropout_is_off_and_nothing_is_left_behind():
    torch.manual_seed(0)
    model = T5(**SMALL, dropout=0.5).train()
    src = torch.tensor([[3, 8], [2, 5]])
    first = beam_search(model, src, max_new_tokens=6)
    again = beam_search(model, src, max_new_tokens=6)
    assert torch.equal(first.ids, again.ids)
    assert model.training and not first.scores.requires_grad


# --- Its parts ------------------------------------------------------------


def test_take_beams():
    ids, sums = torch.arange(12).view(2, 3, 2), torch.arange(6).view(2, 3)
    index = torch.tensor([[2, 0], [1, 1]])
    expected = [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
    assert take_beams(ids, index).tolist() == expected
    assert take_beams(sums, index).tolist() == [[2, 0], [4, 4]]


def test_grow_beams():
    running = Beams(
        torch.tensor([[[0, 7], [0, 5]]]), torch.tensor([[-1.0, -2]])
    )
    log_probs = torch.tensor([[[-9.0, -3, -1.5], [-0.25, -9, -1]]])
    grown, origin = grow_beams(running, log_probs)
    assert grown.ids.tolist() == [
        [[0, 5, 0], [0, 7, 2], [0, 5, 2], [0, 7, 1]]
    ]
    assert grown.sums.tolist() == [[-2.25, -2.5, -3, -4]]
    assert origin.tolist() == [[1, 0, 1, 0]]


def test_keep_best():
    finished = Texts(
        torch.tensor([[[4, 1], [3, 1]]]), torch.tensor([[-1.5, -3.0]])
    )
    grown = Beams(
        torch.tensor([[[5, 6, 1], [5, 6, 7], [8, 8, 1], [9, 9, 9]]]),
        torch.tensor([[-4.0, -4.5, -5.0, -6.0]]),
    )
    ended = torch.tensor([[True, False, True, False]])
    best = keep_best(finished, grown, ended, penalty=2.0, pad_id=0)
    assert best.ids.tolist() == [[[4, 1, 0], [5, 6, 1]]]
    assert best.scores.tolist() == [[-1.5, -2.0]]
    for ended in ([False] * 4, [False, False, True, True]):  # too late
        same = keep_best(finished, grown, torch.tensor([ended]), 2.0, 0)
        assert same.scores.tolist() == [[-1.5, -3.0]]


@pytest.mark.parametrize(
    "penalty, early_stopping, expected",
    [
        (1.0, True, [False, True]),
        (1.0, False, [False, True]),
        (1.0, "never", [True, True]),
        (0.0, "never", [False, True]),
        (-1.0, "never", [False, True]),
        (2.0, False, [True, True]),
    ],
)
def test_may_improve(penalty, early_stopping, expected):
    running = Beams(torch.zeros(2, 2, 4), torch.tensor([[-2.2, -9]] * 2))
    scores = torch.tensor([[-0.2, -0.5], [-0.2, -torch.inf]])
    finished = Texts(torch.zeros(2, 2, 4), scores)
    active = may_improve(running, finished, 4, 10, penalty, early_stopping)
    assert active.tolist() == expected


def test_with_a_negative_penalty_short_texts_may_win():
    running = Beams(torch.zeros(1, 1, 4), torch.tensor([[-2.2]]))
    finished = Texts(torch.zeros(1, 1, 4), torch.tensor([[-10.0]]))
    assert may_improve(running, finished, 4, 10, -1.0, "never").all()


@pytest.mark.parametrize("penalty", [-16.0, 16.0])
def test_scores_stay_finite_for_every_penalty_that_is_accepted(penalty):
    torch.manual_seed(0)
    model, src = T5(**SMALL), torch.tensor([[3, 8]])
    found = beam_search(
        model, src, length_penalty=penalty, num_return_sequences=4
    )
    assert found.scores.isfinite().all() and (found.scores < 0).all()


# --- Errors ---------------------------------------------------------------


ERRORS = [
    (dict(num_beams=0), "num_beams is 0"),
    (dict(num_beams=2.0), "num_beams is 2.0"),
    (dict(num_return_sequences=5), "num_return_sequences is 5.* 4"),
    (dict(num_return_sequences=0), "num_return_sequences is 0"),
    (dict(early_stopping="always"), "early_stopping is 'always'"),
    (dict(early_stopping=1), "early_stopping is 1"),
    (dict(length_penalty=float("nan")), "length_penalty is nan"),
    (dict(length_penalty=-17), "length_penalty is -17"),
    (dict(length_penalty=12, max_new_tokens=512), "length_penalty is 12"),
    (dict(max_new_tokens=0), "max_new_tokens is 0"),
    (dict(min_new_tokens=65), "min_new_tokens is 65.* 64"),
    (dict(prefix=torch.ones(3, 1).long()), "prefix .*3 .*2 "),
    (dict(mask=torch.ones(2, 4, 4).bool()), "mask has 3"),
]


@pytest.mark.parametrize(
    "options, message", ERRORS, ids=[message for _, message in ERRORS]
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(T5(**SMALL), torch.full((2, 4), 5), **options)
