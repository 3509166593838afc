"""The toy language: what it says, and that its filling is the best."""

import math
from collections import defaultdict
from itertools import combinations, product

import pytest
import torch

from t5_book.span_corruption import corrupt_spans, random_spans_noise_mask
from t5_book.toy_language import END, SLOTS, Source, ToyLanguage


@pytest.fixture(scope="module")
def language():
    return ToyLanguage()


def random_source(seed, states=6, words="abc"):
    """A source in which any state may follow any other."""
    chance = torch.Generator().manual_seed(seed)
    shares = torch.rand(states, states, generator=chance).double() ** 3
    shares /= shares.sum(dim=1, keepdim=True)
    emits = [words[i % len(words)] for i in range(states)]
    pairs = product(range(states), repeat=2)
    edges = [(a, b, shares[a, b].item()) for a, b in pairs]
    return Source(emits, edges), shares


def text_probability(source, shares, text):
    """Sum over all paths, by products of dense matrices."""
    state = torch.zeros(len(shares)).double()
    state[0] = 1
    for word in text:
        state = (state @ shares) * (source.emits == word)
    return state.sum().item()


def masks_of(length, noise, spans):
    for hidden in combinations(range(length), noise):
        mask = torch.zeros(length).bool()
        mask[list(hidden)] = True
        if mask[0] + (mask[1:] & ~mask[:-1]).sum() == spans:
            yield mask


# --- The best filling -----------------------------------------------------


@pytest.mark.parametrize("noise, spans", [(1, 1), (3, 1), (3, 2), (4, 3)])
def test_filling_is_that_of_brute_force(noise, spans):
    """Bayes' rule on the list of all texts and masks, token by token."""
    source, shares = random_source(noise, states=5, words="ab")
    length, masks = 6, list(masks_of(6, noise, spans))
    joint = defaultdict(lambda: defaultdict(float))
    for text in torch.cartesian_prod(*[torch.arange(2)] * length):
        p = text_probability(source, shares, text)
        for mask in masks:
            shown, target = source.cut(text, mask)
            joint[tuple(shown)][tuple(target)] += p
    for shown, targets in list(joint.items())[::3]:
        for target in list(targets)[::2]:
            told = source.read(list(shown), noise, list(target))
            assert len(told) == len(target) == noise + spans
            for i, (log_prob, best) in enumerate(told):
                after = defaultdict(float)
                for other, p in targets.items():
                    if other[:i] == target[:i]:
                        after[other[i]] += p
                total = sum(after.values())
                chance = after[target[i]] / total
                assert math.exp(log_prob) == pytest.approx(chance, abs=1e-9)
                assert after[best] == pytest.approx(max(after.values()))


def test_masks_of_chapter_3_are_among_those():
    drawn = random_spans_noise_mask(12, 0.5, batch=2000)
    some = {tuple(mask.tolist()) for mask in drawn}
    ours = {tuple(mask.tolist()) for mask in masks_of(12, 6, 2)}
    assert len(some) == 25 and some < ours


def test_filling_follows_its_own_choices_without_targets():
    source, _ = random_source(5)
    text = source.sample(1, 9, torch.Generator().manual_seed(0))[0]
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 0]).bool()
    shown, _ = source.cut(text, mask)
    own = [best for _, best in source.read(shown, 4)]
    assert own.count(END) == 3 and len(own) == 4 + 3
    again = source.read(shown, 4, own)
    assert [best for _, best in again] == own


def test_filling_lies_as_the_labels_do(language):
    chance = torch.Generator().manual_seed(0)
    texts = language.sample(3, 64, chance)
    mask = random_spans_noise_mask(64, batch=3, generator=chance)
    log_prob, best = language.fill(texts, mask)
    source, target = language.cut(texts[1], mask[1])
    told = [p for p, _ in language.read(source, 10, target)]
    assert log_prob[1].tolist() == [0.0, *told]
    labels = corrupt_spans(texts + 3, mask, first_sentinel=999).labels
    assert log_prob.shape == best.shape == labels.shape == (3, 14)
    assert log_prob.dtype == torch.float64 and best.dtype == torch.int64
    assert (log_prob <= 1e-12).all() and (log_prob[:, 0] == 0).all()
    assert (best[:, -1] == END).all() and (log_prob[:, -1] > -1e-9).all()
    certain = log_prob > math.log(0.99)
    words = (labels < 900) & (labels > 1)
    assert torch.equal(best[certain & words], labels[certain & words] - 3)
    assert (best[certain & ~words] == END).all()


