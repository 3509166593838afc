"""The whole model against ``transformers``: five families, two precisions.

``python benchmarks/exactness.py`` prints the largest differences.
"""

import pytest
import torch
from torch.nn.utils import get_total_norm

from t5_book.t5 import T5
from tests.conftest import (
    FAMILIES,
    PAIRS,
    RELEASED,
    SIZES,
    batch_with_labels,
    difference,
    exact_norms,
    gradients,
    make_family,
    padded,
    random_ids,
    their_logits,
)

pytestmark = pytest.mark.rounding

DIFFERENT = [(1, 9), (9, 1), (10, 40), (40, 10), (40, 140), (140, 9)]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """Ours and the reference of a family, in float32."""
    return make_family(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def wide_pair(request):
    """Ours and the reference of a family, in float64."""
    ours, reference = make_family(request.param)
    return ours.double(), exact_norms(reference.double())


@torch.no_grad()
def assert_same(pair, *inputs, within=1e-5):
    """Ours and the reference give the same logits; return ours."""
    ours, reference = pair
    logits, theirs = ours(*inputs), their_logits(reference, *inputs)
    assert theirs.std() > 0.3  # a comparison of zeros would prove nothing
    assert logits.isfinite().all()
    assert difference(logits, theirs) <= within
    return logits


# --- Logits ---------------------------------------------------------------


@pytest.mark.parametrize("s, t", PAIRS)
def test_logits(pair, s, t):
    assert_same(pair, *padded(3, s, t))


@pytest.mark.parametrize("s, t", DIFFERENT)
def test_logits_in_float64(wide_pair, s, t):
    assert_same(wide_pair, *padded(3, s, t), within=1e-11)


@pytest.mark.parametrize("s, t", [(1, 9), (10, 10), (40, 140), (140, 1)])
def test_without_masks(pair, s, t):
    assert_same(pair, random_ids(3, s), random_ids(3, t, 1))


@pytest.mark.parametrize("s, t", [(9, 9), (9, 4), (4, 9)])
def test_batch_equals_length(pair, s, t):
    src, tgt, mask, tgt_mask = padded(9, s, t)
    assert_same(pair, src, tgt, mask)
    assert_same(pair, src, tgt, mask, tgt_mask)


def test_batch_equals_heads(pair):
    heads = pair[0].config.enc_heads
    assert_same(pair, *padded(heads, 10, 12))


def test_rows_that_are_padding_alone(wide_pair):
    """They mean nothing, but must not turn the batch into NaN."""
    src, tgt, mask, tgt_mask = padded(4, 10, 9)
    mask[2] = tgt_mask[0] = False
    mask[3] = tgt_mask[3] = False
    logits = assert_same(wide_pair, src, tgt, mask, tgt_mask, within=1e-11)
    alone = [part[1:2] for part in (src, tgt, mask, tgt_mask)]
    with torch.no_grad():
        assert torch.allclose(wide_pair[0](*alone), logits[1:2], atol=1e-11)


def test_the_other_attention_of_the_reference(pair):
    """By default, it runs torch's; this is the one that it wrote itself."""
    pair[1].set_attn_implementation("eager")
    try:
        assert_same(pair, *padded(3, 40, 21))
    finally:
        pair[1].set_attn_implementation("sdpa")


@pytest.mark.parametrize("family", RELEASED)
def test_a_released_shape_at_the_lengths_of_pre_training(family):
    pair = make_family(family, **RELEASED[family])
    src, tgt, mask, tgt_mask = padded(2, 512, 114, 32100)
    rows = slice(1, 2) if family == "t5" else slice(0, 1)
    assert_same(pair, src[rows], tgt[rows], mask[rows], tgt_mask[rows])
    if family == "t5":
        layers = len(pair[0].encoder.blocks), len(pair[0].decoder.blocks)
        assert layers == (6, 6)


# --- Losses and gradients -------------------------------------------------


def total_norms(grads):
    """The norm over all weights, of our gradients and of theirs."""
    return [get_total_norm(list(side)).item() for side in zip(*grads.values())]


@pytest.mark.parametrize("s, t", [(10, 9), (40, 10), (9, 40)])
def test_loss_and_gradients(pair, s, t):
    loss, theirs, grads = gradients(*pair, *batch_with_labels(s, t))
    assert abs(loss - theirs) <= 1e-5
    norms = total_norms(grads)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for name, (ours, reference) in grads.items():
        error = (ours - reference).norm() / reference.norm()
        assert error <= 1e-4, name


@pytest.mark.parametrize("s, t", [(10, 9), (40, 10), (9, 40)])
def test_loss_and_gradients_in_float64(wide_pair, s, t):
    loss, theirs, grads = gradients(*wide_pair, *batch_with_labels(s, t))
    assert abs(loss - theirs) <= 1e-11
    norms = total_norms(grads)
    assert norms[0] == pytest.approx(norms[1], rel=1e-11)
    for name, (ours, reference) in grads.items():
        error = (ours - reference).norm() / reference.norm()
        assert error <= 1e-11, name


# --- Fresh models ---------------------------------------------------------

# All that a deviation depends on is different: dim 96, heads times dim_head
# 160, dim_head 40, hidden features 288.
FRESH = dict(num_tokens=512, depth=2, heads=4, dim_head=40, mlp_mult=3)
DEVIATIONS = {
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


@pytest.mark.parametrize("family", ["t5", "t5-v1_1"])
def test_every_fresh_weight_is_as_large_as_in_t5(family):
    torch.manual_seed(0)
    tied = family == "t5"
    model = T5(
        dim=96,
        **{f"{s}_{k}": v for s in ("enc", "dec") for k, v in FRESH.items()},
        feed_forward="relu" if tied else "gated-gelu",
        tie_head=tied,
    )
    heads = {"head": 1.0 if tied else 96**-0.5}
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        if "norm" in kind:
            assert (weight == 1).all(), name
            continue
        ratio = weight.std() / (DEVIATIONS | heads)[kind]
        assert ratio == pytest.approx(1, abs=4 * weight.numel() ** -0.5), name
        assert weight.mean().abs() < 5 * weight.std() * weight.numel() ** -0.5


def test_the_families_differ():
    """Were they all one model, five would prove no more than one."""
    seen = {}
    for family in FAMILIES:
        ours, reference = make_family(family)
        assert (reference.lm_head.weight is reference.shared.weight) == (
            family == "t5"
        )
        tables = [len(stack.biases) for stack in (ours.encoder, ours.decoder)]
        seen[family] = type(reference).__name__, ours.config.enc_depth, *tables
    small = SIZES["depth"], SIZES["dec_depth"]
    assert seen["t5"][1:] == (3, 1, 1) and seen["byt5"][1:] == (4, 1, 1)
    assert seen["umt5"][2:] == small
    assert seen["mt5"][0].startswith("MT5")
    assert seen["umt5"][0].startswith("UMT5")
