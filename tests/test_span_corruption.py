"""Span corruption: exact counts, uniform masks, the sentinels, the way back."""

import math
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from t5_book import Batch
from t5_book.batches import pad_rows
from t5_book.span_corruption import (
    corrupt_spans,
    noise_counts,
    random_spans_noise_mask,
    restore_spans,
    span_lengths,
)
from tests.conftest import refuses, seeded

EOS, FIRST, MANY = 1, 9999, 2600  # words are 2 to 7399
many = settings(max_examples=200, deadline=None, derandomize=True)
lengths = st.integers(2, 5000) | st.integers(2, 9)
densities = st.floats(0.01, 0.9)
means = st.floats(1, 70) | st.floats(1, 12)
seeds = st.integers(0, 2**31)


def words(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, 7400, (rows, length), generator=generator)


def counts_in_torch(length: int, density: float = 0.15, mean: float = 3.0):
    """The rule of t5, by other means: tensors of 32-bit floats."""
    size, share, span = torch.tensor([length, density, mean]).float()
    n = torch.clamp(torch.round(size * share), 1, length - 1)
    return int(n), max(int(torch.round(n / span)), 1)


def corrupt_slowly(tokens, mask):
    """One row, token by token."""
    source, target, sentinel = [], [], FIRST
    for token, hide, before in zip(tokens, mask, [False, *mask]):
        if hide and not before:
            source.append(sentinel)
            target.append(sentinel)
            sentinel -= 1
        (target if hide else source).append(token)
    return [*source, EOS], [*target, EOS]


def rule_of_t5(tokens, mask):
    """t5's noise_span_to_unique_sentinel; the target takes ``~mask``."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    sentinels = FIRST + 1 - np.cumsum(starts)
    return [*np.where(starts, sentinels, tokens)[starts | ~mask].tolist(), EOS]


# --- How many, and how long -------------------------------------------------


def test_known_counts():
    for numbers, expected in {
        (500,): (75, 25),  # paper, section 3.3.4
        (568,): (85, 28),
        (10,): (2, 1),
        (2,): (1, 1),
        (30,): (4, 1),
        (31,): (5, 2),
        (190,): (29, 10),  # 28 in float64
        (32, 0.25, 2.0): (8, 4),  # t5, preprocessors_test.py
        (12, 0.5, 3.0): (6, 2),
        (10, 0.9, 20.0): (9, 1),
    }.items():
        assert noise_counts(*numbers) == expected, numbers


def test_counts_of_thousands_of_lengths():
    for setting in [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.2, 2.0)]:
        for length in range(2, 3002):
            counts = counts_in_torch(length, *setting)
            assert noise_counts(length, *setting) == counts, (length, setting)
    found = {length: noise_counts(length) for length in range(2, 20_001)}
    assert [k for k in found if found[k][1] <= 100] == [*range(2, 2010)]
    # Rounding in float32 matters at ties.
    differ = [k for k in found if k > 3 and found[k][0] != round(k * 0.15)]
    assert len(differ) == 166 and differ[:3] == [190, 350, 390]


def helper_of_t5(inputs_length, density=0.15, mean=3.0):
    """t5's random_spans_helper, which rounds in float64."""

    def lengths(tokens):
        n = round(tokens * density)
        s = round(n / mean)
        return tokens - n + s + 1, n + s + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, lengths(tokens)[1]


def test_lengths_are_those_of_t5():
    for numbers, expected in {
        (512,): (568, 114),
        (1024,): (1137, 229),
        (64, 0.2, 2.0): (70, 22),  # t5, preprocessors_test.py
        (64, 0.2, 1.0): (63, 27),  # t5, preprocessors_test.py
        (3,): (2, 3),
    }.items():
        assert span_lengths(*numbers) == expected, numbers
    # But for those at which t5 misses its own mask, as the next test shows.
    differ = [i for i in range(3, 800) if span_lengths(i) != helper_of_t5(i)]
    assert differ[:8] == [3, 4, 5, 6, 7, 8, 9, 172]


