"""Losses, evaluation and schedules, written out."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from t5_book.batches import Batch
from t5_book.evaluation import evaluate
from t5_book.losses import batch_loss, cross_entropy
from t5_book.packing import batch_logits, pack
from t5_book.schedules import inverse_sqrt_schedule, linear_schedule
from tests.conftest import padding_masks, random_ids, refuses, small_t5

pytestmark = pytest.mark.rounding

make_model = partial(small_t5, num_tokens=16)


def make_batch(s, t):
    """Sources with padding on both sides, and some labels that don't count."""
    src, labels = random_ids(3, s, 0, high=16), random_ids(3, t, 1, high=16)
    labels[0, t // 3 :] = labels[2, -1:] = -100
    return Batch(src, padding_masks(3, s), labels)


BATCHES = [make_batch(40, 10), make_batch(7, 5)]


# --- The loss of t5x ------------------------------------------------------


def slowly(logits, labels, smoothing=0.0, z_loss=0.0):
    """t5x's compute_weighted_cross_entropy, one number at a time."""
    total, count = 0.0, 0
    for scores, label in zip(logits.flatten(0, 1).tolist(), labels.flatten()):
        if label == -100:
            continue
        v, log_z = len(scores), math.log(sum(map(math.exp, scores)))
        on, off = 1.0 - smoothing, smoothing / (v - 1)
        target = [on if i == label else off for i in range(v)]
        total -= sum(p * (s - log_z) for p, s in zip(target, scores))
        total += sum(p * math.log(p) for p in target if p > 0)
        total += z_loss * log_z**2
        count += 1
    return total / count


def drawn(v=16):
    labels = torch.randint(0, v, (3, 7))
    labels[1, 4:] = labels[2, 1:] = -100
    return (2 * torch.randn(3, 7, v)).double() + 1, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.49])
@pytest.mark.parametrize("v", [2, 16, 130])
def test_cross_entropy_by_loop_and_its_gradient(smoothing, v):
    logits, labels = drawn(v)
    for z_loss in (0.0, 1e-4, 0.1):
        ours = cross_entropy(logits, labels, smoothing, z_loss)
        assert abs(ours - slowly(logits, labels, smoothing, z_loss)) < 1e-12, z_loss
    extras = partial(cross_entropy, label_smoothing=smoothing, z_loss=0.1)
    assert torch.autograd.gradcheck(lambda x: extras(x, labels), logits.requires_grad_())


def test_half_precision_is_summed_in_float32():
    logits, labels = drawn(v=2000)
    half = logits.bfloat16()
    ours = cross_entropy(half, labels, 0.1, 1e-4)
    assert ours.dtype == torch.float32
    assert abs(ours - cross_entropy(half.double(), labels, 0.1, 1e-4)) < 1e-5


def test_without_extras_the_loss_of_a_batch_is_that_of_the_model():
    model, batch = make_model(), BATCHES[0]
    own = model.loss(batch.src, batch.labels, batch.mask)
    assert torch.equal(batch_loss(model, batch), own)


def test_what_is_no_label_and_no_smoothing_is_refused():
    logits, labels = drawn()
    # From 15/16 on, each of 15 other ids would be as likely as the label.
    for smoothing in (-0.1, 15 / 16, 1.0, 10, math.nan):
        refuses(lambda: cross_entropy(logits, labels, smoothing), f"is {smoothing}")
    for wrong, error, words in [
        (labels[:, :6], ValueError, ["(3, 7, 16)", "(3, 6)"]),
        (torch.full((3, 7), 0.7), TypeError, ["float32"]),
        (16 * torch.eye(3, 7).long(), IndexError, ["0 to 16"]),
    ]:
        refuses(lambda: cross_entropy(logits, wrong), *words, error=error)


# --- Evaluation -----------------------------------------------------------


def test_evaluate_counts_tokens_and_not_batches_nor_rows():
    model = make_model(dropout=0.5)
    found = evaluate(model, BATCHES)
    assert model.training
    packed = [pack([batch], 64, 32) for batch in BATCHES]
    assert evaluate(model, packed) == pytest.approx(found, abs=1e-5)
    model.eval()
    losses, right = [], []
    for batch in BATCHES:
        real = batch.labels != -100
        logits, labels = batch_logits(model, batch)[real], batch.labels[real]
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        right += (logits.argmax(dim=-1) == labels).tolist()
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert 0 < found["accuracy"] == sum(right) / len(right)


def test_evaluate_sums_in_float32():
    """In half precision a sum of a few thousand nats loses its digits."""
    model = make_model().bfloat16().eval()
    src, mask, labels = (torch.cat([part] * 200) for part in BATCHES[0])
    with torch.no_grad():
        logits = batch_logits(model, Batch(src, mask, labels)).double()
    exact = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = evaluate(model, [Batch(src, mask, labels.int())])
    assert found["loss"] == pytest.approx(exact.item(), rel=1e-6)


def test_evaluate_needs_a_label():
    batch = BATCHES[0]
    for nothing in [], [batch._replace(labels=batch.labels * 0 - 100)]:
        refuses(lambda: evaluate(make_model(), nothing), "no label")


# --- Schedules ------------------------------------------------------------


def test_the_linear_schedule_climbs_and_falls_to_zero():
    factor = linear_schedule(steps=10, warmup=4)
    down = [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, *down]
    assert [factor(step) for step in range(12)] == pytest.approx(expected)
    assert factor(11) == 0
    for warmup in (0, 10, 11):
        words = f"warmup is {warmup}", "10 steps"
        refuses(lambda: linear_schedule(steps=10, warmup=warmup), *words)


@pytest.mark.parametrize("warmup", [1, 5, 10_000])
def test_the_papers_schedule_is_that_of_adafactor(warmup):
    factor = inverse_sqrt_schedule(warmup)
    for n in (0, 1, 4, 5, 6, 9_999, 10_000, 40_000, 10**6):
        rate = warmup**-0.5 * factor(n)
        assert rate == pytest.approx(max(n, warmup) ** -0.5, rel=1e-12)
    assert factor(0) == factor(warmup) == 1
    assert inverse_sqrt_schedule()(40_000) == 0.5
    refuses(lambda: inverse_sqrt_schedule(0), "warmup is 0")
