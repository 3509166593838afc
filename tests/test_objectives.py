"""Objectives against t5's rules, written out token by token."""

from collections import Counter
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.objectives import (
    UL2,
    SpecialIds,
    bert_denoising,
    denoise,
    deshuffling,
    drop_noise,
    iid_denoising,
    keep_noise,
    prefix_lm,
    span_denoising,
    ul2_denoising,
)
from t5_book.span_corruption import noise_counts, restore_spans
from t5_book.tokenizer import Tokenizer

EOS, FIRST = 1, 999  # words are 3 to 899, sentinels 900 to 999
IDS = SpecialIds(FIRST)
MODES = {"R": [4], "S": [5, 6], "X": [7, 8, 9]}
many = settings(max_examples=100, deadline=None, derandomize=True)


def ul2(tokens, ids, *, generator=None):
    return ul2_denoising(tokens, ids, MODES, generator=generator)


OBJECTIVES = {
    "spans": span_denoising,
    "iid": iid_denoising,
    "bert": bert_denoising,
    "prefix": prefix_lm,
    "deshuffle": deshuffling,
    "ul2": ul2,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Words that differ within each row."""
    keys = torch.rand(rows, 897, generator=seeded(seed))
    return keys.argsort(dim=1)[:, :length] + 3


def rows_of(batch) -> list[tuple[list[int], list[int]]]:
    """Source and target of each example, without padding."""
    return [
        (src[mask].tolist(), labels[labels != -100].tolist())
        for src, mask, labels in zip(*batch)
    ]


def chi_square(seen: Counter, outcomes: list) -> float:
    """How far from equally likely; of n outcomes, n - 1 are free."""
    assert set(seen) <= set(outcomes)
    share = sum(seen.values()) / len(outcomes)
    return sum((seen[o] - share) ** 2 / share for o in outcomes)


# --- What all of them have in common ---------------------------------------


def restore(name: str, source: list[int], target: list[int]) -> list[int]:
    """The text, from an example without padding; one rule for each."""
    assert source[-1] == target[-1] == EOS
    if name in ("bert", "deshuffle"):
        return target[:-1]
    if name == "prefix":
        return source[:-1] + target[:-1]
    if name == "ul2":
        (mode,) = [m for m in MODES.values() if m[0] == source[0]]
        assert source[: len(mode)] == mode
        source = source[len(mode) :]
    pair = torch.tensor([source]), torch.tensor([target])
    return restore_spans(*pair, FIRST)[0]


sizes = st.tuples(st.integers(1, 4), st.integers(2, 300))


@many
@given(st.sampled_from(sorted(OBJECTIVES)), sizes, st.integers(0, 2**31))
def test_nothing_is_lost(name, size, seed):
    tokens = texts(*size, seed).clamp(min=10)
    before = tokens.clone()
    batch = OBJECTIVES[name](tokens, IDS, generator=seeded(seed))
    for row, (source, target) in zip(tokens.tolist(), rows_of(batch)):
        assert restore(name, source, target) == row
    assert torch.equal(tokens, before)


@many
@given(st.sampled_from(sorted(OBJECTIVES)), sizes, st.integers(0, 2**31))
def test_batches_are_those_of_corrupt_spans(name, size, seed):
    ids = SpecialIds(FIRST, num_sentinels=90, eos_id=2, pad_id=1)
    tokens = texts(*size, seed).int()
    src, mask, labels = OBJECTIVES[name](tokens, ids, generator=seeded(seed))
    assert src.dtype == labels.dtype == torch.int64
    assert mask.dtype == torch.bool and mask.shape == src.shape
    assert len(src) == len(labels) == size[0]
    for row, real in zip(src.tolist(), mask.tolist()):
        n = sum(real)
        assert real == [True] * n + [False] * (len(row) - n)
        assert row[n - 1] == 2 and row[n:] == [1] * (len(row) - n)
    for row in labels.tolist():
        n = row.index(2) + 1
        assert -100 not in row[:n] and row[n:] == [-100] * (len(row) - n)
    assert mask.all(dim=1).any()  # as wide as the longest, no wider
    assert (labels != -100).all(dim=1).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_seed_repeats_and_rows_differ(name):
    ask, tokens = OBJECTIVES[name], texts(1, 200).expand(50, 200)
    one, two, other = [ask(tokens, IDS, generator=seeded(s)) for s in (5, 5, 6)]
    assert all(map(torch.equal, one, two))
    assert rows_of(one) != rows_of(other)
    assert len({str(row) for row in rows_of(one)}) > 25


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.ones(2, 4), TypeError, "float32"),
        (torch.ones(4).long(), ValueError, r"\(4,\)"),
        (torch.ones(2, 0).long(), ValueError, r"\(2, 0\)"),
        (torch.full((2, 4), 900), IndexError, "900.*899"),
        (torch.full((2, 4), -100), IndexError, "-100"),
    ],
)
def test_what_is_no_text_is_refused(name, tokens, error, message):
    with pytest.raises(error, match=message):
        OBJECTIVES[name](tokens, IDS)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_texts_of_two_tokens_can_be_asked_for(name):
    for seed in range(20):
        batch = OBJECTIVES[name](texts(5, 2), IDS, generator=seeded(seed))
        assert len(rows_of(batch)) == 5


@pytest.mark.parametrize("name", ["spans", "prefix", "ul2"])
def test_one_token_cannot_be_cut(name):
    with pytest.raises(ValueError, match="2 or more|>= 2"):
        OBJECTIVES[name](texts(2, 1), IDS)


# --- The ids, and the core ---------------------------------------------------


def test_special_ids_of_a_tokenizer():
    tokenizer = Tokenizer.train(["a b c d"], 7, "word", extra_ids=20)
    ids = SpecialIds.of(tokenizer)
    assert ids == SpecialIds(26, num_sentinels=20, eos_id=1, pad_id=0)
    assert ids.words_end == 7
    tokens = torch.tensor([tokenizer.encode("a b c d a b c d")])
    batch = span_denoising(tokens, ids)
    assert batch.src.max() == batch.labels.max() == 26


def test_special_ids_of_bytes():
    ids = SpecialIds.of(ByteTokenizer())
    assert ids == SpecialIds(258, num_sentinels=11)
    assert ids.words_end == 248  # the highest byte of UTF-8, 244, has id 247
    with pytest.raises(ValueError, match="sentinel 0"):
        SpecialIds.of(ByteTokenizer(extra_ids=0))


def test_rules_see_one_text_and_its_noise():
    """The paper's "drop" objective, which is not in the module."""
    tokens = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    noise = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    batch = denoise(tokens, noise, IDS, source=drop_noise, target=keep_noise)
    assert rows_of(batch) == [
        ([4, 5, EOS], [3, 6, EOS]),
        ([7, 9, 10, EOS], [8, EOS]),
    ]
    with pytest.raises(ValueError):
        denoise(tokens, noise[:1], IDS, source=drop_noise, target=keep_noise)


# --- Span and i.i.d. denoising ---------------------------------------------


@many
@given(st.integers(2, 600), st.floats(0.05, 0.5), st.floats(1, 9))
def test_spans_have_the_counts_that_were_asked_for(length, density, mean):
    n, s = noise_counts(length, 0.4 * density, mean)
    tokens = texts(2, length)
    batch = span_denoising(tokens, IDS, 0.4 * density, mean)
    for source, target in rows_of(batch):
        assert (len(source), len(target)) == (length - n + s + 1, n + s + 1)


def hidden_in(tokens, batch) -> list[tuple[bool, ...]]:
    """Which tokens are missing from each source."""
    pairs = zip(tokens.tolist(), rows_of(batch))
    return [tuple(t not in set(s) for t in row) for row, (s, _) in pairs]


def test_iid_masks_of_four_tokens_are_equally_likely_at_one_half():
    tokens = texts(8000, 4)
    batch = iid_denoising(tokens, IDS, 0.5, generator=seeded(0))
    seen = Counter(hidden_in(tokens, batch))
    assert chi_square(seen, list(product([False, True], repeat=4))) < 46


def test_iid_hides_every_position_alike():
    tokens = texts(4000, 20)
    batch = iid_denoising(tokens, IDS, generator=seeded(1))
    share = torch.tensor(hidden_in(tokens, batch)).float().mean(dim=0)
    assert ((0.12 < share) & (share < 0.18)).all()  # 5 deviations
    assert abs(share.mean() - 0.15) < 0.006


def iid_slowly(row, hidden):
    """t5's sentinel rule, one token at a time."""
    source, target, sentinel = [], [], FIRST
    for i, (token, hide) in enumerate(zip(row, hidden)):
        if hide and (i == 0 or not hidden[i - 1]):
            source.append(sentinel)
            target.append(sentinel)
            sentinel -= 1
        (target if hide else source).append(token)
    return source + [EOS], target + [EOS]


def test_iid_agrees_with_a_loop():
    tokens = texts(300, 40)
    batch = iid_denoising(tokens, IDS, generator=seeded(2))
    masks = hidden_in(tokens, batch)
    assert any(mask[0] for mask in masks) and any(mask[-1] for mask in masks)
    for row, mask, pair in zip(tokens.tolist(), masks, rows_of(batch)):
        assert iid_slowly(row, mask) == pair


def test_all_or_nothing():
    tokens = texts(2, 5)
    assert rows_of(iid_denoising(tokens, IDS, 0.0)) == [
        ([*row, EOS], [EOS]) for row in tokens.tolist()
    ]
    assert rows_of(iid_denoising(tokens, IDS, 1.0)) == [
        ([FIRST, EOS], [FIRST, *row, EOS]) for row in tokens.tolist()
    ]


@pytest.mark.parametrize("ask", [iid_denoising, bert_denoising])
@pytest.mark.parametrize("density", [-0.1, 1.1, 15, float("nan")])
def test_a_density_that_is_no_share_is_refused(ask, density):
    with pytest.raises(ValueError, match=str(density)):
        ask(texts(2, 5), IDS, density)


# --- BERT-style -------------------------------------------------------------


def bert_slowly(row, noise, swap, words):
    """t5's noise_token_to_random_token_or_sentinel, token by token."""
    source = []
    for token, hide, other, word in zip(row, noise, swap, words):
        if not hide:
            source.append(token)
        elif other:
            source.append(word)
        else:
            source.append(FIRST)
    return source + [EOS], row + [EOS]


def test_bert_agrees_with_a_loop():
    tokens, draw = texts(200, 50), seeded(3)
    batch = bert_denoising(tokens, IDS, 0.3, 0.4, generator=seeded(3))
    noises = torch.rand(200, 50, generator=draw) < 0.3
    expected = []
    for row, noise in zip(tokens.tolist(), noises.tolist()):
        swap = (torch.rand(50, generator=draw) < 0.4).tolist()
        words = torch.randint(3, 900, (50,), generator=draw).tolist()
        expected.append(bert_slowly(row, noise, swap, words))
    assert rows_of(batch) == expected


def test_bert_keeps_masks_and_replaces_in_shares_of_85_13_and_a_half():
    tokens = texts(1000, 400)
    src = bert_denoising(tokens, IDS, generator=seeded(4)).src[:, :-1]
    masked = (src == FIRST).float().mean()
    other = ((src != FIRST) & (src != tokens)).float().mean()
    assert abs(masked - 0.135) < 0.002  # 4 deviations: 0.0022
    assert abs(other - 0.015 * 896 / 897) < 0.0008


def test_bert_draws_words_evenly_and_nothing_else():
    ids = SpecialIds(24, num_sentinels=10)  # words are 3 to 14
    tokens = torch.full((200, 500), 3)
    src = bert_denoising(tokens, ids, 1.0, 1.0, generator=seeded(5)).src
    seen = Counter(src[:, :-1].flatten().tolist())
    assert chi_square(seen, list(range(3, 15))) < 38  # 11 free


def test_mass_style_masks_and_replaces_nothing():
    tokens = texts(50, 100)
    batch = bert_denoising(tokens, IDS, 0.5, 0.0, generator=seeded(6))
    src = batch.src[:, :-1]
    assert ((src == tokens) | (src == FIRST)).all()
    assert 0.45 < (src == FIRST).float().mean() < 0.55


# --- Prefix LM and deshuffling ----------------------------------------------


def test_every_cut_is_equally_likely():
    batch = prefix_lm(texts(5000, 12), IDS, generator=seeded(7))
    seen = Counter(len(source) - 1 for source, _ in rows_of(batch))
    assert chi_square(seen, list(range(1, 12))) < 36  # 10 free


def test_the_shortest_text_has_one_cut():
    for source, target in rows_of(prefix_lm(texts(50, 2), IDS)):
        assert len(source) == len(target) == 2


def test_every_order_is_equally_likely():
    tokens = torch.tensor([[3, 4, 5, 6]]).expand(9600, 4)
    batch = deshuffling(tokens, IDS, generator=seeded(8))
    seen = Counter(tuple(source[:-1]) for source, _ in rows_of(batch))
    assert chi_square(seen, list(permutations([3, 4, 5, 6]))) < 61  # 23 free


@many
@given(sizes, st.integers(0, 2**31))
def test_deshuffling_keeps_each_row_to_itself(size, seed):
    tokens = texts(*size, seed)
    batch = deshuffling(tokens, IDS, generator=seeded(seed))
    for row, (source, target) in zip(tokens.tolist(), rows_of(batch)):
        assert sorted(source[:-1]) == sorted(row) and target[:-1] == row


# --- UL2 --------------------------------------------------------------------


def test_the_mixture_is_that_of_table_1():
    assert sorted(UL2, key=str) == sorted(
        [
            *[("R", mean, 0.15) for mean in (3, 8)],
            ("S", None, 0.25),
            *[("X", mean, 0.5) for mean in (3, 8, 64)],
            ("X", 64, 0.15),
        ],
        key=str,
    )


def counts_of(length: int) -> list[tuple[str, int, int]]:
    """Mode, hidden tokens and spans of the seven denoisers."""
    quarter = max(length / 4, 1)
    return [
        (mode, *noise_counts(length, density, mean or quarter))
        for mode, mean, density in UL2
    ]


def kind_of(source, target) -> tuple[str, int, int]:
    """Mode, hidden tokens and spans of an example."""
    mode = next(m for m, ids in MODES.items() if ids[0] == source[0])
    spans = sum(token >= 900 for token in target)
    return mode, len(target) - 1 - spans, spans


@many
@given(st.integers(2, 590), st.integers(0, 2**31))
def test_every_row_is_one_of_the_seven(length, seed):
    batch = ul2(texts(4, length, seed).clamp(min=10), IDS, generator=seeded(seed))
    for source, target in rows_of(batch):
        mode, n, s = kind_of(source, target)
        assert (mode, n, s) in counts_of(length)
        assert source[: len(MODES[mode])] == MODES[mode]
        assert len(source) == len(MODES[mode]) + length - n + s + 1
        assert mode != "S" or s == 1


def test_the_seven_are_equally_likely():
    tokens = texts(2800, 512).clamp(min=10)
    batch = ul2(tokens, IDS, generator=seeded(9))
    seen = Counter(kind_of(*row) for row in rows_of(batch))
    assert len(set(counts_of(512))) == 7
    assert chi_square(seen, counts_of(512)) < 30  # 6 free


def test_s_asks_for_the_last_quarter():
    tokens = texts(40, 80).clamp(min=10)
    batch = ul2(tokens, IDS, generator=seeded(10))
    asked = [
        (row, source, target)
        for row, (source, target) in zip(tokens.tolist(), rows_of(batch))
        if source[0] == MODES["S"][0]
    ]
    assert len(asked) > 1
    for row, source, target in asked:
        assert source == [*MODES["S"], *row[:60], FIRST, EOS]
        assert target == [FIRST, *row[60:], EOS]


def test_ul2_needs_all_three_modes():
    for seed in range(9):  # whichever is drawn
        with pytest.raises(KeyError, match="X"):
            modes = {"R": [9], "S": [9]}
            ul2_denoising(texts(1, 60), IDS, modes, generator=seeded(seed))


def test_ul2_says_when_sentinels_run_out():
    with pytest.raises(ValueError, match="100 sentinels"):
        ul2(torch.full((50, 700), 10), IDS, generator=seeded(11))
