"""Span corruption: exact counts, uniform masks, the sentinels, the way back."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
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

EOS, FIRST = 1, 999
SENTINELS = [*range(FIRST, FIRST - 100, -1)]
many = settings(max_examples=150, deadline=None, derandomize=True)
numbers = st.tuples(
    st.integers(2, 1500), st.floats(0.01, 0.9), st.floats(1, 12)
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts_in_torch(length: int, density: float, mean: float):
    """The rule of t5, by other means: tensors of 32-bit floats."""
    size, share, span = torch.tensor([length, density, mean]).float()
    n = int(torch.clamp(torch.round(size * share), 1, length - 1))
    tokens = torch.tensor(float(n), dtype=torch.float32)
    return n, max(int(torch.round(tokens / span)), 1)


def runs(mask: list[bool]) -> list[int]:
    """Lengths of the runs of True."""
    text = "".join("#" if hide else "." for hide in mask)
    return [len(run) for run in text.split(".") if run]


def corrupt_slowly(tokens, mask, sentinels=SENTINELS):
    """One row, token by token."""
    source, target, spans = [], [], 0
    for token, hide, before in zip(tokens, mask, [False, *mask]):
        if hide and not before:
            source.append(sentinels[spans])
            target.append(sentinels[spans])
            spans += 1
        (target if hide else source).append(token)
    return [*source, EOS], [*target, EOS]


def rule_of_t5(tokens, mask):
    """t5's noise_span_to_unique_sentinel; the target takes ``~mask``."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    sentinels = FIRST + 1 - np.cumsum(starts)
    return np.where(starts, sentinels, tokens)[starts | ~mask].tolist()


# --- How many --------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((500,), (75, 25)),  # paper, section 3.3.4
        ((568,), (85, 28)),
        ((10,), (2, 1)),
        ((2,), (1, 1)),
        ((30,), (4, 1)),
        ((31,), (5, 2)),
        ((190,), (29, 10)),  # 28 in float64
        ((32, 0.25, 2.0), (8, 4)),  # t5, preprocessors_test.py
        ((12, 0.5, 3.0), (6, 2)),
        ((2009,), (301, 100)),
        ((2010,), (302, 101)),
        ((3, 0.9, 1.0), None),
        ((10, 0.9, 20.0), (9, 1)),
    ],
)
def test_known_counts(numbers, expected):
    if expected is None:
        with pytest.raises(ValueError, match="2 spans.* 1 of 3"):
            noise_counts(*numbers)
    else:
        assert noise_counts(*numbers) == expected


@pytest.mark.parametrize(
    ("density", "mean"), [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.2, 2.0)]
)
def test_counts_of_thousands_of_lengths(density, mean):
    for length in range(2, 3002):
        counts = counts_in_torch(length, density, mean)
        assert noise_counts(length, density, mean) == counts


def test_rounding_in_float32_matters_at_ties():
    differ = [
        length
        for length in range(4, 20_001)
        if noise_counts(length)[0] != round(length * 0.15)
    ]
    assert len(differ) == 166
    assert differ[:3] == [190, 350, 390]


# --- How long --------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((512,), (568, 114)),
        ((1024,), (1137, 229)),
        ((64, 0.2, 2.0), (70, 22)),  # t5, preprocessors_test.py
        ((64, 0.2, 1.0), (63, 27)),  # t5, preprocessors_test.py
        ((3,), (2, 3)),
    ],
)
def test_known_lengths(numbers, expected):
    assert span_lengths(*numbers) == expected


def test_lengths_are_those_of_t5_but_where_t5_misses_its_own_mask():
    ours = {length: span_lengths(length) for length in range(3, 800)}
    differ = [i for i, lengths in ours.items() if lengths != helper_of_t5(i)]
    assert differ[:8] == [3, 4, 5, 6, 7, 8, 9, 172]
    for length in differ:
        tokens, target = helper_of_t5(length)
        n, s = noise_counts(max(tokens, 2))
        fits = tokens - n + s + 1 <= length and n + s + 1 == target
        n, s = noise_counts(tokens + 1)
        room = tokens + 1 - n + s + 1 <= length
        assert not fits or room


@pytest.mark.parametrize("inputs_length", [3, 4, 9, 64, 172, 512])
def test_lengths_fill_the_source(inputs_length):
    tokens, targets = span_lengths(inputs_length)
    for length, fits in ((tokens, True), (tokens + 1, False)):
        mask = random_spans_noise_mask(length, batch=3)
        batch = corrupt_spans(torch.full((3, length), 7), mask, FIRST)
        assert (batch.src.shape[1] <= inputs_length) == fits
        if fits:
            assert batch.labels.shape == (3, targets)
            assert batch.mask.all() and (batch.labels != -100).all()


