"""The whole model: sizes, flags, errors; the numbers that it
computes are in ``test_exactness.py``."""

import inspect
import json
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from t5_book.config import T5Config
from t5_book.presets import PRESETS
from t5_book.t5 import T5
from tests.conftest import padding_masks
from tests.conftest import random_ids as ids

GATED = {"feed_forward": "gated-gelu", "tie_head": False}
TINY = dict(
    dim=16, enc_num_tokens=32, enc_depth=1, enc_heads=2, enc_dim_head=4,
    enc_mlp_mult=2, dec_num_tokens=32, dec_depth=1, dec_heads=2,
    dec_dim_head=4, dec_mlp_mult=2,
)  # fmt: skip


# --- Sizes ----------------------------------------------------------------

REFERENCES = {
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
    "umt5": (
        transformers.UMT5Config,
        transformers.UMT5ForConditionalGeneration,
    ),
}


def count_reference(config: T5Config, family: str) -> int:
    """Parameters of the reference, as if its head were tied as ours is."""
    kinds = transformers.T5Config, transformers.T5ForConditionalGeneration
    make_config, make = REFERENCES.get(family, kinds)
    reference = make(
        make_config(
            vocab_size=config.enc_num_tokens,
            d_model=config.dim,
            d_kv=config.enc_dim_head,
            d_ff=round(config.dim * config.enc_mlp_mult),
            num_layers=config.enc_depth,
            num_decoder_layers=config.dec_depth,
            num_heads=config.enc_heads,
            feed_forward_proj=config.feed_forward,
        )
    )
    assert reference.lm_head.weight is reference.shared.weight
    head = 0 if config.tie_head else config.dim * config.dec_num_tokens
    return head + sum(p.numel() for p in reference.parameters())