@many
@given(st.integers(3, 2000), densities, means)
@example(3, 0.15, 3.0)
@example(172, 0.15, 3.0)
def test_a_source_is_full_and_one_token_more_is_too_many(room, density, mean):
    assume(density * (1 + 1 / mean) < 0.9)
    tokens, target = span_lengths(room, density, mean)
    n, s = noise_counts(tokens, density, mean)
    assert tokens - n + s + 1 <= room and n + s + 1 == target
    more, spans = noise_counts(tokens + 1, density, mean)
    assert tokens + 1 - more + spans + 1 > room


# --- Drawn masks ------------------------------------------------------------


@many
@given(lengths, densities, means, st.integers(1, 3), seeds)
def test_any_length_goes_there_and_back(length, density, mean, rows, seed):
    """Exact counts, runs that alternate, what t5 gives, and the text again."""
    n, s = counts_in_torch(length, density, mean)
    assume(s <= min(length - n, MANY))
    draw = seeded(seed)
    mask = random_spans_noise_mask(length, density, mean, batch=rows, generator=draw)
    assert mask.dtype == torch.bool and mask.shape == (rows, length)
    tokens = words(rows, length, draw)
    batch = corrupt_spans(tokens, mask, FIRST, num_sentinels=MANY)
    assert batch.src.shape == (rows, length - n + s + 1) and batch.mask.all()
    assert batch.labels.shape == (rows, n + s + 1)
    for i, hide in enumerate(mask.numpy()):
        assert [hidden for hidden, _ in groupby(hide)] == [False, True] * s
        assert hide.sum() == n
        assert batch.src[i].tolist() == rule_of_t5(tokens[i].numpy(), hide)
        assert batch.labels[i].tolist() == rule_of_t5(tokens[i].numpy(), ~hide)
    restored = restore_spans(batch.src, batch.labels, FIRST, num_sentinels=MANY)
    assert restored == tokens.tolist()


def test_masks_of_all_short_lengths():
    for length in range(2, 1001):
        mask = random_spans_noise_mask(length)[0]
        starts = mask[1:] & ~mask[:-1]
        assert not mask[0] and mask[-1] and len(mask) == length
        assert (int(mask.sum()), int(starts.sum())) == counts_in_torch(length)


def test_all_masks_are_equally_likely():
    """Wilson and Hilferty: a chi-square's cube root is nearly normal."""
    cases = [
        (length, n, s, math.comb(n - 1, s - 1) * math.comb(length - n - 1, s - 1))
        for length in range(4, 15)
        for n in range(2, length - 1)
        for s in range(1, min(n, length - n) + 1)
    ]
    normals = []
    for length, n, s, ways in cases:
        if not 5 <= ways <= 100:
            continue
        each = 2000 if (length, n) == (12, 6) else 200
        assert noise_counts(length, n / length, n / s) == (n, s)
        mask = random_spans_noise_mask(
            length, n / length, n / s, batch=each * ways, generator=seeded(ways)
        )
        numbers = (mask * 2 ** torch.arange(length)).sum(1)
        seen = numbers.unique(return_counts=True)[1]
        assert len(seen) == ways, (length, n, s)
        value = ((seen - each) ** 2 / each).sum().item()
        spread = 2 / (9 * (ways - 1))
        normal = ((value / (ways - 1)) ** (1 / 3) - 1 + spread) / spread**0.5
        assert -4 < normal < 4, (length, n, s)
        normals.append(normal)
    assert abs(sum(normals)) < 4 * len(normals) ** 0.5


def test_long_spans_are_uniform_too():
    """Of 568 tokens, 85 are hidden in 28 spans. A part has the mean and
    the chances that all compositions give it together."""
    mask = random_spans_noise_mask(568, batch=2000, generator=seeded(26))
    runs = [(hide, len(list(run))) for row in mask.tolist() for hide, run in groupby(row)]
    sizes = [size for hide, size in runs if hide]
    assert sum(sizes) == 2000 * 85 and len(sizes) == 2000 * 28
    for size in range(1, 8):
        expected = len(sizes) * math.comb(84 - size, 26) / math.comb(84, 27)
        assert abs(sizes.count(size) - expected) < 6 * expected**0.5


