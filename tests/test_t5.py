"""The whole model: sizes, flags, errors; the numbers that it
computes are in ``test_exactness.py``."""

import inspect
import json
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from torch import nn

from t5_book.config import StackConfig, T5Config
from t5_book.presets import PRESETS
from t5_book.t5 import T5
from tests.conftest import padding_masks, random_ids, refuses, small_sizes, small_t5

TINY = small_sizes()


# --- Sizes ----------------------------------------------------------------


@pytest.fixture
def shapes_alone(monkeypatch):
    """Make tensors without numbers, and do not draw any."""
    for name in ("normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    with torch.device("meta"):
        yield


# Counted in transformers. They round to what the papers give: ByT5 300M, 582M,
# 1.23B, 3.74B, 12.9B.
V1_1 = dict(small=76_961_152, base=247_577_856, large=783_150_080)
V1_1 |= dict(xl=2_849_757_184, xxl=11_135_332_352)
COUNTS = {
    "t5": dict(small=60_506_624, base=222_903_552, large=737_668_096)
    | {"3b": 2_851_598_336, "11b": 11_307_321_344},
    "t5-v1_1": V1_1,
    "flan-t5": V1_1,
    "mt5": dict(small=300_176_768, base=582_401_280, large=1_229_581_312)
    | dict(xl=3_742_619_648, xxl=12_921_057_280),
    "byt5": dict(small=299_637_760, base=581_653_248, large=1_228_183_552)
    | dict(xl=3_737_801_728, xxl=12_906_899_328),
    "umt5": dict(small=306_601_984, base=592_043_520)
    | dict(xl=3_768_356_864, xxl=12_972_531_712),
}


@pytest.mark.parametrize("family", COUNTS)
def test_presets_have_the_published_numbers_of_parameters(shapes_alone, family):
    names = [name for name in PRESETS if name.rsplit("-", 1)[0] == family]
    assert names == [f"{family}-{size}" for size in COUNTS[family]]
    for name, expected in zip(names, COUNTS[family].values()):
        model = T5(**PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == expected, name


def test_each_stack_has_its_own_sizes():
    config = T5Config(**TINY | dict(dec_depth=3, dec_heads=5, dec_dim_head=6, dec_mlp_mult=7))
    assert config.encoder == StackConfig(dim=16, depth=1, heads=2, dim_head=4, mlp_dim=32)
    assert config.decoder == StackConfig(dim=16, depth=3, heads=5, dim_head=6, mlp_dim=112)


def test_a_fraction_is_rounded():
    assert round(768 * 2.6666) == 2048 != int(768 * 2.6666)
    for side, other in (("enc", "dec"), ("dec", "enc")):
        sizes = TINY | {"dim": 768, f"{side}_mlp_mult": 2.6666, f"{other}_mlp_mult": 8 / 3}
        config = T5Config(**sizes)
        assert config.encoder.mlp_dim == config.decoder.mlp_dim == 2048


def test_the_call_of_the_superseded_repository_works_verbatim(shapes_alone):
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
    src, tgt = src.view(16, 64)[:3], tgt[:, :36].view(3, 12)
    for src_mask in (None, padding_masks(3, 64)):
        assert model(src, tgt, mask=src_mask).shape == (3, 12, 512)


def test_nothing_is_read_back_from_a_device_inside_the_model(shapes_alone):
    """On a GPU, reading a number waits; tensors of ``meta`` have none to read."""
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    model = T5(**TINY)
    assert model(ids, ids, mask, mask).is_meta
    assert model.loss(ids, ids, mask).is_meta


# --- Options --------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scale", [True, False, None])
def test_tied_and_scaled_are_two_flags(tie, scale):
    """The scale follows the tying unless told."""
    model = small_t5(tie_head=tie, scale_logits=scale)
    assert (model.head.weight is model.dec_emb.weight) == tie
    src, tgt = random_ids(2, 5, high=32), random_ids(2, 4, 1, high=32)
    written = model.decoder(model.dec_emb(tgt), model.encode(src))
    factor = 16**-0.5 if scale or scale is None and tie else 1
    expected = factor * written @ model.head.weight.T
    assert torch.allclose(model(src, tgt), expected, atol=1e-5, rtol=1e-4)


def test_two_vocabularies():
    model = small_t5(dec_num_tokens=50, tie_token_emb=False)
    src, tgt = random_ids(2, 5, high=32), torch.full((2, 4), 49)
    assert model(src, tgt).shape == (2, 4, 50)
    assert model.head.weight is model.dec_emb.weight
    refuses(lambda: model(tgt, tgt), "source", 49, 31, error=IndexError)


def test_labels_are_shifted_and_the_padded_ones_ignored():
    model = small_t5(start_id=7, pad_id=3)
    labels = torch.tensor([[5, 6, 1, -100, -100], [5, 6, 8, 9, 1]])
    assert model.shift_right(labels).tolist() == [[7, 5, 6, 1, 3], [7, 5, 6, 8, 9]]
    src, padded = random_ids(2, 5, high=32), nn.functional.pad(labels, (0, 4), value=-100)
    loss = model.loss(src, labels)
    assert torch.allclose(model.loss(src, padded), loss, atol=1e-6)
    assert torch.allclose(model.loss(src.int(), labels.int()), loss, atol=1e-6)


# --- The configuration ----------------------------------------------------


def test_config_goes_to_json_and_back():
    configs = [T5Config(**sizes, dropout=0.1) for sizes in PRESETS.values()]
    numbers = {"dim": np.int64(16), "dec_depth": np.int32(1), "dropout": np.float32(0.5)}
    for config in (*configs, T5Config(**TINY | numbers)):
        text = config.to_json()
        assert json.loads(text)["enc_depth"] == config.encoder.depth
        assert T5Config.from_json(text) == T5Config(**vars(config)) == config
    text = json.dumps(TINY | {"dimm": 3, "head": 8})
    refuses(lambda: T5Config.from_json(text), "'dimm', 'head'", "'dim', 'enc_")
    refuses(lambda: T5Config.from_json("{}"), "'dim'", error=TypeError)


def test_keywords_are_those_of_the_config():
    shown = inspect.signature(T5).parameters
    assert set(shown) == {field.name for field in fields(T5Config)}
    assert next(iter(shown)) == "dim" and shown["dropout"].default == 0.0
    refuses(lambda: T5(**TINY, depth=3), "'depth'", error=TypeError)
    with pytest.raises(FrozenInstanceError):
        T5Config(**TINY).dim = 32


WRONG = {
    "dim": [0, -5, 16.0, "16", None],
    "enc_heads": [0, True],
    "dec_depth": [-1],
    "dec_dim_head": [64.0],
    "enc_num_tokens": [99],  # one table serves both vocabularies
    "enc_mlp_mult": [0, -1, 0.01, "4", math.nan, math.inf],
    "dropout": [1.5, -0.1, 1, math.nan, "0.1", None],
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
    refuses(lambda: T5(**TINY | {name: value}), name)


# --- Wrong inputs ---------------------------------------------------------

GOOD = torch.tensor([[4, 5, 6], [7, 8, 9]])
LAST = torch.tensor([[4, 5, 6], [7, 8, 32]])
IDS = {
    "float": (GOOD.float(), TypeError, ["torch.float32", "pass ids"]),
    "bool": (GOOD.bool(), TypeError, ["torch.bool"]),
    "1-D": (GOOD[0], ValueError, ["(3,)", "(batch"]),
    "empty": (GOOD[:, :0], ValueError, ["(2, 0)"]),
    "no example": (GOOD[:0], ValueError, ["(0, 3)"]),
    "high": (GOOD + 23, IndexError, ["27 to 32", "0 to 31"]),
    "negative": (GOOD - 5, IndexError, ["-1 to 4"]),
    "the last": (LAST, IndexError, ["4 to 32"]),
    "list": ([4, 5, 6], TypeError, ["'list'", "torch.tensor(["]),
}


@pytest.mark.parametrize("name", IDS)
def test_wrong_ids_are_refused(name):
    wrong, error, words = IDS[name]
    model = small_t5()
    for call in (lambda: model(wrong, GOOD), lambda: model.encode(wrong)):
        refuses(call, "source", *words, error=error)
    refuses(lambda: model(GOOD, wrong), "target", *words, error=error)
    if name == "list":
        refuses(lambda: model.generate(wrong), *words, error=error)
    else:
        refuses(lambda: model.loss(GOOD, wrong), "label", *words, error=error)


MASKS = {
    "shape": (torch.ones(2, 4).bool(), ValueError, ["(2, 4)"]),
    "float": (torch.ones(2, 3), TypeError, ["float32", "boolean"]),
    "integer": (torch.ones_like(GOOD), TypeError, ["int64", "boolean"]),
    "list": ([[True] * 3] * 2, TypeError, ["'list'", "boolean"]),
}


@pytest.mark.parametrize("name", MASKS)
def test_wrong_masks_are_refused(name):
    mask, error, words = MASKS[name]
    model = small_t5()
    for call in (lambda: model.encode(GOOD, mask), lambda: model(GOOD, GOOD, mask)):
        refuses(call, "source", *words, error=error)
    refuses(lambda: model(GOOD, GOOD, None, mask), "target", *words, error=error)


@pytest.mark.parametrize("name", ["src_mask", "tgt_mask"])
def test_a_mask_of_pairs_is_for_one_attention(name):
    """With as many targets as sources it would fit where it means nothing."""
    model, pairs = small_t5(), torch.ones(2, 3, 3).tril().bool()
    refuses(lambda: model(GOOD, GOOD, pairs), "(2, 3, 3)")
    memory = model.encode(GOOD, pairs)
    assert model.decode(GOOD, memory, **{name: pairs}).shape == (2, 3, 32)
    for shape in [(2, 1, 3), (2, 3, 1), (2, 2, 4), (1, 3)]:
        mask = {name: torch.ones(shape).bool()}
        refuses(lambda: model.decode(GOOD, memory, **mask), shape)


def test_decode_takes_a_memory_or_a_cache():
    model, mask = small_t5(), padding_masks(2, 3)
    memory = model.encode(GOOD)
    refuses(lambda: model(GOOD[:1], GOOD), "memory", "(1, 3, 16)")
    refuses(lambda: model.decode(GOOD, torch.zeros(2, 3, 15)), "(2, 3, 15)", " 16")
    refuses(lambda: model.decode(GOOD), "memory", "cache")
    cache, rest = model.decoder.new_cache(memory, mask), GOOD[:, 2:]
    first = model.decode(GOOD[:, :2], cache=cache)
    refuses(lambda: model.decode(rest, memory, cache=cache), "memory", "not both")
    refuses(lambda: model.decode(rest, src_mask=mask, cache=cache), "src_mask")
    # three tokens so far, not one
    refuses(lambda: model.decode(rest, tgt_mask=mask[:, :1], cache=cache), "(2, 1)")
    logits = torch.cat([first, model.decode(rest, cache=cache)], dim=1)
    assert torch.allclose(logits, model.decode(GOOD, memory, mask), atol=1e-6)
