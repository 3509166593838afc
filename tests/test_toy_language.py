"""The toy language: what it says, and that its filling is the best."""

import math
from collections import defaultdict
from itertools import combinations, product

import pytest
import torch

from t5_book.span_corruption import corrupt_spans, random_spans_noise_mask
from t5_book.toy_language import (
    BOYS,
    CHOICES,
    DAYS,
    END,
    GAP,
    GIRLS,
    NUMBERS,
    STORIES,
    MarkovSource,
    Story,
    ToyLanguage,
)


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
    return MarkovSource(emits, edges), shares


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
        for answer in list(answers)[::2]:
            tokens = source.read(list(shown), noise, list(answer))
            assert len(tokens) == len(answer) == noise + spans
            for i, (log_prob, best) in enumerate(tokens):
                after = defaultdict(float)
                for other, p in answers.items():
                    if other[:i] == answer[:i]:
                        after[other[i]] += p
                total = sum(after.values())
                chance = after[answer[i]] / total
                assert math.exp(log_prob) == pytest.approx(chance, abs=1e-9)
                assert after[best] == pytest.approx(max(after.values()))


def test_drawn_masks_are_among_those():
    drawn = random_spans_noise_mask(12, 0.5, batch=2000)
    some = {tuple(mask.tolist()) for mask in drawn}
    ours = {tuple(mask.tolist()) for mask in masks_of(12, 6, 2)}
    assert len(some) == 25 and some < ours


def test_filling_follows_its_own_choices_without_an_answer():
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
    shown, answer = language.cut(texts[1], mask[1])
    read = [p for p, _ in language.read(shown, 10, answer)]
    assert log_prob[1].tolist() == [0.0, *read]
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
    with pytest.raises(ValueError, match="cannot say"):
        source.read([0, GAP], 1)


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
    after = {day: DAYS[(i + 1) % 7] for i, day in enumerate(DAYS)}
    number = NUMBERS.index
    counted = {k: 0 for k in ("likes", "verb", "day", "sum")}
    for before, now in zip(sentences, sentences[1:]):
        if now[1:2] == ["likes"] and now[4:] and now[5] in ("he", "she"):
            counted["likes"] += 1
            assert (now[5] == "she") == (now[0] in GIRLS)
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


def test_choices_and_stories_are_as_frequent_as_they_should_be(language):
    """Each within 4.5 standard deviations of its expected number."""
    chance = torch.Generator().manual_seed(1)
    rows = [language.text(row) for row in language.sample(40, 2500, chance)]
    sentences = [s.split() for row in rows for s in row.split(" . ")[:-1]]
    finds = [s for s in sentences if s[1] in CHOICES["FINDS"] and s[2] == "a"]
    mine = [s for s in sentences if s[0] in CHOICES["MY"] and "but" in s]
    both = [s for s in sentences if {*s} & {*GIRLS} and {*s} & {*BOYS}]
    meets = [s for s in sentences if "meets" in s]
    days = [s for s in sentences if s[0] == "on" and "one" in s]
    sums = [s for s in sentences if "plus" in s]
    follow = [s for s in both if "meets" not in s]

    def check(part, whole, p):
        expected, count = len(whole) * p, len(part)
        assert expected > 50
        assert abs(count - expected) < 4.5 * (expected * (1 - p)) ** 0.5

    # choices: one of three, of two; one of eight people, half of them girls
    check([s for s in finds if s[1] == "buys"], finds, 1 / 3)
    check([s for s in mine if s[0] == "my"], mine, 1 / 2)
    check([s for s in finds if s[0] in GIRLS], finds, 1 / 2)
    # sentences of a story, and stories
    check([s for s in follow if "helps" in s], follow, 1 / 3)
    check(sums, sums + meets, 1 / 2)
    check(sums, sums + days, 1 / 2)
    check(sums, sums + finds, 1 / 2)


def test_stories_end_as_often_as_they_should(language):
    """After each sentence that follows the opening, one time in five."""
    chance = torch.Generator().manual_seed(2)
    rows = [language.text(row) for row in language.sample(10, 10_000, chance)]
    text = " . ".join(rows).split(" . ")
    meets = sum(" meets " in sentence for sentence in text)
    helps = sum(" helps " in sentence for sentence in text)
    # a third of five sentences: mean 5/3, standard deviation (40/9)**0.5
    assert meets > 300
    assert abs(helps / meets - 5 / 3) < 4.5 * (40 / 9 / meets) ** 0.5