def test_rows_and_draws_differ_and_a_seed_repeats_them():
    first, again, other = [
        random_spans_noise_mask(568, batch=64, generator=seeded(seed)) for seed in (5, 5, 6)
    ]
    assert len(first.unique(dim=0)) == 64
    assert torch.equal(first, again) and not torch.equal(first, other)
    for length, masks in [(10, 1), (30, 1), (31, 100)]:
        drawn = random_spans_noise_mask(length, batch=3000, generator=seeded(0))
        assert len(drawn.unique(dim=0)) == masks


# --- Sentinels --------------------------------------------------------------


def test_figure_2_of_the_paper():
    words = "Thank you for inviting me to your party last week".split()
    hidden = torch.tensor([[w in "for inviting last".split() for w in words]])
    batch = corrupt_spans(torch.arange(10, 20)[None], hidden, FIRST)
    names = {EOS: "</s>", FIRST: "<X>", FIRST - 1: "<Y>"}
    names |= {10 + i: word for i, word in enumerate(words)}
    source, target = [
        " ".join(names[i] for i in ids[0].tolist()) for ids in (batch.src, batch.labels)
    ]
    assert source == "Thank you <X> me to your party <Y> week </s>"
    assert target == "<X> for inviting <Y> last </s>"


@many
@given(st.integers(1, 5), st.integers(1, 60), seeds)
def test_any_mask_agrees_with_the_slow_way(rows, length, seed):
    """Spans may stand at either end, or at both; rows may be all or nothing."""
    draw = seeded(seed)
    density = torch.rand(rows, 1, generator=draw) * 1.6 - 0.3
    mask = torch.rand(rows, length, generator=draw) < density
    tokens = words(rows, length, draw)
    before = tokens.clone(), mask.clone()
    batch = corrupt_spans(tokens, mask, FIRST)
    assert torch.equal(tokens, before[0]) and torch.equal(mask, before[1])
    slow = [corrupt_slowly(*row) for row in zip(tokens.tolist(), mask.tolist())]
    src, real = pad_rows([source for source, _ in slow])
    labels, _ = pad_rows([target for _, target in slow], fill=-100)
    for ours, theirs in zip(batch, (src, real, labels)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert restore_spans(batch.src, batch.labels, FIRST) == tokens.tolist()


def test_other_ids_for_eos_padding_and_sentinels():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]], dtype=torch.int32)
    mask = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1]]).bool()
    batch = corrupt_spans(tokens, mask, 50, eos_id=2, num_sentinels=2, pad_id=3)
    assert batch.src.tolist() == [[5, 50, 7, 49, 2], [5, 50, 2, 3, 3]]
    assert batch.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.labels.tolist() == [[50, 6, 49, 8, 2], [50, 6, 7, 8, 2]]
    again = restore_spans(batch.src, batch.labels, 50, eos_id=2, num_sentinels=2)
    assert again == tokens.tolist()
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert [part.device.type for part in moved] == ["meta"] * 3
    assert [part.dtype for part in moved] == [torch.int64, torch.bool, torch.int64]


def test_sentinels_run_out_exactly_where_they_end():
    for length, spans in [(2009, 100), (2010, 101), (30, 1), (31, 2), (568, 28)]:
        row = torch.full((1, length), 7), random_spans_noise_mask(length), 32099
        src = corrupt_spans(*row, num_sentinels=spans).src
        assert src.max() == 32099 and src[src > 7].min() == 32100 - spans
        less = spans - 1
        words = f"{spans} spans", f"{less} sentinels"
        refuses(lambda: corrupt_spans(*row, num_sentinels=less), *words)


def test_answers_of_a_model_are_filled_in():
    x, y, z = FIRST, FIRST - 1, FIRST - 2
    for answer, expected in {
        (x, 20, 21, y, EOS): [5, 20, 21, 7],  # an empty span
        (0, 30, x, 20, y, 22): [5, 20, 7, 22],  # no eos; a start token
        (y, 22, EOS, x, 20): [5, x, 7, 22],  # not named before eos
        (EOS, x): [5, x, 7, y],
        (x, 20, y, 21, z, 22): [5, 20, 7, 21],  # one too many
        (x, 20, y, 21, FIRST + 1, 22): [5, 20, 7, 21, FIRST + 1, 22],  # no sentinels
        (x, 20, y, 21, FIRST - 100, 22): [5, 20, 7, 21, FIRST - 100, 22],
        (x, 20, y, 21, FIRST - 99, 22): [5, 20, 7, 21],
    }.items():
        src = torch.tensor([[5, x, 7, y, EOS, 0]])
        assert restore_spans(src, torch.tensor([answer]), FIRST) == [expected]


