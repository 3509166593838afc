"""Packed rows: each example gets what it gets alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t5_book.batches import Batch, pad_rows
from t5_book.losses import cross_entropy
from t5_book.masks import segment_mask
from t5_book.packing import PackedBatch, batch_logits, pack
from tests.conftest import (
    FAMILIES,
    SIZES,
    difference,
    make_family,
    refuses,
    seeded,
    their_logits,
    with_ids,
)


def examples(count=11, seed=0, longest=40) -> list[Batch]:
    """Examples of all lengths, each a batch of its own."""
    draw = seeded(seed)
    parts = []
    for s, t in torch.randint(1, longest, (count, 2), generator=draw).tolist():
        src = torch.randint(2, 120, (1, s), generator=draw)
        labels = torch.randint(2, 120, (1, t), generator=draw)
        parts.append(Batch(src, torch.ones_like(src).bool(), labels))
    return parts


def in_rows(parts: list[Batch]) -> Batch:
    """The same examples, padded, one in a row."""
    src, mask = pad_rows([part.src[0] for part in parts])
    return Batch(src, mask, pad_rows([part.labels[0] for part in parts], -100)[0])


def pack_slowly(parts, src_length, tgt_length) -> list[list[int]]:
    """Which examples go into which row, by the rule of the docstring."""
    rows, used = [], []
    for i, part in enumerate(parts):
        s, t = part.src.shape[1], part.labels.shape[1]
        for row, sums in zip(rows, used):
            if sums[0] + s <= src_length and sums[1] + t <= tgt_length:
                break
        else:
            row, sums = [], [0, 0]
            rows.append(row)
            used.append(sums)
        row.append(i)
        sums[0] += s
        sums[1] += t
    return rows


def pack_all(parts, s=64, t=56) -> tuple[PackedBatch, list[Batch]]:
    """Packed rows, and the examples in the order in which they lie there."""
    order = sum(pack_slowly(parts, s, t), [])
    return pack(parts, s, t), [parts[i] for i in order]


@torch.no_grad()
def together(model, packed) -> list[torch.Tensor]:
    """The logits of each example, row by row."""
    return [
        row[writes == i]
        for row, writes in zip(batch_logits(model, packed), packed.tgt_segments)
        for i in range(1, int(writes.max()) + 1)
    ]


@torch.no_grad()
def alone(model, parts) -> list[torch.Tensor]:
    return [batch_logits(model, part)[0] for part in parts]


def worst(ours, theirs) -> float:
    pairs = list(zip(ours, theirs, strict=True))
    return max(difference(*pair) for pair in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_each_alone(family):
    model, reference = make_family(family)
    packed, parts = pack_all(examples())
    assert len(packed.src) < len(parts) - 4
    assert (packed.tgt_segments.max(dim=1).values > 2).any()
    tgts = [model.shift_right(part.labels) for part in parts]
    with torch.no_grad():
        theirs = [their_logits(reference, p.src, tgt)[0] for p, tgt in zip(parts, tgts)]
    assert worst(together(model, packed), theirs) <= 1e-5

    for model in (model.double(), with_ids(model.double(), start_id=5, pad_id=3)):
        assert worst(together(model, packed), alone(model, parts)) <= 1e-12
        results = []
        for batch in (in_rows(parts), packed):
            model.zero_grad()
            loss = cross_entropy(batch_logits(model, batch), batch.labels, 0.1, 1e-4)
            loss.backward()
            results.append([loss, *[weight.grad.clone() for weight in model.parameters()]])
        assert worst(*results) <= 1e-12


@pytest.mark.parametrize("rows", [SIZES["heads"], 7])
def test_as_many_rows_as_heads_or_tokens(rows):
    """Where a mask that lost an axis would still fit."""
    model = make_family("umt5")[0].double()
    packed, parts = pack_all(examples(6 * rows, longest=3), 7, 7)
    ours = together(model, PackedBatch(*(part[:rows] for part in packed)))
    assert worst(ours, alone(model, parts[: len(ours)])) <= 1e-12


@pytest.mark.parametrize("examples, room", [(examples(6, longest=200), 500), (examples(), 39)])
def test_beyond_the_last_bucket_and_one_example_in_a_row(examples, room):
    model, (packed, parts) = make_family("t5")[0].double(), pack_all(examples, room, room)
    assert room == 500 or (packed.tgt_segments.max(dim=1).values == 1).any()
    assert worst(together(model, packed), alone(model, parts)) <= 1e-12


def test_padding_is_finite_and_moves_nothing():
    model, packed = make_family("t5")[0], pack(examples(), 64, 56)
    logits = batch_logits(model, packed)
    assert logits.isfinite().all()
    noise = torch.randint(2, 120, packed.src.shape)
    src = packed.src.where(packed.src_segments > 0, noise)
    assert not torch.equal(src, packed.src)
    real = packed.labels != -100
    assert torch.equal(logits[real], batch_logits(model, packed._replace(src=src))[real])
    logits[real].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_segment_mask_by_loop():
    queries = [[1, 1, 2, 0], [1, 2, 3, 3]]
    keys = [[1, 2, 2, 0, 0], [1, 1, 2, 3, 0]]
    mask = segment_mask(torch.tensor(queries), torch.tensor(keys))
    assert mask.dtype == torch.bool
    for rows, q_row, k_row in zip(mask.tolist(), queries, keys):
        assert rows == [[q == k and k > 0 for k in k_row] for q in q_row]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(*[st.integers(*ends) for ends in [(1, 30), (0, 10**6), (12, 60), (12, 60)]])
def test_rows_hold_the_examples_and_nothing_else(count, seed, s, t):
    parts = examples(count, seed, longest=13)
    packed, rows = pack(parts, s, t), pack_slowly(parts, s, t)
    assert all(part.dtype == torch.int64 for part in packed)
    assert packed.src.shape == packed.src_segments.shape == (len(rows), s)
    assert packed.labels.shape == packed.tgt_segments.shape == (len(rows), t)
    for field, fill in [("src", 0), ("labels", -100)]:
        segments = packed.src_segments if field == "src" else packed.tgt_segments
        for row, ids, numbers in zip(rows, getattr(packed, field), segments):
            pieces = [getattr(parts[i], field)[0].tolist() for i in row]
            laid = sum(pieces, [])
            counted = [n for n, piece in enumerate(pieces, 1) for _ in piece]
            rest = len(ids) - len(laid)
            assert ids.tolist() == laid + [fill] * rest
            assert numbers.tolist() == counted + [0] * rest
    # The padding of a batch is left behind.
    middle = count // 2
    batches = [in_rows(half) for half in (parts[:middle], parts[middle:]) if half]
    assert all(map(torch.equal, packed, pack(batches, s, t)))


def test_all_parts_go_to_a_device():
    moved = pack(examples(), 64, 56).to("meta")
    assert isinstance(moved, PackedBatch) and all(part.is_meta for part in moved)


def test_what_cannot_be_packed_is_refused():
    src, labels = torch.full((3, 4), 7), torch.full((3, 5), 7)
    batch = Batch(src, src > 0, labels)
    assert len(pack([batch], 4, 5).src) == 3
    nothing = {"mask": src < 0, "labels": labels * 0 - 100}
    for wrong, lengths, words in [
        ({}, (3, 9), ("[4, 5]", "[3, 9]")),
        ({}, (9, 4), ("[4, 5]", "[9, 4]")),
        # A target without a source would attend to all keys of its row.
        ({"mask": nothing["mask"]}, (8, 8), ("[0, 5]",)),
        ({"labels": nothing["labels"]}, (8, 8), ("[4, 0]",)),
        # No example may be dropped in silence.
        ({"src": src[:2]}, (8, 8), ("(2, 4)", "(3, 4)")),
        ({"mask": batch.mask[:2]}, (8, 8), ("(2, 4)", "(3, 4)")),
        ({"labels": labels[:2]}, (8, 8), ("(2, 5)", "(3, 4)")),
    ]:
        refuses(lambda: pack([batch, batch._replace(**wrong)], *lengths), *words)
    # It would pick tokens 0 and 1, over and over.
    for dtype in (torch.int64, torch.uint8, torch.float32):
        wrong = batch._replace(mask=batch.mask.to(dtype))
        refuses(lambda: pack([wrong], 8, 8), "mask", "bool", error=TypeError)
    refuses(lambda: pack([], 8, 8), "nothing to pack")