# --- Which -----------------------------------------------------------------


@many
@given(numbers, st.integers(1, 4), st.integers(0, 2**31))
def test_masks_have_exact_counts(numbers, batch, seed):
    length, density, mean = numbers
    n, s = counts_in_torch(length, density, mean)
    assume(s <= length - n)
    mask = random_spans_noise_mask(
        length, density, mean, batch=batch, generator=seeded(seed)
    )
    assert mask.dtype == torch.bool and mask.shape == (batch, length)
    assert not mask[:, 0].any() and mask[:, -1].all()
    for row in mask.tolist():
        assert sum(row) == n
        assert len(runs(row)) == s


def test_masks_of_thousands_of_lengths():
    for length in range(2, 2002):
        n, s = counts_in_torch(length, 0.15, 3.0)
        mask = random_spans_noise_mask(length)[0]
        starts = mask[1:] & ~mask[:-1]
        assert not mask[0] and mask[-1]
        assert (int(mask.sum()), int(starts.sum())) == (n, s)


def chi_square(seed: int, draws: int = 25_000) -> float:
    """Of 12 tokens, 6 are hidden in 2 spans: 25 masks, 24 degrees."""
    mask = random_spans_noise_mask(
        12, 0.5, batch=draws, generator=seeded(seed)
    )
    counts = Counter(map(tuple, mask.tolist()))
    assert len(counts) == 25
    share = draws / 25
    return sum((c - share) ** 2 / share for c in counts.values())


def test_all_masks_are_equally_likely():
    values = [chi_square(seed) for seed in range(8)]
    assert max(values) < 59  # once in 10,000
    assert 16 < sum(values) / 8 < 32  # 24, with a standard deviation of 2.4


def test_three_spans_are_uniform_too():
    mask = random_spans_noise_mask(
        12, 0.5, 2.0, batch=20_000, generator=seeded(3)
    )
    counts = Counter(map(tuple, mask.tolist()))
    assert len(counts) == 100  # (5 over 2) squared
    value = sum((c - 200) ** 2 / 200 for c in counts.values())
    assert value < 160  # 99 degrees, once in 10,000


def test_rows_and_draws_differ_and_a_seed_repeats_them():
    first = random_spans_noise_mask(568, batch=64, generator=seeded(5))
    again = random_spans_noise_mask(568, batch=64, generator=seeded(5))
    other = random_spans_noise_mask(568, batch=64, generator=seeded(6))
    assert len(set(map(tuple, first.tolist()))) == 64
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("length", "masks"), [(10, 1), (30, 1), (31, 100)])
def test_short_sequences_have_one_mask(length, masks):
    drawn = random_spans_noise_mask(length, batch=3000, generator=seeded(0))
    assert len(set(map(tuple, drawn.tolist()))) == masks


# --- Sentinels -------------------------------------------------------------


def test_known_answer_of_t5():
    tokens = torch.arange(10, 16)[None]
    mask = torch.tensor([[True, True, False, False, True, False]])
    batch = corrupt_spans(tokens, mask, FIRST)
    assert batch.src.tolist() == [[999, 12, 13, 998, 15, EOS]]
    assert batch.labels.tolist() == [[999, 10, 11, 998, 14, EOS]]


def test_figure_2_of_the_paper():
    words = "Thank you for inviting me to your party last week".split()
    hidden = torch.tensor([[w in "for inviting last".split() for w in words]])
    batch = corrupt_spans(torch.arange(10, 20)[None], hidden, FIRST)
    names = {EOS: "</s>", FIRST: "<X>", FIRST - 1: "<Y>"}
    names |= {10 + i: word for i, word in enumerate(words)}
    source, target = [
        " ".join(names[i] for i in ids[0].tolist())
        for ids in (batch.src, batch.labels)
    ]
    assert source == "Thank you <X> me to your party <Y> week </s>"
    assert target == "<X> for inviting <Y> last </s>"


@st.composite
def tokens_and_masks(draw):
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 60))
    generator = seeded(draw(st.integers(0, 2**31)))
    density = torch.rand(rows, 1, generator=generator) * 1.6 - 0.3
    mask = torch.rand(rows, length, generator=generator) < density
    tokens = torch.randint(0, 800, (rows, length), generator=generator)
    tokens[tokens == EOS] = 2
    return tokens, mask


