"""Packed rows: each example gets what it gets alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from t5_book.batches import Batch, pad_rows
from t5_book.evaluation import evaluate
from t5_book.losses import cross_entropy
from t5_book.masks import segment_mask
from t5_book.objectives import (
    SpecialIds,
    bert_denoising,
    prefix_lm,
    ul2_denoising,
)
from t5_book.packing import PackedBatch, batch_logits, pack, packed_logits
from tests.conftest import SIZES, difference, make_ours, make_pair

UNTIED = dict(feed_forward="gated-gelu", tie_head=False)
FAMILIES = {
    "T5 1.0": {},
    "T5 1.1": UNTIED,
    "UMT5": UNTIED | {"bias_per_layer": True},
    "relu, bias per layer": {"bias_per_layer": True},
    "another start": dict(start_id=5, pad_id=3),
}
many = settings(max_examples=100, deadline=None, derandomize=True)


def model_of(family: str, dtype=torch.float32):
    """A model in which every part matters: large biases, uneven norms."""
    torch.manual_seed(0)
    model = make_ours(**FAMILIES[family]).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn_like(weight)
        if "biases" in name:
            weight.data.normal_()
    return model.to(dtype)


def examples(count=11, seed=0, longest=40) -> list[Batch]:
    """Examples of all lengths, each a batch of its own."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest, (count, 2), generator=draw).tolist()
    return [
        Batch(src, torch.ones_like(src).bool(), labels)
        for s, t in sizes
        for src in [torch.randint(2, 120, (1, s), generator=draw)]
        for labels in [torch.randint(2, 120, (1, t), generator=draw)]
    ]


def padded(parts: list[Batch]) -> Batch:
    """The same examples, one in a row."""
    src, mask = pad_rows([part.src[0] for part in parts])
    return Batch(src, mask, pad_rows([p.labels[0] for p in parts], -100)[0])


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
    rows = pack_slowly(parts, s, t)
    return pack(parts, s, t), [parts[i] for row in rows for i in row]


def segments(values, packed: PackedBatch) -> list[torch.Tensor]:
    """What each example got, row by row."""
    return [
        row[writes == i]
        for row, writes in zip(values, packed.tgt_segments)
        for i in range(1, int(writes.max()) + 1)
    ]


def together(model, packed, logits=batch_logits) -> list[torch.Tensor]:
    with torch.no_grad():
        return segments(logits(model, packed), packed)


def alone(model, parts) -> list[torch.Tensor]:
    with torch.no_grad():
        return [batch_logits(model, part)[0] for part in parts]


def worst(ours, theirs) -> float:
    pairs = list(zip(ours, theirs, strict=True))
    return max(difference(*pair) for pair in pairs)


# --- Equal to running them apart --------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)
def test_packed_logits_are_those_of_each_alone(family, dtype, most):
    model, (packed, parts) = model_of(family, dtype), pack_all(examples())
    assert len(packed.src) < len(parts) - 4
    assert (packed.tgt_segments.max(dim=1).values > 2).any()
    assert worst(together(model, packed), alone(model, parts)) <= most


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_padded_rows(family):
    model, parts = model_of(family, torch.float64), examples()
    results = []
    for batch in (padded(parts), pack(parts, 64, 56)):
        model.zero_grad()
        logits = batch_logits(model, batch)
        loss = cross_entropy(logits, batch.labels, 0.1, 1e-4)
        loss.backward()
        grads = [weight.grad.clone() for weight in model.parameters()]
        results.append([loss, *grads])
    assert worst(*results) <= 1e-12


def test_the_loss_is_the_models_own():
    model, parts = model_of("T5 1.0", torch.float64), examples()
    one, packed = padded(parts), pack(parts, 64, 56)
    own = model.loss(one.src, one.labels, one.mask)
    ours = cross_entropy(batch_logits(model, packed), packed.labels)
    assert difference(ours, own) <= 1e-12
    # It sums in float32, and packing changes the order.
    assert evaluate(model, [packed]) == pytest.approx(
        evaluate(model, [one]), rel=1e-6
    )


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_agrees_with_the_reference_on_each_example_alone(feed_forward):
    model, reference = make_pair(feed_forward)
    packed, parts = pack_all(examples())
    with torch.no_grad():
        theirs = [
            reference(
                input_ids=part.src,
                decoder_input_ids=model.shift_right(part.labels),
            ).logits[0]
            for part in parts
        ]
    assert worst(together(model, packed), theirs) <= 1e-5