@pytest.fixture
def shapes_alone(monkeypatch):
    """Make tensors without numbers, and do not draw any."""
    for name in ("normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_as_many_parameters_as_the_reference(shapes_alone, name):
    model = T5(**PRESETS[name])
    family = name.rsplit("-", 1)[0]
    count = sum(p.numel() for p in model.parameters())
    assert count == count_reference(model.config, family)


# Written down apart from the presets, so that a wrong size shows. They round
# to what the papers give: ByT5 300M, 582M, 1.23B, 3.74B, 12.9B.
PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
    "t5-v1_1-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "byt5-small": 299_637_760,
    "byt5-base": 581_653_248,
    "byt5-large": 1_228_183_552,
    "byt5-xl": 3_737_801_728,
    "byt5-xxl": 12_906_899_328,
    "umt5-small": 306_601_984,
    "umt5-base": 592_043_520,
    "umt5-xl": 3_768_356_864,
    "umt5-xxl": 12_972_531_712,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_its_published_count(shapes_alone, name):
    model = T5(**PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


# --- The call of the superseded repository --------------------------------


@torch.no_grad()
def test_the_old_call_works_verbatim():
    from t5_book import T5

    # fmt: off
    model = T5(dim=768, enc_num_tokens=512, enc_depth=6, enc_heads=12, enc_dim_head=64, enc_mlp_mult=4,
               dec_num_tokens=512, dec_depth=6, dec_heads=12, dec_dim_head=64, dec_mlp_mult=4,
               dropout=0., tie_token_emb=True)
    src = torch.randint(0, 512, (1, 1024)); src_mask = torch.ones_like(src).bool()  # noqa: E702
    tgt = torch.randint(0, 512, (1, 1024))
    # fmt: on
    assert model(src, tgt, mask=src_mask).shape == (1, 1024, 512)
    # and where it did not: more than one example, lengths that differ
    src, tgt, src_mask = src.view(16, 64)[:3], tgt[:, :36].view(3, 12), None
    assert model(src, tgt, mask=src_mask).shape == (3, 12, 512)
    src_mask = padding_masks(3, 64)
    assert model(src, tgt, mask=src_mask).shape == (3, 12, 512)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = T5(**TINY).eval()
    src, tgt = ids(3, 10, high=32), ids(3, 10, 1, high=32)
    mask = padding_masks(3, 10)
    logits = model(src, tgt, mask=mask)
    assert torch.allclose(logits[:1], model(src[:1, :5], tgt[:1]), atol=1e-5)
    assert torch.allclose(logits[1:2], model(src[1:2, 3:], tgt[1:2]), atol=1e-5)
    assert not torch.allclose(logits[:1], model(src[:1], tgt[:1]), atol=1e-2)


# --- Start: initialisation and first loss ---------------------------------


@pytest.mark.parametrize("name", ["t5-small", "t5-v1_1-small"])
def test_first_loss_is_the_log_of_the_vocabulary(name):
    torch.manual_seed(0)
    model = T5(**PRESETS[name]).eval()
    src, labels = ids(4, 32, high=32128), ids(4, 20, 1, high=32128)
    with torch.no_grad():
        ratio = model.loss(src, labels) / math.log(32128)
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("extra", [{}, GATED], ids=["v1.0", "v1.1"])
def test_gradients_are_finite_and_reach_everything(extra):
    torch.manual_seed(0)
    model = T5(**TINY | extra, dropout=0.1)
    labels = ids(3, 6, 1, high=32)
    labels[1, 2:] = -100
    model.loss(ids(3, 9, high=32), labels, padding_masks(3, 9)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.any(), name


# --- Flags ----------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_tied_and_scaled_are_two_flags(tie, scale):
    sizes = TINY | {"tie_head": tie}
    model = T5(**sizes, scale_logits=scale).eval()
    other = T5(**sizes, scale_logits=not scale).eval()
    other.load_state_dict(model.state_dict())
    src, tgt = ids(2, 5, high=32), ids(2, 4, 1, high=32)
    factor = 16**-0.5 if scale else 16**0.5
    logits, expected = model(src, tgt), factor * other(src, tgt)
    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-4)
    assert (model.head.weight is model.dec_emb.weight) == tie


@pytest.mark.parametrize("tie", [True, False])
def test_scaling_follows_tying_unless_told(tie):
    factor = T5Config(**TINY, tie_head=tie).logit_scale
    assert factor == (16**-0.5 if tie else 1)


def test_two_vocabularies():
    sizes = TINY | {"dec_num_tokens": 50}
    model = T5(**sizes, tie_token_emb=False)
    src, tgt = ids(2, 5, high=32), torch.full((2, 4), 49)
    assert model(src, tgt).shape == (2, 4, 50)
    assert model.head.weight is model.dec_emb.weight
    with pytest.raises(IndexError, match="source ids run from 49 to 49"):
        model(tgt, tgt)


def test_a_fraction_is_rounded(shapes_alone):
    model = T5(**PRESETS["t5-base"] | {"enc_mlp_mult": 8 / 3})
    assert model.encoder.blocks[0].feed_forward.wi.out_features == 2048
    assert round(768 * 2.6666) == 2048 != int(768 * 2.6666)
    model = T5(**PRESETS["t5-base"] | {"dec_mlp_mult": 2.6666})
    assert model.decoder.blocks[0].feed_forward.wi.out_features == 2048


def test_start_and_padding_may_differ():
    model = T5(**TINY, start_id=7, pad_id=3)
    labels = torch.tensor([[5, 6, 1, -100, -100], [5, 6, 8, 9, 1]])
    shifted = [[7, 5, 6, 1, 3], [7, 5, 6, 8, 9]]
    assert model.shift_right(labels).tolist() == shifted


def test_loss_ignores_padded_labels():
    torch.manual_seed(0)
    model = T5(**TINY).eval()
    src, labels = ids(2, 5, high=32), ids(2, 6, 1, high=32)
    padded = nn.functional.pad(labels, (0, 4), value=-100)
    loss = model.loss(src, labels)
    assert torch.allclose(model.loss(src, padded), loss, atol=1e-6)
    assert torch.allclose(
        model.loss(src.int(), labels.int()), loss, atol=1e-6
    )


# --- JSON -----------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_config_goes_to_json_and_back(name):
    config = T5Config(**PRESETS[name], dropout=0.1)
    text = config.to_json()
    assert json.loads(text)["enc_depth"] == config.encoder.depth
    assert T5Config.from_json(text) == config
    assert T5Config(**vars(config)) == config


def test_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        T5Config(**TINY).dim = 32


def test_json_with_unknown_fields():
    text = json.dumps(TINY | {"dimm": 3, "head": 8})
    with pytest.raises(ValueError, match=r"\['dimm', 'head'\].*'dim', 'enc_"):
        T5Config.from_json(text)
    with pytest.raises(TypeError, match="'dim'"):
        T5Config.from_json("{}")


# --- Clear errors ---------------------------------------------------------


WRONG = {
    "dim": [0, -5, 16.0, "16", None],
    "enc_heads": [0, True],
    "dec_depth": [-1],
    "dec_dim_head": [64.0],
    "enc_num_tokens": [99],  # one table serves both vocabularies
    "enc_mlp_mult": [0, -1, 0.01, "4", math.nan, math.inf],
    "dropout": [1.5, -0.1, 1, math.nan, "0.1"],
    "feed_forward": ["rleu", "gelu", None],
    "num_buckets": [31, 2, 0, 3.5],
    "max_distance": [8, 12, 0],
    "tie_head": ["no", 1, None],
    "tie_token_emb": ["no"],
    "scale_logits": ["no", 0],
    "bias_per_layer": ["no"],
    "eos_id": [-1, 32],
    "pad_id": [40],
    "start_id": [33, 0.5],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name in WRONG for value in WRONG[name]]
)
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        T5(**TINY | {name: value})


def test_numbers_of_numpy_are_welcome():
    numbers = {"dim": np.int64(16), "dec_depth": np.int32(1), "dropout": np.float32(0.5)}
    config = T5Config(**TINY | numbers)
    assert T5Config.from_json(config.to_json()) == config


def test_help_shows_every_keyword():
    shown = inspect.signature(T5).parameters
    assert set(shown) == {field.name for field in fields(T5Config)}
    assert next(iter(shown)) == "dim" and shown["dropout"].default == 0.0


def test_unknown_keyword():
    with pytest.raises(TypeError, match="'depth'"):
        T5(**TINY, depth=3)


GOOD = torch.tensor([[4, 5, 6], [7, 8, 9]])


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (GOOD.float(), TypeError, r"source ids are torch.float32; pass ids"),
        (GOOD.bool(), TypeError, r"source ids are torch.bool"),
        (GOOD[0], ValueError, r"source ids have shape \(3,\); pass \(batch"),
        (GOOD[:, :0], ValueError, r"source ids have shape \(2, 0\)"),
        (GOOD[:0], ValueError, r"source ids have shape \(0, 3\)"),
        (GOOD + 23, IndexError, "from 27 to 32, but .* holds 0 to 31"),
        (GOOD - 5, IndexError, "source ids run from -1 to 4"),
    ],
    ids=["float", "bool", "1-D", "empty", "no example", "high", "negative"],
)
def test_source_ids(wrong, error, message):
    model = T5(**TINY)
    with pytest.raises(error, match=message):
        model(wrong, GOOD)
    with pytest.raises(error, match=message.replace("source", "target")):
        model(GOOD, wrong)
    with pytest.raises(error, match=message.replace("source", "label")):
        model.loss(GOOD, wrong)