@many
@given(tokens_and_masks())
def test_any_mask_agrees_with_the_slow_way(example):
    tokens, mask = example
    before = tokens.clone(), mask.clone()
    batch = corrupt_spans(tokens, mask, FIRST)
    assert batch.src.dtype == batch.labels.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    rows = zip(tokens.tolist(), mask.tolist())
    slow = [corrupt_slowly(*row) for row in rows]
    widths = [max(map(len, side)) for side in zip(*slow)]
    assert [batch.src.shape[1], batch.labels.shape[1]] == widths
    for i, (source, target) in enumerate(slow):
        pads = widths[0] - len(source)
        assert batch.src[i].tolist() == source + [0] * pads
        real = [True] * len(source) + [False] * pads
        assert batch.mask[i].tolist() == real
        pads = widths[1] - len(target)
        assert batch.labels[i].tolist() == target + [-100] * pads
    assert torch.equal(tokens, before[0]) and torch.equal(mask, before[1])


@many
@given(tokens_and_masks())
def test_nothing_is_lost(example):
    tokens, mask = example
    batch = corrupt_spans(tokens, mask, FIRST)
    restored = restore_spans(batch.src, batch.labels, FIRST)
    assert restored == tokens.tolist()


@many
@given(numbers, st.integers(0, 2**31))
def test_drawn_masks_give_what_t5_gives(numbers, seed):
    length, density, mean = numbers
    n, s = counts_in_torch(length, density, mean)
    assume(s <= min(length - n, 100))
    draw = seeded(seed)
    mask = random_spans_noise_mask(length, density, mean, generator=draw)
    tokens = torch.randint(2, 800, (1, length), generator=draw)
    batch = corrupt_spans(tokens, mask, FIRST)
    one, hide = tokens[0].numpy(), mask[0].numpy()
    assert batch.src[0].tolist() == [*rule_of_t5(one, hide), EOS]
    assert batch.labels[0].tolist() == [*rule_of_t5(one, ~hide), EOS]
    assert batch.src.shape[1] == length - n + s + 1
    assert batch.labels.shape[1] == n + s + 1


def test_a_rolled_mask_keeps_its_sentinels_in_step():
    """t5's random_roll: a span may stand at either end, or at both."""
    mask = random_spans_noise_mask(64, batch=64, generator=seeded(0))
    rolled = torch.stack([row.roll(i) for i, row in enumerate(mask)])
    assert rolled[:, 0].any() and not rolled[:, -1].all()
    tokens = torch.randint(2, 800, (64, 64), generator=seeded(0))
    batch = corrupt_spans(tokens, rolled, FIRST)
    assert restore_spans(batch.src, batch.labels, FIRST) == tokens.tolist()


def test_sentinels_count_down_in_both():
    mask = random_spans_noise_mask(568, batch=8, generator=seeded(0))
    tokens = torch.randint(2, 800, (8, 568), generator=seeded(0))
    batch = corrupt_spans(tokens, mask, FIRST)
    for ids in (*batch.src.tolist(), *batch.labels.tolist()):
        marks = [i for i in ids if i > 800]
        assert marks == SENTINELS[:28]
        assert all(one > two for one, two in pairwise(marks))
        assert ids[-1] == EOS and ids[-2] not in SENTINELS[28:]


def test_other_ids_for_eos_padding_and_sentinels():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]], dtype=torch.int32)
    mask = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1]]).bool()
    batch = corrupt_spans(
        tokens, mask, 50, eos_id=2, num_sentinels=2, pad_id=3
    )
    assert batch.src.tolist() == [[5, 50, 7, 49, 2], [5, 50, 2, 3, 3]]
    assert batch.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.labels.tolist() == [[50, 6, 49, 8, 2], [50, 6, 7, 8, 2]]
    again = restore_spans(
        batch.src, batch.labels, 50, eos_id=2, num_sentinels=2
    )
    assert again == tokens.tolist()


def test_exactly_as_many_spans_as_sentinels():
    mask = random_spans_noise_mask(2009, generator=seeded(0))
    batch = corrupt_spans(torch.full((1, 2009), 7), mask, 32099)
    assert batch.src[0].max() == 32099
    assert batch.src[batch.src > 7].min() == 32000


# --- The way back ----------------------------------------------------------


def test_answers_of_a_model_are_filled_in():
    src = torch.tensor([[5, 999, 7, 998, EOS, 0]])
    cases = {
        (999, 20, 21, 998, EOS): [5, 20, 21, 7],  # an empty span
        (0, 30, 999, 20, 998, 22): [5, 20, 7, 22],  # no eos; a start token
        (998, 22, EOS, 999, 20): [5, 999, 7, 22],  # not named before eos
        (EOS, 999): [5, 999, 7, 998],
        (999, 20, 998, 21, 997, 22): [5, 20, 7, 21],  # one too many
    }
    for answer, expected in cases.items():
        restored = restore_spans(src, torch.tensor([answer]), FIRST)
        assert restored == [expected]