@pytest.mark.parametrize("rows", [SIZES["heads"], 7])
def test_as_many_rows_as_heads_or_tokens(rows):
    """Where a mask that lost an axis would still fit."""
    model = model_of("UMT5", torch.float64)
    batch, parts = pack_all(examples(6 * rows, longest=3), 7, 7)
    batch = PackedBatch(*(part[:rows] for part in batch))
    assert len(batch.src) == rows
    ours = together(model, batch)
    assert worst(ours, alone(model, parts[: len(ours)])) <= 1e-12


def test_beyond_the_last_bucket():
    model = model_of("T5 1.0", torch.float64)
    packed, parts = pack_all(examples(6, longest=200), 500, 500)
    assert worst(together(model, packed), alone(model, parts)) <= 1e-12


def test_one_example_in_a_row_is_not_special():
    model = model_of("T5 1.1", torch.float64)
    packed, parts = pack_all(examples(), 39, 39)
    single = packed.tgt_segments.max(dim=1).values == 1
    assert single.any()
    assert worst(together(model, packed), alone(model, parts)) <= 1e-12


def test_batches_of_objectives_can_be_mixed():
    ids = SpecialIds(127)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, 28, (3, 30), generator=draw)
    modes = {"R": [4], "S": [5, 6], "X": [7, 8, 9]}
    batches = [
        prefix_lm(tokens, ids, generator=draw),
        bert_denoising(tokens, ids, generator=draw),
        ul2_denoising(tokens, ids, modes, generator=draw),
    ]
    model = model_of("T5 1.0", torch.float64)
    parts = [
        Batch(src[mask][None], mask[mask][None], labels[labels != -100][None])
        for batch in batches
        for src, mask, labels in zip(*batch)
    ]
    packed, parts = pack_all(parts, 80, 90)
    assert all(map(torch.equal, packed, pack(batches, 80, 90)))
    assert worst(together(model, packed), alone(model, parts)) <= 1e-12


def test_padding_is_finite_and_moves_nothing():
    model, parts = model_of("T5 1.0"), examples()
    packed = pack(parts, 64, 56)
    logits = batch_logits(model, packed)
    assert logits.isfinite().all()
    noise = torch.randint(2, 120, packed.src.shape)
    src = packed.src.where(packed.src_segments > 0, noise)
    assert not torch.equal(src, packed.src)
    other = batch_logits(model, packed._replace(src=src))
    real = packed.labels != -100
    assert torch.equal(logits[real], other[real])
    logits[real].sum().backward()
    for weight in model.parameters():
        assert weight.grad.isfinite().all()


# --- The tests above can fail -----------------------------------------------


def leaky(leak: str):
    """``batch_logits`` with one of the four things left out."""

    def logits(model, batch):
        src, reads, labels, writes = batch
        tgt = model.shift_right(labels)
        before = nn.functional.pad(writes[:, :-1], (1, 0))
        if leak != "start":
            tgt = tgt.masked_fill(writes != before, model.config.start_id)
        source, target = reads > 0, writes > 0
        inner = segment_mask(reads, reads)
        cross = segment_mask(writes, reads)
        own = segment_mask(writes, writes)
        memory = model.encode(src, source if leak == "encoder" else inner)
        return model.decode(
            tgt,
            memory,
            source if leak == "cross" else cross,
            target if leak == "decoder" else own,
        )

    return logits


@pytest.mark.parametrize("leak", ["encoder", "cross", "decoder", "start"])
def test_each_leak_is_seen(leak):
    model = model_of("T5 1.0", torch.float64)
    packed, parts = pack_all(examples())
    expected = alone(model, parts)
    assert worst(together(model, packed, leaky("none")), expected) <= 1e-12
    assert worst(together(model, packed, leaky(leak)), expected) > 0.01


# --- Masks and rows ---------------------------------------------------------


def test_segment_mask_by_loop():
    queries = torch.tensor([[1, 1, 2, 0], [1, 2, 3, 3]])
    keys = torch.tensor([[1, 2, 2, 0, 0], [1, 1, 2, 3, 0]])
    mask = segment_mask(queries, keys)
    assert mask.shape == (2, 4, 5) and mask.dtype == torch.bool
    for b in range(2):
        for q in range(4):
            for k in range(5):
                same = queries[b, q] == keys[b, k] and keys[b, k] > 0
                assert mask[b, q, k] == same


