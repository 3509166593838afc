"""Objectives against t5's rules, written out token by token."""

from collections import Counter
from functools import partial
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t5_book import objectives
from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.objectives import UL2, SpecialIds
from t5_book.span_corruption import (
    corrupt_spans,
    noise_counts,
    random_spans_noise_mask,
    restore_spans,
)
from t5_book.tokenizer import Tokenizer
from tests.conftest import refuses, seeded

EOS, FIRST = 1, 999  # words are 3 to 899, sentinels 900 to 999
IDS = SpecialIds(FIRST)
MODES = {"R": [4], "S": [5, 6], "X": [7, 8, 9]}
OBJECTIVES = {
    "spans": objectives.span_denoising,
    "iid": objectives.iid_denoising,
    "bert": objectives.bert_denoising,
    "prefix": objectives.prefix_lm,
    "deshuffle": objectives.deshuffling,
    "ul2": partial(objectives.ul2_denoising, modes=MODES),
}
ul2 = OBJECTIVES["ul2"]
each = pytest.mark.parametrize("name", OBJECTIVES)
many = settings(max_examples=100, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def texts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Words that differ within each row; none is an id of a mode."""
    return torch.rand(rows, 890, generator=seeded(seed)).argsort(dim=1)[:, :length] + 10


def rows_of(batch) -> list[tuple[list[int], list[int]]]:
    """Source and target of each example, without padding."""
    triples = zip(*batch)
    return [(src[m].tolist(), labels[labels != -100].tolist()) for src, m, labels in triples]


def chi_square(seen: Counter, outcomes: list) -> float:
    """How far from equally likely; of n outcomes, n - 1 are free."""
    assert set(seen) <= set(outcomes)
    share = sum(seen.values()) / len(outcomes)
    return sum((seen[o] - share) ** 2 / share for o in outcomes)


# --- What all of them have in common ----------------------------------------


def restore(name: str, source: list[int], target: list[int]) -> list[int]:
    """The text, from an example without padding; one rule for each."""
    if name == "deshuffle":
        assert sorted(source) == sorted(target)
    if name in ("bert", "deshuffle"):
        return target[:-1]
    if name == "prefix":
        return source[:-1] + target[:-1]
    if name == "ul2":
        [mode] = [mode for mode in MODES.values() if mode[0] == source[0]]
        assert source[: len(mode)] == mode
        source = source[len(mode) :]
    pair = torch.tensor([source]), torch.tensor([target])
    return restore_spans(*pair, FIRST, eos_id=2, num_sentinels=90)[0]


@each
@settings(many, max_examples=40)
@given(st.integers(1, 4), st.integers(2, 300), seeds)
def test_batches_are_those_of_corrupt_spans_and_lose_nothing(name, rows, length, seed):
    ids = SpecialIds(FIRST, num_sentinels=90, eos_id=2, pad_id=1)
    tokens = texts(rows, length, seed).int()
    before = tokens.clone()
    batch = OBJECTIVES[name](tokens, ids, generator=seeded(seed))
    assert torch.equal(tokens, before)
    src, mask, labels = batch
    assert src.dtype == labels.dtype == torch.int64
    assert mask.dtype == torch.bool and mask.shape == src.shape
    assert len(src) == len(labels) == rows
    for row, real in zip(src.tolist(), mask.tolist()):
        n = sum(real)
        assert real == [True] * n + [False] * (len(row) - n)
        assert row[n - 1] == 2 and row[n:] == [1] * (len(row) - n)
    for row in labels.tolist():
        n = row.index(2) + 1
        assert -100 not in row[:n] and row[n:] == [-100] * (len(row) - n)
    assert mask.all(dim=1).any()  # as wide as the longest, no wider
    assert (labels != -100).all(dim=1).any()
    assert [restore(name, *pair) for pair in rows_of(batch)] == tokens.tolist()


@each
def test_a_seed_repeats_and_rows_differ(name):
    ask, tokens = OBJECTIVES[name], texts(1, 200).expand(50, 200)
    one, two, other = [ask(tokens, IDS, generator=seeded(s)) for s in (5, 5, 6)]
    assert all(map(torch.equal, one, two))
    assert rows_of(one) != rows_of(other)
    assert len({str(row) for row in rows_of(one)}) > 25


@each
def test_what_is_no_text_is_refused(name):
    for tokens, error, word in [
        (torch.ones(2, 4), TypeError, "float32"),
        (torch.ones(4).long(), ValueError, "(4,)"),
        (torch.ones(2, 0).long(), ValueError, "(2, 0)"),
        (torch.full((2, 4), 900), IndexError, "899"),
        (torch.full((2, 4), -100), IndexError, "-100"),
    ]:
        refuses(lambda: OBJECTIVES[name](tokens, IDS), word, error=error)
    if name in ("spans", "prefix", "ul2"):
        refuses(lambda: OBJECTIVES[name](texts(2, 1), IDS), "2")
    if name in ("iid", "bert"):
        for density in (-0.1, 1.1, 15, float("nan")):
            refuses(lambda: OBJECTIVES[name](texts(2, 5), IDS, density), density)


def test_ul2_refuses_too_few_modes_or_sentinels():
    for seed in range(9):  # whichever is drawn
        ask = partial(ul2, texts(1, 60), IDS, generator=seeded(seed))
        refuses(lambda: ask(modes={"R": [9], "S": [9]}), "X", error=KeyError)
    long = torch.full((50, 700), 10)
    refuses(lambda: ul2(long, IDS, generator=seeded(11)), "100 sentinels")


# --- One by one -------------------------------------------------------------


def test_special_ids_are_those_of_a_tokenizer():
    tokenizer = Tokenizer.train(["a b c d"], 7, "word", extra_ids=20)
    ids = SpecialIds.of(tokenizer)
    assert ids == (26, 20, 1, 0) and ids.words_end == 7
    batch = objectives.span_denoising(torch.tensor([tokenizer.encode("a b c d a b c d")]), ids)
    assert batch.src.max() == batch.labels.max() == 26

    ids = SpecialIds.of(ByteTokenizer())
    assert ids == SpecialIds(258, num_sentinels=11)
    assert ids.words_end == 248  # the highest byte of UTF-8, 244, has id 247
    refuses(lambda: SpecialIds.of(ByteTokenizer(extra_ids=0)), "sentinel 0")


def test_rules_see_one_text_and_its_noise():
    """The paper's "drop" objective, which is not in the module."""
    tokens = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    noise = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    rules = dict(source=objectives.drop_noise, target=objectives.keep_noise)
    drop = partial(objectives.denoise, ids=IDS, **rules)
    pairs = [([4, 5, EOS], [3, 6, EOS]), ([7, 9, 10, EOS], [8, EOS])]
    assert rows_of(drop(tokens, noise)) == pairs
    refuses(lambda: drop(tokens, noise[:1]))


@pytest.mark.parametrize("shares", [(), (0.3, 5.0)])
def test_spans_and_iid_corrupt_by_masks_of_these_shares(shares):
    density, mean = shares or (0.15, 3.0)
    tokens = texts(300, 40)
    spans = random_spans_noise_mask(40, density, mean, batch=300, generator=seeded(2))
    batch = objectives.span_denoising(tokens, IDS, *shares, generator=seeded(2))
    assert all(map(torch.equal, batch, corrupt_spans(tokens, spans, FIRST)))
    single = torch.rand(300, 40, generator=seeded(2)) < density
    batch = objectives.iid_denoising(tokens, IDS, *shares[:1], generator=seeded(2))
    assert all(map(torch.equal, batch, corrupt_spans(tokens, single, FIRST)))


@pytest.mark.parametrize("shares", [(), (0.3, 0.4), (1.0, 0.0), (0.0, 1.0)])
def test_bert_agrees_with_a_loop(shares):
    """t5's noise_token_to_random_token_or_sentinel, token by token."""
    density, random_share = shares or (0.15, 0.1)
    tokens, draw = texts(200, 50), seeded(3)
    batch = objectives.bert_denoising(tokens, IDS, *shares, generator=seeded(3))
    noises = torch.rand(200, 50, generator=draw) < density
    expected = []
    for row, noise in zip(tokens.tolist(), noises.tolist()):
        swap = (torch.rand(50, generator=draw) < random_share).tolist()
        words = torch.randint(3, 900, (50,), generator=draw).tolist()
        source = []
        for i, token in enumerate(row):
            if noise[i]:
                token = words[i] if swap[i] else FIRST
            source.append(token)
        expected.append((source + [EOS], row + [EOS]))
    assert rows_of(batch) == expected


# --- Prefix LM and objectives.deshuffling ----------------------------------------------


def test_every_cut_and_every_order_is_equally_likely():
    batch = objectives.prefix_lm(texts(5000, 12), IDS, generator=seeded(7))
    seen = Counter(len(source) - 1 for source, _ in rows_of(batch))
    assert chi_square(seen, list(range(1, 12))) < 36  # 10 free

    tokens = torch.tensor([[3, 4, 5, 6]]).expand(9600, 4)
    batch = objectives.deshuffling(tokens, IDS, generator=seeded(8))
    seen = Counter(tuple(source[:-1]) for source, _ in rows_of(batch))
    assert chi_square(seen, list(permutations([3, 4, 5, 6]))) < 61  # 23 free


# --- UL2 --------------------------------------------------------------------


def test_the_mixture_is_that_of_table_1():
    table = [("R", mean, 0.15) for mean in (3, 8)] + [("S", None, 0.25)]
    table += [("X", mean, 0.5) for mean in (3, 8, 64)] + [("X", 64, 0.15)]
    assert sorted(UL2, key=str) == sorted(table, key=str)


def counts_of(length: int) -> list[tuple[str, int, int]]:
    """Mode, hidden tokens and spans of the seven denoisers."""
    quarter = max(length / 4, 1)
    return [(mode, *noise_counts(length, share, mean or quarter)) for mode, mean, share in UL2]


def kind_of(source, target) -> tuple[str, int, int]:
    """Mode, hidden tokens and spans of an example."""
    [mode] = [mode for mode, ids in MODES.items() if ids[0] == source[0]]
    spans = sum(token >= 900 for token in target)
    return mode, len(target) - 1 - spans, spans


@many
@given(st.integers(2, 590), seeds)
def test_every_row_is_one_of_the_seven(length, seed):
    tokens = texts(4, length, seed)
    pairs = rows_of(ul2(tokens, IDS, generator=seeded(seed)))
    for row, (source, target) in zip(tokens.tolist(), pairs):
        mode, n, s = kind_of(source, target)
        assert (mode, n, s) in counts_of(length)
        assert len(source) == len(MODES[mode]) + length - n + s + 1
        if mode == "S":  # it asks for the last quarter
            assert source == [*MODES["S"], *row[: length - n], FIRST, EOS]
            assert target == [FIRST, *row[length - n :], EOS]


def test_the_seven_are_equally_likely():
    batch = ul2(texts(2800, 512), IDS, generator=seeded(9))
    seen = Counter(kind_of(*row) for row in rows_of(batch))
    assert len(set(counts_of(512))) == 7
    assert chi_square(seen, counts_of(512)) < 30  # 6 free