# --- Rows ------------------------------------------------------------------


def test_pad_rows():
    rows = [[4, 5, 6], torch.tensor([7])]
    ids, mask = pad_rows(rows, fill=9)
    assert ids.tolist() == [[4, 5, 6], [7, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool


def test_a_row_may_hold_the_padding_id():
    """The mask counts tokens; it doesn't look at what they are."""
    _, mask = pad_rows([[4, 0], [0, 5, 0]])
    assert mask.tolist() == [[True, True, False], [True] * 3]


def test_a_batch_moves_to_a_device():
    batch = corrupt_spans(IDS, HIDE, FIRST).to("meta")
    assert isinstance(batch, Batch)
    assert [part.device.type for part in batch] == ["meta"] * 3
    assert [part.dtype for part in batch] == [
        torch.int64, torch.bool, torch.int64,
    ]


# --- Clear errors ----------------------------------------------------------

IDS, HIDE = torch.full((2, 4), 7), torch.zeros(2, 4, dtype=torch.bool)
ERRORS = {
    "one token": (lambda: noise_counts(1), "length 1,.*length >= 2"),
    "no noise": (lambda: noise_counts(9, 0.0), "density 0.0,"),
    "all noise": (lambda: noise_counts(9, 1.0), "density 1.0,"),
    "short spans": (lambda: noise_counts(9, 0.2, 0.5), "mean span 0.5"),
    "nan": (lambda: noise_counts(9, float("nan")), "noise density nan"),
    "no room": (
        lambda: random_spans_noise_mask(11, 0.5, 1.0),
        "6 spans.* 5 of 11",
    ),
    "short mask": (lambda: random_spans_noise_mask(0), "length 0,"),
    "short source": (lambda: span_lengths(2), "inputs_length 2.* 3"),
    "shapes": (
        lambda: corrupt_spans(IDS, HIDE[:, :3], FIRST),
        r"int64 \(2, 4\) and noise_mask is torch.bool \(2, 3\)",
    ),
    "one axis": (lambda: corrupt_spans(IDS[0], HIDE[0], FIRST), r"\(4,\)"),
    "empty": (
        lambda: corrupt_spans(IDS[:, :0], HIDE[:, :0], FIRST),
        r"\(2, 0\)",
    ),
    "no row": (lambda: corrupt_spans(IDS[:0], HIDE[:0], FIRST), r"\(0, 4\)"),
    "sentinels run out": (
        lambda: corrupt_spans(
            torch.full((1, 2010), 7), random_spans_noise_mask(2010), 32099
        ),
        "101 spans.* 100 sentinels",
    ),
    "token is a sentinel": (
        lambda: corrupt_spans(torch.full((2, 4), 900), HIDE, FIRST),
        r"token 900 .*100, from 999.*first_sentinel",
    ),
    "eos inside": (
        lambda: corrupt_spans(
            torch.tensor([[5, 6, 7], [5, 6, EOS]]), HIDE[:, :3], FIRST
        ),
        "token 2 of row 1 is 1.*eos",
    ),
    "another eos inside": (
        lambda: corrupt_spans(IDS, HIDE, FIRST, eos_id=7),
        "token 0 of row 0 is 7.*eos",
    ),
    "empty row": (lambda: pad_rows([[4], []]), r"lengths \[1, 0\]"),
    "no rows": (lambda: pad_rows([]), r"lengths \[\]"),
    "batches": (
        lambda: restore_spans(IDS, IDS[:1], FIRST),
        r"\(2, 4\) and \(1, 4\)",
    ),
    "rows": (lambda: restore_spans(IDS[0], IDS[0], FIRST), r"\(4,\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_clear_value_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (IDS.float(), HIDE, r"float32 \(2, 4\).*integer"),
        (IDS, HIDE.long(), r"int64 \(2, 4\); .*boolean"),
    ],
)
def test_clear_type_errors(tokens, mask, message):
    with pytest.raises(TypeError, match=message):
        corrupt_spans(tokens, mask, FIRST)


@pytest.mark.parametrize("token", [900, 999])
def test_the_ends_of_the_sentinels_are_refused_and_no_more(token):
    with pytest.raises(ValueError, match=f"token {token} .*sentinel"):
        corrupt_spans(torch.full((2, 4), token), HIDE, FIRST)
    for neighbour in (899, 1000):
        corrupt_spans(torch.full((2, 4), neighbour), HIDE, FIRST)