def test_a_list_is_no_batch():
    model, ids = T5(**TINY), GOOD[0].tolist()
    for call in (model, model.encode, model.generate):
        rest = [GOOD] * (call is model)
        with pytest.raises(TypeError, match=r"'list'>; pass torch.tensor\(\["):
            call(ids, *rest)
    with pytest.raises(TypeError, match="source mask is <class 'list'>"):
        model.encode(GOOD, [[True] * 3] * 2)
    with pytest.raises(TypeError, match="source mask is <class 'list'>"):
        model(GOOD, GOOD, [[True] * 3] * 2)


def test_a_mask_of_pairs_is_for_one_attention():
    """With as many targets as sources it would fit where it means nothing."""
    pairs = torch.ones(2, 3, 3).tril().bool()
    model = T5(**TINY).eval()
    with pytest.raises(ValueError, match=r"\(2, 3, 3\)"):
        model(GOOD, GOOD, pairs)
    memory = model.encode(GOOD, pairs)
    assert model.decode(GOOD, memory).shape == (2, 3, 32)


def test_the_last_label_is_checked_too():
    labels = torch.tensor([[4, 5, 32], [7, 8, -100]])
    with pytest.raises(IndexError, match="label ids run from 0 to 32"):
        T5(**TINY).loss(GOOD, labels)


