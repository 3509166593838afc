"""The whole model against ``transformers``: five families, two precisions.

``python benchmarks/exactness.py`` prints the largest differences.
"""

import math

import pytest
import torch

from tests.conftest import (
    FAMILIES,
    PAIRS,
    RELEASED,
    batch_with_labels,
    difference,
    exact_norms,
    gradients,
    make_family,
    padded,
    random_ids,
    small_t5,
    their_logits,
    with_ids,
)

pytestmark = pytest.mark.rounding


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["float32", "float64"])
def pair(family, request):
    """Ours and the reference of a family, in one of the precisions."""
    ours, reference = make_family(family)
    if request.param == "float32":
        return ours, reference
    return ours.double(), exact_norms(reference.double())


def bound(pair, float32=1e-5):
    """The difference that rounding explains."""
    return float32 if pair[0].head.weight.dtype == torch.float32 else 1e-11


@torch.no_grad()
def assert_same(pair, *inputs, within=1e-5):
    """Ours and the reference give the same logits; return ours."""
    ours, reference = pair
    logits, theirs = ours(*inputs), their_logits(reference, *inputs)
    assert theirs.std() > 0.3  # a comparison of zeros would prove nothing
    assert logits.isfinite().all()
    assert difference(logits, theirs) <= within, [tuple(part.shape) for part in inputs]
    return logits


# --- Logits ---------------------------------------------------------------


def test_logits(pair):
    """Where batch, lengths and heads are as many, a wrong mask may fit by accident."""
    batches = [padded(3, s, t) for s, t in PAIRS]
    for s, t in [(1, 9), (10, 10), (40, 140), (140, 1)]:
        batches.append((random_ids(3, s), random_ids(3, t, 1)))
    for s, t in [(9, 9), (9, 4), (4, 9)]:
        batches += [padded(9, s, t), padded(9, s, t)[:3]]
    batches.append(padded(pair[0].config.enc_heads, 10, 12))
    for batch in batches:
        assert_same(pair, *batch, within=bound(pair))


def test_rows_that_are_padding_alone(pair):
    """They mean nothing, but must not turn the batch into NaN."""
    src, tgt, mask, tgt_mask = padded(4, 10, 9)
    mask[2] = tgt_mask[0] = False
    mask[3] = tgt_mask[3] = False
    logits = assert_same(pair, src, tgt, mask, tgt_mask, within=bound(pair))
    alone = [part[1:2] for part in (src, tgt, mask, tgt_mask)]
    assert difference(pair[0](*alone), logits[1:2]) <= bound(pair)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_other_attention_of_the_reference(family, rate):
    """By default it runs torch's. With its own it draws the dropout that we draw.

    From one seed the same numbers fall, so a dropout too many, too few or
    at another place shows.
    """
    ours, reference = make_family(family, dropout_rate=rate)
    ours = with_ids(ours, dropout=rate)
    reference.set_attn_implementation("eager")
    batch = padded(3, 40, 21)
    quiet = assert_same((ours, reference), *batch)
    torch.manual_seed(5)
    theirs = their_logits(reference.train(), *batch)
    torch.manual_seed(5)
    logits = ours.train()(*batch)
    assert difference(logits, theirs) <= 1e-5
    assert torch.equal(logits, quiet) == (rate == 0)


@pytest.mark.parametrize("family", RELEASED)
def test_a_released_shape_at_the_lengths_of_pre_training(family):
    pair = make_family(family, **RELEASED[family])
    row = slice(1, 2) if family == "t5" else slice(0, 1)  # padded left or right
    assert_same(pair, *(part[row] for part in padded(2, 512, 114, 32100)))


def test_the_families_differ():
    """Were they all one model, five would prove no more than one."""
    seen = {}
    for family in FAMILIES:
        ours, reference = make_family(family)
        tied = reference.lm_head.weight is reference.shared.weight
        kind = type(reference).__name__.removesuffix("ForConditionalGeneration")
        tables = len(ours.encoder.biases), len(ours.decoder.biases)
        seen[family] = kind, tied, ours.config.enc_depth, *tables
    assert seen == {
        "t5": ("T5", True, 3, 1, 1),
        "t5-v1_1": ("T5", False, 3, 1, 1),
        "mt5": ("MT5", False, 3, 1, 1),
        "byt5": ("T5", False, 4, 1, 1),
        "umt5": ("UMT5", False, 3, 3, 2),
    }


# --- Losses and gradients -------------------------------------------------


@pytest.mark.parametrize("s, t", [(10, 9), (40, 10), (9, 40)])
def test_loss_and_gradients(pair, s, t):
    loss, theirs, grads = gradients(*pair, *batch_with_labels(s, t))
    assert abs(loss - theirs) <= bound(pair)
    for name, (ours, reference) in grads.items():
        error = (ours - reference).norm() / reference.norm()
        assert error <= bound(pair, float32=1e-4), name


# --- Fresh models ---------------------------------------------------------

# All that a standard deviation depends on is different: dim 96, heads times
# dim_head 160, dim_head 40, hidden features 288.
FRESH = dict(dim=96, num_tokens=4096, depth=2, heads=4, dim_head=40, mlp_mult=3)
STDS = {
    "q": (96 * 40) ** -0.5,
    "k": 96**-0.5,
    "v": 96**-0.5,
    "o": 160**-0.5,
    "wi": 96**-0.5,
    "wi_0": 96**-0.5,
    "wi_1": 96**-0.5,
    "wo": 288**-0.5,
    "table": (2 / (32 + 4)) ** 0.5,  # Glorot's, of 32 buckets and 4 heads
    "enc_emb": 1.0,
    "dec_emb": 1.0,
}


@pytest.mark.parametrize("kind, tied", [("relu", True), ("gated-gelu", False)])
def test_fresh_weights_are_as_large_as_in_t5(kind, tied):
    model = small_t5(**FRESH, feed_forward=kind, tie_head=tied)
    stds = STDS | {"head": 1.0 if tied else 96**-0.5}
    for name, weight in model.state_dict().items():
        part = name.split(".")[-2]
        if "norm" in part:
            assert (weight == 1).all(), name
            continue
        ratio, noise = weight.std() / stds[part], weight.numel() ** -0.5
        assert ratio == pytest.approx(1, abs=4 * noise), name
        assert weight.mean().abs() < 5 * weight.std() * noise, name
        if part == "table":  # uniform
            assert weight.abs().max() <= 3**0.5 * stds[part]
    # Then a guess costs what a uniform one does.
    loss = model.loss(random_ids(4, 32, high=4096), random_ids(4, 20, 1, high=4096))
    assert 0.9 < loss / math.log(4096) < 1.1