def test_a_language_of_ones_own():
    story = Story(
        remembers=[[{"pet": "cat"}, {"pet": "dog"}]],
        opening=["a {pet} sat", "so it slept"],
        more=["my {pet} is BIG"],
    )
    source = ToyLanguage([story])
    words = {".", *"a cat dog sat so it slept my is big small".split()}
    assert source.words == sorted(words)
    text = source.text(source.sample(1, 2000, torch.Generator().manual_seed(0))[0])
    pet = None
    for sentence in text.split(" . ")[:-1]:
        if sentence.startswith("a "):
            pet = sentence.split()[1]
        elif sentence != "so it slept":
            assert sentence in (f"my {pet} is big", f"my {pet} is small")


def test_every_capital_is_a_choice():
    """A misspelt choice would be said as it stands."""
    lines = [line for story in STORIES for line in [*story.opening, *story.more]]
    capitals = {word for line in lines for word in line.split() if word.isupper()}
    assert capitals == set(CHOICES)


def test_language_has_the_size_that_the_book_states(language):
    assert 100 <= len(language.words) <= 150
    assert len(language.words) == 123
    assert language.words == sorted(language.words)


def test_most_words_are_certain(language):
    chance = torch.Generator().manual_seed(1)
    texts = language.sample(30, 64, chance)
    mask = random_spans_noise_mask(64, batch=30, generator=chance)
    log_prob = language.fill(texts, mask).log_prob
    answers = [[END, *language.cut(t, m)[1]] for t, m in zip(texts, mask)]
    words = torch.tensor(answers) != END
    assert (log_prob[words] > math.log(0.99)).double().mean() > 0.6


# --- Errors ---------------------------------------------------------------


def test_probabilities_must_sum_to_one():
    with pytest.raises(ValueError, match="state 0, 'a', sum to 0.8000"):
        MarkovSource(["a", "b"], [(0, 1, 0.8), (1, 0, 1.0)])
    with pytest.raises(ValueError, match="state 1, 'b', sum to 0.0000"):
        MarkovSource(["a", "b"], [(0, 1, 1.0)])
    with pytest.raises(ValueError, match="1 to 0 has probability -0.5"):
        MarkovSource(["a", "b"], [(0, 1, 1.0), (1, 0, -0.5), (1, 1, 1.5)])


@pytest.mark.parametrize("edge", [(0, 2, 1.0), (0, -1, 1.0), (2, 0, 1.0)])
def test_edges_must_lead_somewhere(edge):
    with pytest.raises(ValueError, match=f"{edge[0]} to {edge[1]}.* 0 to 1"):
        MarkovSource(["a", "b"], [edge])


def test_a_text_outside_the_language_is_refused(language):
    texts = torch.zeros(1, 64).long() + language.words.index("the")
    mask = random_spans_noise_mask(64)
    with pytest.raises(ValueError, match="cannot say.* 10 words"):
        language.fill(texts, mask)


def test_a_wrong_word_in_a_gap_is_refused():
    """It has probability 0, and nothing that follows has any at all."""
    source = MarkovSource([".", "a", "b"], [(0, 1, 0.5), (0, 2, 0.5), (1, 0, 1.0), (2, 2, 1.0)])
    stop, a, b = range(3)
    with pytest.raises(ValueError, match="token 1 .* 'b', .*cannot say"):
        source.read([GAP, stop, a], 1 + 2, [a, b, END])
    with pytest.raises(ValueError, match="token 0 .*the end of the gap"):
        source.read([GAP, stop, a], 1, [END])


def test_texts_and_masks_are_checked(language):
    texts, mask = language.sample(2, 64), random_spans_noise_mask(64, batch=2)
    with pytest.raises(TypeError, match="boolean"):
        language.fill(texts, mask.long())
    with pytest.raises(TypeError, match="integer"):
        language.fill(texts.float(), mask)
    with pytest.raises(ValueError, match=r"\(1, 64\).*\(1, 60\)"):
        language.fill(texts[:1], mask[:1, :60])
    with pytest.raises(ValueError, match=r"\(2, 64\).*\(1, 64\)"):
        language.fill(texts, mask[:1])
    with pytest.raises(ValueError, match=r"\(64,\)"):
        language.fill(texts[0], mask[0])


def test_rows_with_more_or_fewer_hidden_words_are_refused(language):
    texts = language.sample(2, 64, torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0, 10:12] = mask[1, 10:13] = True
    with pytest.raises(ValueError, match="4 to 5 tokens"):
        language.fill(texts, mask)
