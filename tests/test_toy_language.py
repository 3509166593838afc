"""The toy language: what it says, and that its filling is the best."""

import functools
import math
from collections import defaultdict
from itertools import combinations, product

import pytest
import torch

from t5_book import toy_language as toy
from t5_book.span_corruption import corrupt_spans, random_spans_noise_mask
from t5_book.toy_language import CHOICES, END, GAP, MarkovSource, Story, ToyLanguage
from tests.conftest import refuses, seeded

LANGUAGE = ToyLanguage()


def random_source(seed, states=6, words="abc"):
    """A source in which any state may follow any other."""
    shares = torch.rand(states, states, generator=seeded(seed)).double() ** 3
    shares /= shares.sum(dim=1, keepdim=True)
    emits = [words[i % len(words)] for i in range(states)]
    pairs = product(range(states), repeat=2)
    return MarkovSource(emits, [(a, b, shares[a, b].item()) for a, b in pairs]), shares


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
            shown, answer = source.cut(text, mask)
            joint[tuple(shown)][tuple(answer)] += p
    for shown, answers in list(joint.items())[::3]:
        # Without an answer, it follows its own choices.
        own = [best for _, best in source.read(list(shown), noise)]
        assert own.count(END) == spans and len(own) == noise + spans
        assert [best for _, best in source.read(list(shown), noise, own)] == own
        for answer in list(answers)[::2]:
            tokens = source.read(list(shown), noise, list(answer))
            assert len(tokens) == len(answer) == noise + spans
            for i, (log_prob, best) in enumerate(tokens):
                after = defaultdict(float)
                for other, p in answers.items():
                    if other[:i] == answer[:i]:
                        after[other[i]] += p
                chance = after[answer[i]] / sum(after.values())
                assert math.exp(log_prob) == pytest.approx(chance, abs=1e-9)
                assert after[best] == pytest.approx(max(after.values()))


def test_filling_lies_as_the_labels_do_and_most_words_are_certain():
    texts = LANGUAGE.sample(12, 64, seeded(0))
    mask = random_spans_noise_mask(64, batch=12, generator=seeded(0))
    log_prob, best = LANGUAGE.fill(texts, mask)
    shown, answer = LANGUAGE.cut(texts[1], mask[1])
    assert log_prob[1].tolist() == [0.0, *[p for p, _ in LANGUAGE.read(shown, 10, answer)]]
    labels = corrupt_spans(texts + 3, mask, first_sentinel=999).labels
    assert log_prob.shape == best.shape == labels.shape == (12, 14)
    assert log_prob.dtype == torch.float64 and best.dtype == torch.int64
    assert (log_prob <= 1e-12).all() and (log_prob[:, 0] == 0).all()
    assert (best[:, -1] == END).all() and (log_prob[:, -1] > -1e-9).all()
    certain = log_prob > math.log(0.99)
    words = (labels < 900) & (labels > 1)
    assert torch.equal(best[certain & words], labels[certain & words] - 3)
    assert (best[certain & ~words] == END).all()
    assert certain[words].double().mean() > 0.6
    # In long texts, small numbers do not vanish.
    mask = random_spans_noise_mask(200, generator=seeded(0))
    log_prob = LANGUAGE.fill(LANGUAGE.sample(1, 200, seeded(0)), mask).log_prob
    assert log_prob.shape == (1, 41) and log_prob.isfinite().all()


def test_a_word_that_no_edge_leads_to():
    """State 0 says a word that never comes up in a text."""
    source = MarkovSource([".", "a", "b"], [(0, 1, 1.0), (1, 2, 1.0), (2, 1, 1.0)])
    texts = source.sample(2, 8)
    assert source.text(texts[0]) == "a b a b a b a b"
    mask = random_spans_noise_mask(8, 0.5, batch=2)
    log_prob, best = source.fill(texts, mask)
    assert (log_prob == 0).all()
    for row, text, hidden in zip(best, texts, mask):
        assert row[row != END].tolist() == text[hidden].tolist()
    refuses(lambda: source.read([0, GAP], 1), "cannot say")


# --- The text -------------------------------------------------------------