def test_no_reader_is_better():
    """A reader of another language loses, on average: Gibbs' inequality."""
    source, _ = random_source(1)
    other, _ = random_source(2)
    chance = torch.Generator().manual_seed(3)
    texts = source.sample(100, 12, chance)
    mask = random_spans_noise_mask(12, 0.4, batch=100, generator=chance)
    best, worse = source.fill(texts, mask), other.fill(texts, mask)
    assert best.log_prob.sum() > worse.log_prob.sum() + 1


def test_long_texts_do_not_vanish(language):
    chance = torch.Generator().manual_seed(0)
    texts = language.sample(1, 200, chance)
    mask = random_spans_noise_mask(200, batch=1, generator=chance)
    log_prob = language.fill(texts, mask).log_prob
    assert log_prob.shape == (1, 41) and log_prob.isfinite().all()


# --- The text -------------------------------------------------------------


def test_text_is_drawn_with_the_probabilities_of_the_source():
    source, shares = random_source(7)
    texts = source.sample(40_000, 3, torch.Generator().manual_seed(0))
    index = texts @ torch.tensor([9, 3, 1])
    seen = index.bincount(minlength=27)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    p = torch.tensor([text_probability(source, shares, t) for t in every])
    chi_square = ((seen - 40_000 * p) ** 2 / (40_000 * p)).sum()
    assert chi_square < 64  # 26 degrees of freedom: once in 20,000


def test_text_is_a_function_of_the_seed(language):
    draw = [language.sample(4, 64, torch.Generator().manual_seed(s))
            for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert draw[0].shape == (4, 64) and draw[0].dtype == torch.int64


def test_language_keeps_its_promises(language):
    """Agreement, pronouns, days in order, counting and sums."""
    chance = torch.Generator().manual_seed(0)
    text = language.text(language.sample(1, 40_000, chance)[0])
    sentences = [s.split() for s in text.split(" . ")[:-1]]
    girls, week = SLOTS["girl"].split(", "), SLOTS["day next third last"]
    after = {d.split()[0]: d.split()[1] for d in week.split(", ")}
    number = "zero one two three four five six seven eight".split().index
    counted = {k: 0 for k in ("likes", "verb", "day", "sum")}
    for before, now in zip(sentences, sentences[1:]):
        if now[1:2] == ["likes"] and now[4:] and now[5] in ("he", "she"):
            counted["likes"] += 1
            assert (now[5] == "she") == (now[0] in girls)
        if "hungry" in now:
            counted["verb"] += 1
            assert ("are" in now) == now[1].endswith("s")
        if now[0] == "on" and before[0] == "on" and now[4] != "one":
            counted["day"] += 1
            assert now[1] == after[before[1]]
            assert number(now[4]) == number(before[4]) + 1
        if "plus" in now:
            counted["sum"] += 1
            assert number(now[0]) == number(now[2]) + number(now[4])
    assert min(counted.values()) > 50


def test_language_has_the_size_that_the_book_states(language):
    assert 100 <= len(language.words) <= 150
    assert len(language.words) == 123
    assert language.words == sorted(language.words)


def test_most_words_are_certain(language):
    chance = torch.Generator().manual_seed(1)
    texts = language.sample(30, 64, chance)
    mask = random_spans_noise_mask(64, batch=30, generator=chance)
    log_prob = language.fill(texts, mask).log_prob
    target = [[END, *language.cut(t, m)[1]] for t, m in zip(texts, mask)]
    words = torch.tensor(target) != END
    assert (log_prob[words] > math.log(0.99)).double().mean() > 0.6


# --- Errors ---------------------------------------------------------------


def test_probabilities_must_sum_to_one():
    with pytest.raises(ValueError, match="off 1 by 0.2000"):
        Source(["a", "b"], [(0, 1, 0.8), (1, 0, 1.0)])


def test_a_text_outside_the_language_is_refused(language):
    texts = torch.zeros(1, 64).long() + language.words.index("the")
    mask = random_spans_noise_mask(64)
    with pytest.raises(ValueError, match="cannot say"):
        language.fill(texts, mask)


def test_texts_and_masks_are_checked(language):
    texts, mask = language.sample(2, 64), random_spans_noise_mask(64, batch=2)
    with pytest.raises(TypeError, match="boolean"):
        language.fill(texts, mask.long())
    with pytest.raises(TypeError, match="integer"):
        language.fill(texts.float(), mask)
    with pytest.raises(ValueError, match=r"\(1, 64\).*\(1, 60\)"):
        language.fill(texts, mask[:, :60])
    with pytest.raises(ValueError):
        language.fill(texts, mask[:1])
