"""Beam search against ``transformers`` and brute force."""

from inspect import signature
from itertools import product

import pytest
import torch

from t5_book.beams import Beams, Texts, beam_search, may_improve
from t5_book.generation import generate
from t5_book.t5 import T5
from tests.conftest import (
    FAMILIES,
    cut,
    make_ending_writers,
    refuses,
    seeded,
    small_t5,
    sources,
    with_ids,
    write_with_reference,
)

pytestmark = pytest.mark.rounding

PENALTIES = [0.0, 0.6, 1.0, 2.0]
STOPPING = [False, True, "never"]
FEW = dict(enc_num_tokens=9, dec_num_tokens=5, tie_token_emb=False, tie_head=False)


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
        ids, scores = beam_search(ours, *inputs, use_cache=use_cache, **options)
        assert ids.shape == expected.shape and ids.dtype == torch.int64
        assert cut(ids, eos, p) == cut(expected, eos, p), options
        for row, text in zip(ids.tolist(), cut(ids, eos, p)):
            assert set(row[len(text) :]) <= {0}
        assert (scores - theirs.sequences_scores).abs().max() <= 1e-5
    return ids


# --- Agreement with transformers ------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_token_for_token(family):
    pair, found = make_ending_writers(family), {}
    for penalty, early in product(PENALTIES, STOPPING):
        options = dict(length_penalty=penalty, early_stopping=early)
        ids = assert_same(pair, *sources(12), num_return_sequences=4, **options)
        found[penalty, early] = str(ids.tolist())
    if family == "t5":  # the options make a difference
        assert len({found[penalty, False] for penalty in PENALTIES}) == 4
        for penalty in (1.0, 2.0):
            assert len({found[penalty, early] for early in STOPPING}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_other_options(family):
    pair = make_ending_writers(family)
    assert_same(pair, sources()[0])
    for w in (2, 3, 7):
        assert_same(pair, *sources(), num_beams=w, num_return_sequences=w)
    for p, least in [(0, 1), (0, 6), (1, 0), (3, 4)]:
        options = dict(min_new_tokens=least, num_return_sequences=2)
        prefix = sources(5, max(p, 1), seed=7)[0][:, :p]
        if p:
            options["prefix"] = prefix
        ids = assert_same(pair, *sources(), **options)
        assert torch.equal(ids[:, :p], prefix.repeat_interleave(2, dim=0))
        assert min(map(len, cut(ids, pair[0].config.eos_id, p))) > p + least


def test_a_text_may_end_right_after_the_least_length():
    ours = make_ending_writers("t5", seed=1)[0]
    for least in range(1, 6):
        options = dict(num_return_sequences=4, length_penalty=0.0, max_new_tokens=8)
        ids = beam_search(ours, *sources(12), min_new_tokens=least, **options).ids
        assert min(map(len, cut(ids, ours.config.eos_id))) == least + 1


# --- Against brute force --------------------------------------------------


@torch.no_grad()
def log_probability(model, src, text):
    """Log-probability of a text, by the whole model."""
    labels = torch.tensor([text])
    logits = model(src, model.shift_right(labels)).double()
    return logits.log_softmax(-1).gather(2, labels[..., None]).sum().item()


def test_with_enough_beams_it_finds_every_text():
    """Every text of at most 3 of the 5 tokens that ends with 1 or is stopped."""
    model, src = small_t5(**FEW, pad_id=2).double().eval(), torch.tensor([[3, 8]])
    model.head.weight.data *= 3
    others = [0, 2, 3, 4]
    texts = [list(text) for text in product(others, repeat=3)]
    for n in range(3):
        texts += [[*start, 1] for start in product(others, repeat=n)]
    assert len(texts) == 85
    sums = [log_probability(model, src, text) for text in texts]
    for penalty, early in product([0.0, 1.0, 2.0], STOPPING):
        scored = [
            (total / len(text) ** penalty, text) for text, total in zip(texts, sums)
        ]
        scored.sort(reverse=True)
        ids, scores = beam_search(
            model, src, num_beams=90, num_return_sequences=90, max_new_tokens=3,
            length_penalty=penalty, early_stopping=early,
        )  # fmt: skip
        padded = [text + [2] * (3 - len(text)) for _, text in scored]
        # There are no more texts than that.
        assert ids.tolist() == padded + [[2, 2, 2]] * 5, (penalty, early)
        expected = torch.tensor([score for score, _ in scored], dtype=torch.float64)
        assert (scores[:85] - expected).abs().max() <= 1e-9
        assert (scores[85:] == -torch.inf).all()


# --- Its own properties ---------------------------------------------------


def test_scores_are_sums_over_a_power_of_the_length(model):
    model, (src, mask) = with_ids(model).float(), sources(3)
    for penalty in PENALTIES:
        options = dict(length_penalty=penalty, max_new_tokens=8)
        ids, scores = beam_search(model, src, mask, **options)
        assert scores.dtype == torch.float32
        for row, text in enumerate(cut(ids, model.config.eos_id)):
            total = log_probability(model, src[row][mask[row]][None], text)
            expected = total / len(text) ** penalty
            assert scores[row].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("penalty", [-16.0, 16.0])
def test_scores_stay_finite_for_every_penalty_that_is_accepted(penalty):
    options = dict(length_penalty=penalty, num_return_sequences=4)
    scores = beam_search(small_t5(**FEW), torch.tensor([[3, 8]]), **options).scores
    assert scores.isfinite().all() and (scores < 0).all()


def calls_of(part):
    """The shapes that a part of a model gets, call by call."""
    shapes = []
    part.register_forward_pre_hook(
        lambda part, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    return shapes


def test_sources_are_read_once_and_tokens_one_by_one(model):
    model, (src, mask) = with_ids(model), sources(3, 6)
    read, wrote = calls_of(model.encoder), calls_of(model.decoder)
    projected = calls_of(model.decoder.blocks[0].cross_attention.k)
    options = dict(prefix=sources(3, 2)[0], min_new_tokens=4)
    beam_search(model, src, mask, num_beams=5, **options)
    assert read == [(3, 6)] and projected == [(3, 6)]
    assert wrote[0] == (15, 3) and set(wrote[1:]) == {(15, 1)}


def test_with_a_negative_penalty_short_texts_may_win():
    running = Beams(torch.zeros(1, 1, 4), torch.tensor([[-2.2]]))
    finished = Texts(torch.zeros(1, 1, 4), torch.tensor([[-10.0]]))
    assert may_improve(running, finished, 4, 10, -1.0, "never").all()


def test_early_stopping_saves_steps(model):
    model, differ = with_ids(model), 0
    wrote = calls_of(model.decoder)
    for src in sources(6)[0].split(1):
        steps = []
        for early_stopping in (True, False, "never"):
            wrote.clear()
            options = dict(early_stopping=early_stopping, max_new_tokens=20)
            beam_search(model, src, **options)
            steps.append(len(wrote))
        assert steps == sorted(steps)
        differ += len(set(steps)) == 3
    assert differ


def test_dropout_is_off_and_nothing_is_left_behind():
    model, src = small_t5(**FEW, dropout=0.5).train(), torch.tensor([[3, 8], [2, 5]])
    first = beam_search(model, src, max_new_tokens=6)
    assert torch.equal(first.ids, beam_search(model, src, max_new_tokens=6).ids)
    assert model.training and not first.scores.requires_grad


# --- The method -----------------------------------------------------------


def test_the_method_does_either(model):
    src, mask = sources()
    options = dict(num_beams=3, length_penalty=0.6, num_return_sequences=2)
    options |= dict(early_stopping=True, min_new_tokens=3, max_new_tokens=9)
    options |= dict(prefix=sources(5, 2, seed=7)[0], use_cache=False)
    expected = beam_search(model, src, mask, **options).ids
    assert torch.equal(model.generate(src, mask, **options), expected)
    greedy = generate(model, src, mask, max_new_tokens=7)
    # What has no effect on one beam may stay, so that widths can be compared.
    options = dict(length_penalty=0.6, early_stopping="never", max_new_tokens=7)
    assert torch.equal(model.generate(src, mask, **options), greedy)
    options["num_beams"] = 1
    assert torch.equal(beam_search(model, src, mask, **options).ids, greedy)
    options = dict(do_sample=True, temperature=2.0, top_k=9, top_p=0.8)
    options |= dict(max_new_tokens=6, use_cache=False)
    sampled = model.generate(src, mask, generator=seeded(2), **options)
    expected = generate(model, src, mask, generator=seeded(2), **options)
    assert torch.equal(sampled, expected)


def test_the_method_has_the_options_of_both():
    method = signature(T5.generate).parameters
    for function in (generate, beam_search):
        for name, parameter in signature(function).parameters.items():
            assert method[name].kind == parameter.kind
            if name != "num_beams":  # one beam by default
                assert method[name].default == parameter.default
    assert method["num_beams"].default == 1


def test_what_cannot_be():
    model, src = small_t5(**FEW), torch.full((2, 4), 5)
    nan, ids = float("nan"), torch.ones(3, 1).long()
    for options, *words in [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"num_return_sequences": 5}, "num_return_sequences is 5", 4),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"length_penalty": nan}, "length_penalty is nan"),
        ({"length_penalty": -17}, "length_penalty is -17"),
        ({"length_penalty": 12, "max_new_tokens": 512}, "length_penalty is 12"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 65}, "min_new_tokens is 65", 64),
        ({"prefix": ids}, "prefix", 3, 2),
        ({"mask": torch.ones(2, 4, 4).bool()}, "mask has 3"),
    ]:
        refuses(lambda: beam_search(model, src, **options), *words)
    for options, *words in [
        ({"do_sample": True}, "num_beams is 2", "do_sample=False"),
        ({"top_k": 3}, "top_k", "do_sample"),
        ({"temperature": 0.5}, "temperature", "do_sample"),
        ({"streamer": print}, "num_beams is 2", "stream"),
        ({"num_beams": 1, "num_return_sequences": 2}, "sequences is 2", 1),
        ({"num_beams": 0}, "num_beams is 0"),
    ]:
        options = {"num_beams": 2} | options
        refuses(lambda: model.generate(src, **options), *words)