@pytest.mark.parametrize(
    "masks, error, message",
    [
        ({"mask": torch.ones(2, 4).bool()}, ValueError, r"source.*\(2, 4\)"),
        ({"tgt_mask": torch.ones(2, 4).bool()}, ValueError, r"target.*\(2, 4\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "float32.*boolean"),
        ({"mask": torch.ones_like(GOOD)}, TypeError, "int64.*boolean"),
    ],
    ids=["source shape", "target shape", "float", "integer"],
)
def test_masks(masks, error, message):
    with pytest.raises(error, match=message):
        T5(**TINY)(GOOD, GOOD, **masks)


def test_each_target_needs_its_source():
    model = T5(**TINY)
    with pytest.raises(ValueError, match=r"memory has shape \(1, 3, 16\)"):
        model(GOOD[:1], GOOD)
    memory = torch.zeros(2, 3, 15)
    with pytest.raises(ValueError, match=r"\(2, 3, 15\).* 16"):
        model.decode(GOOD, memory)


@pytest.mark.parametrize("name", ["src_mask", "tgt_mask"])
@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 3, 1), (2, 2, 4), (1, 3)])
def test_a_mask_of_other_pairs_is_refused(name, shape):
    model = T5(**TINY)
    memory, mask = model.encode(GOOD), torch.ones(shape).bool()
    with pytest.raises(ValueError) as error:
        model.decode(GOOD, memory, **{name: mask})
    assert str(shape) in str(error.value)


def test_a_cache_stands_for_memory_and_mask():
    model = T5(**TINY).eval()
    memory, mask = model.encode(GOOD), torch.ones(2, 3).bool()
    mask[0, 2] = False
    cache = model.decoder.new_cache(memory, mask)
    first = model.decode(GOOD[:, :2], cache=cache)
    with pytest.raises(ValueError, match="not both"):
        model.decode(GOOD[:, 2:], memory, cache=cache)
    with pytest.raises(ValueError, match="memory or a cache"):
        model.decode(GOOD)
    with pytest.raises(ValueError, match="src_mask"):
        model.decode(GOOD[:, 2:], src_mask=mask, cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 1\)"):  # three so far, not one
        model.decode(GOOD[:, 2:], tgt_mask=mask[:, :1], cache=cache)
    logits = torch.cat([first, model.decode(GOOD[:, 2:], cache=cache)], dim=1)
    whole = model.decode(GOOD, memory, mask)
    assert torch.allclose(logits, whole, atol=1e-6)


def test_nothing_is_read_back_from_a_device_inside_the_model():
    """On a GPU, reading a number waits; tensors of ``meta`` have none to read."""
    with torch.device("meta"):
        model = T5(**TINY)
        ids = torch.zeros(2, 3, dtype=torch.long)
        mask = torch.ones(2, 3, dtype=torch.bool)
    assert model(ids, ids, mask, mask).is_meta
    assert model.loss(ids, ids, mask).is_meta