def test_pad_rows():
    """The mask counts tokens; it doesn't look at what they are."""
    rows = [torch.tensor([4, 9, 6], dtype=torch.int32), [7], [9, 9]]
    ids, mask = pad_rows(rows, fill=9)
    assert ids.tolist() == [[4, 9, 6], [7, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert pad_rows([[0, 5], [0]])[0].tolist() == [[0, 5], [0, 0]]


# --- Clear errors -----------------------------------------------------------

IDS, HIDE = torch.full((2, 4), 7), torch.zeros(2, 4, dtype=torch.bool)
END = torch.tensor([[5, 6, 7, 8], [5, 6, EOS, 8]])
LONG, TURNS = torch.full((1, 202), 7), torch.arange(202)[None] % 2 == 0
REFUSED = {
    "one token": (noise_counts, (1,), "length 1,", "length >= 2"),
    "no token": (random_spans_noise_mask, (0,), "length 0,"),
    "no noise": (noise_counts, (9, 0.0), "density 0.0,"),
    "all noise": (noise_counts, (9, 1.0), "density 1.0,"),
    "short spans": (noise_counts, (9, 0.2, 0.5), "mean span 0.5"),
    "nan": (noise_counts, (9, math.nan), "density nan"),
    "nan spans": (noise_counts, (9, 0.2, math.nan), "mean span nan"),
    "no room for 2": (noise_counts, (3, 0.9, 1.0), "2 spans", "1 of 3"),
    "no room for 6": (random_spans_noise_mask, (11, 0.5, 1.0), "6 spans", "5 of 11"),
    "short source": (span_lengths, (2,), "inputs_length 2", "3"),
    "shapes": (corrupt_spans, (IDS, HIDE[:, :3], FIRST), "int64 (2, 4)", "bool (2, 3)"),
    "one axis": (corrupt_spans, (IDS[0], HIDE[0], FIRST), "(4,)"),
    "empty": (corrupt_spans, (IDS[:, :0], HIDE[:, :0], FIRST), "(2, 0)"),
    "no row": (corrupt_spans, (IDS[:0], HIDE[:0], FIRST), "(0, 4)"),
    "101 spans": (corrupt_spans, (LONG, TURNS, FIRST), "101 spans", "100 sentinels"),
    "eos inside": (corrupt_spans, (END, HIDE, FIRST), "token 2 of row 1 is 1", "eos"),
    "empty row": (pad_rows, ([[4], []],), "lengths [1, 0]"),
    "no rows": (pad_rows, ([],), "lengths []"),
    "batches": (restore_spans, (IDS, IDS[:1], FIRST), "(2, 4)", "(1, 4)"),
    "rows": (restore_spans, (IDS[0], IDS[0], FIRST), "(4,)"),
    "one row": (restore_spans, (IDS, IDS[0], FIRST), "(4,)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, arguments, *words = REFUSED[name]
    refuses(lambda: function(*arguments), *words)


def test_tokens_and_masks_that_are_refused():
    for tokens, mask, *words in [
        (IDS.float(), HIDE, "float32 (2, 4)", "integer"),
        (IDS, HIDE.long(), "int64 (2, 4); ", "boolean"),
    ]:
        refuses(lambda: corrupt_spans(tokens, mask, FIRST), *words, error=TypeError)
    refuses(lambda: corrupt_spans(IDS, HIDE, FIRST, eos_id=7), "token 0 of row 0 is 7", "eos")
    # The ends of the sentinels, and no more.
    for token in (900, 999):
        same = torch.full((2, 4), token)
        refuses(lambda: corrupt_spans(same, HIDE, 999), f"token {token} ", "100, from 999")
    for neighbour in (899, 1000):
        corrupt_spans(torch.full((2, 4), neighbour), HIDE, 999)