@many
@given(
    st.integers(1, 30), st.integers(0, 10**6), st.integers(12, 60),
    st.integers(12, 60),
)
def test_rows_hold_the_examples_and_nothing_else(count, seed, s, t):
    parts = examples(count, seed, longest=13)
    packed, rows = pack(parts, s, t), pack_slowly(parts, s, t)
    assert all(part.dtype == torch.int64 for part in packed)
    assert packed.src.shape == packed.src_segments.shape == (len(rows), s)
    assert packed.labels.shape == packed.tgt_segments.shape == (len(rows), t)
    for row, *sides in zip(rows, *packed):
        for (ids, numbers), field, fill in (
            (sides[:2], "src", 0),
            (sides[2:], "labels", -100),
        ):
            pieces = [getattr(parts[i], field)[0].tolist() for i in row]
            laid = sum(pieces, [])
            counted = [n for n, p in enumerate(pieces, 1) for _ in p]
            rest = len(ids) - len(laid)
            assert ids.tolist() == laid + [fill] * rest
            assert numbers.tolist() == counted + [0] * rest


def test_padding_of_a_batch_is_left_behind():
    batch = Batch(
        torch.tensor([[5, 6, 0], [7, 8, 9]]),
        torch.tensor([[True, True, False], [True, True, True]]),
        torch.tensor([[4, 1], [1, -100]]),
    )
    packed = pack([batch], 6, 4)
    assert packed.src.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert packed.src_segments.tolist() == [[1, 1, 2, 2, 2, 0]]
    assert packed.labels.tolist() == [[4, 1, 1, -100]]
    assert packed.tgt_segments.tolist() == [[1, 1, 2, 0]]


def test_each_segment_begins_with_the_start_token():
    model = model_of("another start")
    packed, parts = pack_all(examples())
    seen = []
    model.dec_emb.register_forward_hook(lambda *call: seen.append(call[1][0]))
    batch_logits(model, packed)
    for tgt, part in zip(segments(seen[-1], packed), parts, strict=True):
        assert tgt.tolist() == [5, *part.labels[0, :-1].tolist()]


def test_decoder_inputs_that_are_ready():
    """``batch_logits`` with the shifting done by the caller."""
    model = model_of("another start")
    packed, parts = pack_all(examples())
    tgt = packed.labels.clone()
    for row, numbers in zip(tgt, packed.tgt_segments):
        for i in range(1, int(numbers.max()) + 1):
            places = (numbers == i).nonzero()[:, 0]
            row[places] = torch.cat([torch.tensor([5]), row[places][:-1]])
    tgt[packed.tgt_segments == 0] = 3
    with torch.no_grad():
        logits = packed_logits(
            model, packed.src, tgt, packed.src_segments, packed.tgt_segments
        )
    assert worst(segments(logits, packed), alone(model, parts)) <= 1e-5


def test_all_parts_go_to_a_device():
    packed, _ = pack_all(examples())
    moved = packed.to("meta")
    assert isinstance(moved, PackedBatch) and all(part.is_meta for part in moved)


@pytest.mark.parametrize("lengths", [(3, 9), (9, 4)])
def test_an_example_that_fits_no_row_is_refused(lengths):
    src, labels = torch.full((1, 4), 7), torch.full((1, 5), 7)
    batch = Batch(src, torch.ones_like(src).bool(), labels)
    assert len(pack([batch], 4, 5).src) == 1
    numbers = rf"\[4, 5\].*\[{lengths[0]}, {lengths[1]}\]"
    with pytest.raises(ValueError, match=numbers):
        pack([batch], *lengths)


@pytest.mark.parametrize("part", ["mask", "labels"])
def test_an_example_without_source_or_target_is_refused(part):
    """A target without a source would attend to all keys of its row."""
    src = torch.full((1, 4), 7)
    batch = Batch(src, torch.ones_like(src).bool(), src)
    nothing = {"mask": torch.zeros_like(batch.mask), "labels": src * 0 - 100}
    empty = batch._replace(**{part: nothing[part]})
    with pytest.raises(ValueError, match=r"\[0, 4\]|\[4, 0\]"):
        pack([batch, empty], 8, 8)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_numbers_is_refused(dtype):
    """It would pick tokens 0 and 1, over and over."""
    src = torch.tensor([[5, 6, 7, 0]])
    batch = Batch(src, src != 0, src)
    with pytest.raises(TypeError, match="mask.*bool"):
        pack([batch._replace(mask=batch.mask.to(dtype))], 8, 8)


@pytest.mark.parametrize("part", ["src", "mask", "labels"])
def test_parts_of_a_batch_must_fit(part):
    """No example may be dropped in silence."""
    src = torch.full((3, 4), 7)
    batch = Batch(src, torch.ones_like(src).bool(), src)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\)|\(3, 4\).*\(2, 4\)"):
        pack([batch._replace(**{part: getattr(batch, part)[:2]})], 8, 8)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([], 8, 8)
