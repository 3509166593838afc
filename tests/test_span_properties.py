"""Span corruption as a whole: every length, every split, the way back.

``test_span_corruption.py`` has the known answers and the single rules.
"""

import math
from collections import Counter
from itertools import combinations, groupby

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from t5_book.span_corruption import (
    corrupt_spans,
    noise_counts,
    random_spans_noise_mask,
    restore_spans,
    span_lengths,
)

EOS, FIRST, MANY = 1, 9999, 2600  # words are 2 to 7399
many = settings(max_examples=200, deadline=None, derandomize=True)
lengths = st.integers(2, 5000)
densities = st.floats(0.01, 0.9)
means = st.floats(1, 70)
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 7400, (rows, length), generator=seeded(seed))


def counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """``noise_counts`` where the kept tokens can part that many spans."""
    n = min(max(round(length * density), 1), length - 1)
    assume(max(n / mean + 0.51, 1) <= length - n)
    return noise_counts(length, density, mean)


def runs(row: list[bool]) -> tuple[list[int], list[int]]:
    """Lengths of the kept and of the hidden runs, in order."""
    lists = [], []
    for hide, run in groupby(row):
        lists[hide].append(len(list(run)))
    return lists


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to split ``total`` into positive parts, in order."""
    return [
        tuple(b - a for a, b in zip((0, *cuts), (*cuts, total)))
        for cuts in combinations(range(1, total), parts - 1)
    ]


# --- Every length -----------------------------------------------------------


def test_no_length_from_2_to_5000_crashes():
    for length in range(2, 5001):
        n, s = noise_counts(length)
        mask = random_spans_noise_mask(length)[0]
        begins = int((mask[1:] & ~mask[:-1]).sum())
        assert (int(mask.sum()), begins) == (n, s)
        assert not mask[0] and mask[-1] and len(mask) == length


@many
@given(lengths | st.integers(2, 9), densities, means, st.integers(1, 3), seeds)
def test_any_length_goes_there_and_back(length, density, mean, rows, seed):
    n, s = counts(length, density, mean)
    assume(s <= MANY)
    mask = random_spans_noise_mask(
        length, density, mean, batch=rows, generator=seeded(seed)
    )
    tokens = words(rows, length, seed)
    batch = corrupt_spans(tokens, mask, FIRST, num_sentinels=MANY)
    assert batch.src.shape == (rows, length - n + s + 1)
    assert batch.labels.shape == (rows, n + s + 1)
    assert batch.mask.all()
    assert restore_spans(
        batch.src, batch.labels, FIRST, num_sentinels=MANY
    ) == tokens.tolist()


@many
@given(lengths | st.integers(2, 9), densities, means, seeds)
def test_kept_and_hidden_runs_alternate_and_add_up(length, density, mean, seed):
    n, s = counts(length, density, mean)
    mask = random_spans_noise_mask(
        length, density, mean, batch=2, generator=seeded(seed)
    )
    for row in mask.tolist():
        kept, hidden = runs(row)
        assert len(kept) == len(hidden) == s
        assert (sum(kept), sum(hidden)) == (length - n, n)


@many
@given(st.integers(3, 2000), densities, means)
def test_a_source_is_full_and_one_token_more_is_too_many(room, density, mean):
    assume(density * (1 + 1 / mean) < 0.9)
    tokens, target = span_lengths(room, density, mean)
    n, s = noise_counts(tokens, density, mean)
    assert tokens - n + s + 1 <= room and n + s + 1 == target
    more, spans = noise_counts(tokens + 1, density, mean)
    assert tokens + 1 - more + spans + 1 > room


# --- Every split ------------------------------------------------------------

SMALL = [
    (length, n, s)
    for length in range(4, 15)
    for n in range(2, length - 1)
    for s in range(1, min(n, length - n) + 1)
    if 5
    <= math.comb(n - 1, s - 1) * math.comb(length - n - 1, s - 1)
    <= 60
]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(SMALL), seeds)
def test_every_split_is_equally_likely(case, seed):
    """Wilson and Hilferty: a chi-square's cube root is nearly normal."""
    length, n, s = case
    assert noise_counts(length, n / length, n / s) == (n, s)
    each = 60
    outcomes = [
        (kept, hidden)
        for kept in compositions(length - n, s)
        for hidden in compositions(n, s)
    ]
    mask = random_spans_noise_mask(
        length, n / length, n / s, batch=each * len(outcomes),
        generator=seeded(seed),
    )
    seen = Counter(tuple(map(tuple, runs(row))) for row in mask.tolist())
    assert set(seen) <= set(outcomes)
    value = sum((seen[o] - each) ** 2 / each for o in outcomes)
    free = len(outcomes) - 1
    spread = 2 / (9 * free)
    normal = ((value / free) ** (1 / 3) - 1 + spread) / spread**0.5
    assert -5 < normal < 5


def test_the_25_masks_and_no_others():
    """12 tokens, 6 hidden in 2 spans: 24 degrees, 20,000 draws."""
    mask = random_spans_noise_mask(
        12, 0.5, batch=20_000, generator=seeded(25)
    )
    seen = Counter(tuple(map(tuple, runs(row))) for row in mask.tolist())
    parts = compositions(6, 2)
    assert set(seen) == {(kept, hidden) for kept in parts for hidden in parts}
    value = sum((count - 800) ** 2 / 800 for count in seen.values())
    assert 5 < value < 59  # once in 10,000 on either side


def test_long_spans_are_uniform_too():
    """Of 568 tokens, 85 are hidden in 28 spans. A part has the mean and
    the chances that all compositions give it together."""
    mask = random_spans_noise_mask(568, batch=2000, generator=seeded(26))
    sizes = [size for row in mask.tolist() for size in runs(row)[1]]
    assert sum(sizes) == 2000 * 85 and len(sizes) == 2000 * 28
    all_ways = math.comb(84, 27)
    for size in range(1, 8):
        expected = len(sizes) * math.comb(84 - size, 26) / all_ways
        assert abs(sizes.count(size) - expected) < 6 * expected**0.5


# --- Sentinels --------------------------------------------------------------


@many
@given(st.integers(2, 3000), st.integers(1, 130))
def test_sentinels_run_out_exactly_where_they_end(length, sentinels):
    spans = noise_counts(length)[1]
    mask = random_spans_noise_mask(length)
    tokens = words(1, length)
    if spans <= sentinels:
        corrupt_spans(tokens, mask, FIRST, num_sentinels=sentinels)
        return
    message = f"{spans} spans.* {sentinels} sentinels"
    with pytest.raises(ValueError, match=message):
        corrupt_spans(tokens, mask, FIRST, num_sentinels=sentinels)


def test_a_hundred_sentinels_last_for_2009_tokens():
    fits = [noise_counts(length)[1] <= 100 for length in range(2, 5001)]
    assert fits == [length <= 2009 for length in range(2, 5001)]


@many
@given(lengths, seeds)
def test_each_sentinel_stands_once_on_either_side_in_order(length, seed):
    mask = random_spans_noise_mask(length, generator=seeded(seed))
    batch = corrupt_spans(
        words(1, length, seed), mask, FIRST, num_sentinels=MANY
    )
    expected = [FIRST - k for k in range(noise_counts(length)[1])]
    for ids in (batch.src, batch.labels):
        assert ids[ids > FIRST - MANY].tolist() == expected
    assert batch.labels[0, 0] == FIRST  # nothing stands before the first