def test_text_is_drawn_with_the_probabilities_of_the_source():
    source, shares = random_source(7)
    texts = source.sample(40_000, 3, seeded(0))
    assert torch.equal(source.sample(40_000, 3, seeded(0)), texts)
    assert texts.shape == (40_000, 3) and texts.dtype == torch.int64
    seen = (texts @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    p = torch.tensor([text_probability(source, shares, t) for t in every])
    chi_square = ((seen - 40_000 * p) ** 2 / (40_000 * p)).sum()
    assert chi_square < 64  # 26 degrees of freedom: once in 20,000


@functools.cache
def sentences_of_rows() -> list[list[list[str]]]:
    """Long texts, as lists of their whole sentences, which are lists of words."""
    rows = [LANGUAGE.text(row) for row in LANGUAGE.sample(40, 2500, seeded(1))]
    return [[s.split() for s in row.split(" . ")[:-1]] for row in rows]


def test_language_keeps_its_promises():
    """Agreement, pronouns, days in order, counting and sums."""
    after = {day: toy.DAYS[(i + 1) % 7] for i, day in enumerate(toy.DAYS)}
    number = toy.NUMBERS.index
    counted = dict.fromkeys(("likes", "verb", "day", "sum"), 0)
    for sentences in sentences_of_rows():
        for before, now in zip(sentences, sentences[1:]):
            if now[1:2] == ["likes"] and now[4:] and now[5] in ("he", "she"):
                counted["likes"] += 1
                assert (now[5] == "she") == (now[0] in toy.GIRLS)
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


def test_choices_and_stories_are_as_frequent_as_they_should_be():
    """Each within 4.5 standard deviations of its expected number."""
    sentences = sum(sentences_of_rows(), [])
    finds = [s for s in sentences if s[1] in CHOICES["FINDS"] and s[2] == "a"]
    mine = [s for s in sentences if s[0] in CHOICES["MY"] and "but" in s]
    both = [s for s in sentences if {*s} & {*toy.GIRLS} and {*s} & {*toy.BOYS}]
    meets = [s for s in sentences if "meets" in s]
    follow = [s for s in both if "meets" not in s]
    helps = [s for s in follow if "helps" in s]
    days = [s for s in sentences if s[0] == "on" and "one" in s]
    sums = [s for s in sentences if "plus" in s]
    for name, part, whole, p in [
        # choices: one of three, of two; one of eight people, half of them girls
        ("buys", [s for s in finds if s[1] == "buys"], finds, 1 / 3),
        ("my", [s for s in mine if s[0] == "my"], mine, 1 / 2),
        ("girls", [s for s in finds if s[0] in toy.GIRLS], finds, 1 / 2),
        # sentences of a story, and stories
        ("helps", helps, follow, 1 / 3),
        ("meets", sums, sums + meets, 1 / 2),
        ("days", sums, sums + days, 1 / 2),
        ("finds", sums, sums + finds, 1 / 2),
    ]:
        expected = len(whole) * p
        assert expected > 50, name
        assert abs(len(part) - expected) < 4.5 * (expected * (1 - p)) ** 0.5, name
    # A story ends after a sentence behind its opening one time in five. So
    # there are a third of five: mean 5/3, standard deviation (40/9)**0.5.
    assert len(meets) > 300
    error = len(helps) / len(meets) - 5 / 3
    assert abs(error) < 4.5 * (40 / 9 / len(meets)) ** 0.5


def test_a_language_of_ones_own():
    story = Story(
        remembers=[[{"pet": "cat"}, {"pet": "dog"}]],
        opening=["a {pet} sat", "so it slept"],
        more=["my {pet} is BIG"],
    )
    source = ToyLanguage([story])
    assert source.words == sorted({".", *"a cat dog sat so it slept my is big small".split()})
    pet = None
    for sentence in source.text(source.sample(1, 2000, seeded(0))[0]).split(" . ")[:-1]:
        if sentence.startswith("a "):
            pet = sentence.split()[1]
        elif sentence != "so it slept":
            assert sentence in (f"my {pet} is big", f"my {pet} is small")


def test_words_are_those_that_the_book_states():
    assert len(LANGUAGE.words) == 123 and LANGUAGE.words == sorted(LANGUAGE.words)
    # A misspelt choice would be said as it stands.
    lines = [line for story in toy.STORIES for line in [*story.opening, *story.more]]
    capitals = {word for line in lines for word in line.split() if word.isupper()}
    assert capitals == set(CHOICES)


# --- Errors ---------------------------------------------------------------


def test_edges_that_lead_nowhere_or_do_not_sum_to_one_are_refused():
    for edges, words in [
        ([(0, 1, 0.8), (1, 0, 1.0)], ["state 0", "'a'", "0.8000"]),
        ([(0, 1, 1.0)], ["state 1", "'b'", "0.0000"]),
        ([(0, 1, 1.0), (1, 0, -0.5), (1, 1, 1.5)], ["1 to 0", "-0.5"]),
        ([(0, 2, 1.0)], ["0 to 2", "0 to 1"]),
        ([(0, -1, 1.0)], ["0 to -1", "0 to 1"]),
        ([(2, 0, 1.0)], ["2 to 0", "0 to 1"]),
    ]:
        refuses(lambda: MarkovSource(["a", "b"], edges), *words)


def test_a_wrong_word_in_a_gap_is_refused():
    """It has probability 0, and nothing that follows has any at all."""
    edges = [(0, 1, 0.5), (0, 2, 0.5), (1, 0, 1.0), (2, 2, 1.0)]
    source = MarkovSource([".", "a", "b"], edges)
    stop, a, b = range(3)
    refuses(lambda: source.read([GAP, stop, a], 1 + 2, [a, b, END]), "token 1", "'b'")
    refuses(lambda: source.read([GAP, stop, a], 1, [END]), "token 0", "end of the gap")


def test_texts_and_masks_that_do_not_fit_are_refused():
    texts = LANGUAGE.sample(2, 64, seeded(0))
    mask = random_spans_noise_mask(64, batch=2)
    uneven = torch.zeros(2, 64).bool()
    uneven[0, 10:12] = uneven[1, 10:13] = True
    outside = torch.full((2, 64), LANGUAGE.words.index("the"))
    for text, hidden, words, error in [
        (texts, mask.long(), ["boolean"], TypeError),
        (texts.float(), mask, ["integer"], TypeError),
        (texts[:1], mask[:1, :60], ["(1, 64)", "(1, 60)"], ValueError),
        (texts, mask[:1], ["(2, 64)", "(1, 64)"], ValueError),
        (texts[0], mask[0], ["(64,)"], ValueError),
        (texts, uneven, ["4 to 5 tokens"], ValueError),
        (outside, mask, ["cannot say", "10 words"], ValueError),
    ]:
        refuses(lambda: LANGUAGE.fill(text, hidden), *words, error=error)
