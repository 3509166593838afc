"""Released weights in and out, against ``transformers``."""

import json
import os
import pickle
import shutil
import time
import warnings
import weakref
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from t5_book import T5, load_pretrained, save_pretrained
from t5_book.conversion import our_config, our_name, released_name
from t5_book.pretrained import StoredTensor, build, released_tensors
from tests.conftest import (
    FAMILIES,
    SMALL,
    difference,
    make_family,
    padded,
    perturb,
    refuses,
    small_sizes,
    small_t5,
    their_logits,
)

TABLE, HEAD = "shared.weight", "lm_head.weight"
COPIES = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
STALE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
BIAS = "block.1.layer.0.SelfAttention.relative_attention_bias.weight"
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
OURS = small_sizes(dim=24, num_tokens=40, depth=2, dec_depth=3, dim_head=8, mlp_mult=8 / 3)
BATCH = padded(3, 11, 7, high=40)[:3]


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """For each family: ours, the reference, and the folder that it saved.

    Ours has its weights by another table of names: tests/conftest.py.
    """
    made = {}
    for family in FAMILIES:
        ours, reference = make_family(family)
        made[family] = ours, reference, tmp_path_factory.mktemp(family)
        reference.save_pretrained(made[family][2])
    return made


@pytest.fixture(params=FAMILIES)
def release(request, releases, tmp_path):
    """Ours, the reference, and a copy of the folder to change."""
    ours, reference, folder = releases[request.param]
    return ours, reference, shutil.copytree(folder, tmp_path / request.param)


@pytest.fixture
def folder(releases, tmp_path):
    """A copy of T5 1.0's folder."""
    return shutil.copytree(releases["t5"][2], tmp_path / "t5")


def read(folder: Path) -> dict:
    return safetensors.torch.load_file(folder / SAFE, backend="pread")


def write(folder: Path, weights: dict) -> Path:
    """Replace the tensors of a folder."""
    weights = {name: w.contiguous().clone() for name, w in weights.items()}
    safetensors.torch.save_file(weights, folder / SAFE)
    return folder


def write_bin(folder: Path, held, **options) -> Path:
    """Replace the tensors of a folder by a file of ``torch.save``."""
    (folder / SAFE).unlink(missing_ok=True)
    torch.save(held, folder / BIN, **options)
    return folder


def write_as(layout: str, folder: Path, reference) -> Path:
    """Replace the tensors of a folder by another kind of files."""
    weights = reference.state_dict()
    if layout == "shards":
        (folder / SAFE).unlink()
        reference.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 3
    elif layout == "bin":  # from transformers 4, with all copies of the table
        assert {*COPIES} < {*weights}
        write_bin(folder, weights)
    elif layout == "old bin":  # from torch before 2020: no archive
        write_bin(folder, weights, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(folder / BIN)
    elif layout == "bin shards":
        (folder / SAFE).unlink()
        places = {}
        for k in range(3):
            shard = dict(list(weights.items())[k::3])
            torch.save(shard, folder / f"pytorch_model-{k}.bin")
            places |= dict.fromkeys(shard, f"pytorch_model-{k}.bin")
        (folder / f"{BIN}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def change_config(folder: Path, **entries) -> Path:
    """Change entries of ``config.json``; None takes one out."""
    values = json.loads((folder / "config.json").read_text()) | entries
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def assert_same(model: T5, ours: T5, case=None):
    """Two models agree, weight by weight, and in every choice."""
    config = replace(model.config, scale_logits=None)
    assert config == replace(ours.config, scale_logits=None), case
    assert model.config.logit_scale == ours.config.logit_scale, case
    weights, wanted = model.state_dict(), ours.state_dict()
    assert weights.keys() == wanted.keys(), case
    for name, weight in weights.items():
        assert torch.equal(weight, wanted[name]), (case, name)
    assert all(weight.requires_grad for weight in model.parameters())
    assert (model.head.weight is model.dec_emb.weight) == ours.config.tie_head, case
    assert model.enc_emb is model.dec_emb and not model.training


def refuses_to_load(folder: Path, *words) -> str:
    return refuses(lambda: T5.from_pretrained(folder), *words)


@torch.no_grad()
def assert_same_logits(model: T5, reference, factor=1.0):
    """Two models agree in what they compute, but for a factor of theirs."""
    theirs = factor * their_logits(reference.eval(), *BATCH)
    assert difference(model(*BATCH), theirs) <= 1e-5


# --- Every family, from every kind of file, and from memory ---------------


@pytest.mark.parametrize("layout", ["safetensors", "shards", "bin", "old bin", "bin shards"])
def test_from_files(release, layout):
    ours, reference, folder = release
    write_as(layout, folder, reference)
    files = [*folder.glob(f"{SAFE}*"), *folder.glob(f"{BIN}*")]
    assert len(files) == 1  # one of weights, or an index of them
    models = {path: load_pretrained(path) for path in (folder, str(folder), *files)}
    for file in folder.iterdir():  # from here on the weights are in memory alone
        file.write_bytes(bytes(file.stat().st_size))
    for path, model in models.items():
        assert_same(model, ours, path)
    assert_same_logits(model, reference)


def test_from_memory(release):
    class Mine(T5):
        pass

    ours, reference, folder = release
    config = reference.config.to_dict()
    model = Mine.from_released(config, reference.state_dict())
    assert_same(model, ours)
    assert_same(T5.from_released(config, dict(reference.named_parameters())), ours)
    theirs = {weight.data_ptr() for weight in reference.parameters()}
    assert theirs.isdisjoint(weight.data_ptr() for weight in model.parameters())
    assert type(model) is type(Mine.from_pretrained(folder)) is Mine


def test_names():
    ours, reference = make_family("umt5", num_layers=11, num_decoder_layers=12)
    entries, weights = reference.config.to_dict(), reference.state_dict()
    assert_same(T5.from_released(entries, weights), ours)
    for name, _ in ours.named_parameters():
        assert our_name(released_name(name)) == name
        assert released_name(name) in weights
    for name in ("class.bias", "encoder.blocks.3.norm.weight", "headache.weight", "{}", ""):
        assert released_name(name) == our_name(name) == name


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_entries_that_may_be_missing(model_type):
    """We take what ``transformers`` takes."""
    entries = SMALL | {"model_type": model_type}
    del entries["num_decoder_layers"]
    kind = getattr(transformers, f"{model_type.upper()}Config")
    given = kind(**entries, decoder_start_token_id=0).to_dict()
    assert given["feed_forward_proj"] == ("relu" if model_type == "t5" else "gated-gelu")
    assert our_config(entries) == our_config(given)
    assert our_config(entries).dropout == 0.1
    assert our_config(entries | {"pad_token_id": 7}).start_id == 7


# --- The tensors decide ---------------------------------------------------


def test_the_tensors_decide(release):
    """The configuration's word on ties and biases does not count."""
    ours, _, folder = release
    family = "t5" if ours.config.bias_per_layer else "umt5"
    words = [{"tie_word_embeddings": word} for word in (True, False, None)]
    for entries in [*words, {"model_type": family}]:
        change_config(folder, scale_decoder_outputs=None, **entries)
        assert_same(T5.from_pretrained(folder), ours, entries)
    # A table that no T5 reads; the embedding under other names
    weights = read(folder) | {STALE: torch.randn(32, 4)}
    table = weights.pop(TABLE)
    for names in (COPIES, COPIES[:1], COPIES[1:]):
        write(folder, weights | dict.fromkeys(names, table))
        assert_same(T5.from_pretrained(folder), ours, names)


def test_an_equal_head_is_tied(releases, folder):
    weights = read(folder)
    model = T5.from_pretrained(write(folder, weights | {HEAD: weights[TABLE]}))
    assert_same(model, releases["t5"][0])
    head = weights[TABLE].clone()
    head[7, 3] += 1e-6
    change_config(folder, scale_decoder_outputs=True)  # says nothing of another head
    # Even in a type in which the two are the same
    for dtype in (torch.float32, torch.bfloat16):
        model = load_pretrained(write(folder, weights | {HEAD: head}), dtype=dtype)
        assert not model.config.tie_head and model.config.logit_scale == 1
        assert torch.equal(model.head.weight, head.to(dtype))
        assert torch.equal(model.enc_emb.weight, weights[TABLE].to(dtype))


@pytest.mark.parametrize("word", [True, False, None])
def test_words_on_the_scale(releases, tmp_path, word):
    """Theirs is for a tied head, ours for another; each is for that alone."""
    words = {"t5": "scale_decoder_outputs", "t5-v1_1": "scale_logits"}
    for family, entry in words.items():
        folder = shutil.copytree(releases[family][2], tmp_path / family)
        other = dict.fromkeys(words.values(), None if word is None else not word)
        change_config(folder, **other | {entry: word})
        config = T5.from_pretrained(folder).config
        assert config.scale_logits is word
        scaled = config.tie_head if word is None else word
        assert config.logit_scale == (48**-0.5 if scaled else 1)


@pytest.mark.parametrize("kind", ["T5", "MT5"])
def test_what_transformers_makes_and_nobody_released(tmp_path, kind):
    """Its fresh T5 1.1 and mT5 are tied, and yet not scaled."""
    choices = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **choices)
    reference = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    reference.save_pretrained(tmp_path)
    for _ in range(2):
        model = T5.from_pretrained(tmp_path)
        assert model.config.tie_head and model.config.logit_scale == 1
        assert_same_logits(model, reference)
        model.save_pretrained(tmp_path)
        reference = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


# --- Types, places, memory ------------------------------------------------


def test_types_and_places(releases, folder):
    entries, table = releases["t5"][1].config.to_dict(), releases["t5"][0].enc_emb.weight
    weights = read(folder)
    for dtype in (torch.float64, torch.bfloat16):
        here = T5.from_released(entries, weights, dtype=dtype)
        for model in (load_pretrained(folder, dtype=dtype), here):
            assert {w.dtype for w in model.parameters()} == {dtype}
            assert torch.equal(model.enc_emb.weight, table.to(dtype))
    for dtype in ("bfloat16", torch.int64, torch.complex64, torch.float8_e4m3fn):
        refuses(lambda: load_pretrained(folder, dtype=dtype), "torch.bfloat16", repr(dtype))
    with torch.device("meta"):
        assert all(w.is_meta for w in T5.from_pretrained(folder).parameters())
        model = T5.from_pretrained(folder, device="cpu")
    assert all(w.device.type == "cpu" for w in model.parameters())
    # By default it stays; transformers keeps `wo` in float32, and the widest counts.
    half = {name: weight.half() for name, weight in weights.items()}
    mixed = {name: w if ".wo." in name else half[name] for name, w in weights.items()}
    for stored, dtype in ((half, torch.float16), (mixed, torch.float32)):
        model = T5.from_pretrained(write(folder, stored))
        assert {w.dtype for w in model.parameters()} == {model(*BATCH).dtype} == {dtype}
        assert torch.equal(model.enc_emb.weight, half[TABLE].to(dtype))


@pytest.mark.parametrize("case", ["converted", "mixed", "as stored"])
def test_each_tensor_is_converted_before_the_next_is_read(releases, case):
    """So that there is one copy of the weights. Two tables are compared first."""
    alive, places, tensors = [], [], []

    def read(weight):
        alive.append(sum(tensor() is not None for tensor in tensors))
        tensor = weight.detach().clone()
        places.append(tensor.data_ptr())
        tensors.append(weakref.ref(tensor))
        return tensor

    _, reference, _ = releases["t5-v1_1"]
    stored, stays = {}, 0
    for name, w in reference.named_parameters():
        if case == "mixed" and ".wo." not in name:
            w = w.bfloat16()
        stays += case != "converted" and w.dtype == torch.float32
        stored[name] = StoredTensor(tuple(w.shape), w.dtype, lambda w=w: read(w))
    dtype = torch.bfloat16 if case == "converted" else None
    model = build(reference.config.to_dict(), stored, dtype, None, "plain", T5)
    parameters = [weight.data_ptr() for weight in model.parameters()]
    assert len(alive) == len(parameters) + 2 > 40
    # Those that need no conversion stay; no other is alive when one is read.
    assert max(alive) <= stays + 1
    if case == "as stored":  # what is read becomes the parameter
        assert sorted(parameters) == sorted(places[2:])


# --- Out ------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scale", [True, False, None])
@pytest.mark.parametrize("per_layer", [True, False])
def test_every_configuration_comes_back(tmp_path, tie, scale, per_layer):
    """Equal to the byte, and ``transformers`` opens it."""
    choices = dict(
        tie_head=tie, scale_logits=scale, bias_per_layer=per_layer,
        feed_forward="gated-gelu" if tie == per_layer else "relu", dropout=0.2,
        num_buckets=16, max_distance=40, pad_id=3, eos_id=np.int64(5), start_id=7,
    )  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    for depths in ({"enc_depth": 1, "dec_depth": 1}, {}):
        model = T5(**OURS | choices | depths).eval()
        perturb(model)
        before = torch.get_rng_state()
        model.save_pretrained(first)
        again = T5.from_pretrained(first)
        again.save_pretrained(second)
        assert torch.equal(torch.get_rng_state(), before)  # no second model was made
        assert again.config == model.config
        for name in ("config.json", SAFE):
            assert (first / name).read_bytes() == (second / name).read_bytes()
    assert torch.equal(again(*BATCH), model(*BATCH))
    entries = json.loads((first / "config.json").read_text("utf-8"))
    wanted = dict(dropout_rate=0.2, pad_token_id=3, eos_token_id=5, decoder_start_token_id=7)
    wanted |= dict(relative_attention_num_buckets=16, relative_attention_max_distance=40)
    wanted |= dict(tie_word_embeddings=tie)  # transformers 4 obeys it
    assert wanted.items() <= entries.items()
    theirs = AutoModelForSeq2SeqLM.from_pretrained(first)
    assert type(theirs).__name__.startswith("UMT5" if per_layer else "T5")
    assert theirs.dtype == torch.float32
    for name, weight in released_tensors(model).items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    unscaled = per_layer and model.config.logit_scale == 1  # UMT5 is always scaled there
    assert_same_logits(model, theirs, 24**0.5 if unscaled else 1.0)


def test_types_that_are_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = small_t5(dim=25).bfloat16()
    model.save_pretrained(tmp_path)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    # Of two types, after 25 numbers of two bytes: they stay aligned.
    model.encoder.blocks[0].feed_forward_norm.float()
    save_pretrained(model, "~")
    data = (tmp_path / SAFE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    wide = header["encoder.block.0.layer.1.layer_norm.weight"]
    assert size % 8 == wide["data_offsets"][0] % 4 == 0
    assert header["__metadata__"]["format"] == "pt"  # transformers wants to be told
    for tensors in (read(tmp_path), safetensors.torch.load_file(tmp_path / SAFE)):
        for name, weight in released_tensors(model).items():
            assert torch.equal(tensors[name], weight) and tensors[name].dtype == weight.dtype
    # The library refuses the state_dict of a tied model, and takes these tensors.
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(model.state_dict(), tmp_path / SAFE)
    safetensors.torch.save_file(released_tensors(model.float()), tmp_path / SAFE)
    assert_same(T5.from_pretrained(tmp_path), model.eval())


def test_models_that_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        outgrown, extended, empty = T5(**OURS), T5(**OURS), T5(**OURS)
    outgrown.enc_emb = outgrown.dec_emb = nn.Embedding(48, 24)
    outgrown.head.weight = outgrown.enc_emb.weight
    extended.extra = nn.Linear(2, 2)
    two_tables = OURS | {"tie_token_emb": False}
    cases = [
        (T5(**OURS | {"dec_heads": 3}), ["num_heads 2 and 3"]),
        (T5(**OURS | {"dec_dim_head": 4}), ["d_kv 8 and 4"]),
        (T5(**OURS | {"dec_mlp_mult": 2}), ["d_ff 64 and 48"]),
        (T5(**two_tables | {"dec_num_tokens": 30}), ["embedding", "vocab_size 40 and 30"]),
        (T5(**two_tables), ["embedding"]),
        (outgrown, [TABLE, "(48, 24)", "(40, 24)"]),
        (extended, ["extra.weight", "surplus"]),
        (empty, ["meta"]),
        (T5(**OURS).to(torch.float8_e4m3fn), ["float8_e4m3fn"]),
    ]
    for model, words in cases:
        refuses(lambda: model.save_pretrained(tmp_path / "new"), *words)
        assert not (tmp_path / "new").exists(), words


# --- A save leaves the old model or the new one ---------------------------


def watch(monkeypatch, crash: int) -> list:
    """Note the steps of a save; let one of them fail, counted from one."""
    steps, places = [], {"write_text": Path, "open": Path, "fsync": os, "replace": Path}
    for name, owner in places.items():

        def step(*arguments, name=name, real=getattr(owner, name), **options):
            steps.append(name)
            if len(steps) == crash:
                raise OSError("no space left on device")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, step)
    return steps


@pytest.mark.parametrize("before", ["nothing", "t5_book", "transformers"])
@pytest.mark.filterwarnings("ignore:.*not from the same save")
def test_a_crash_at_any_step(releases, tmp_path, monkeypatch, before):
    old, _, source = releases["t5"]
    new = T5(**asdict(old.config) | {"scale_logits": False}).eval()
    crash, crashed = 0, True
    while crashed:
        crash += 1
        folder = tmp_path / f"out{crash}"
        if before == "transformers":
            shutil.copytree(source, folder)
        elif before == "t5_book":
            old.save_pretrained(folder)
        with monkeypatch.context() as patched:
            steps = watch(patched, crash)
            try:
                new.save_pretrained(folder)
                crashed = False
            except OSError:
                assert len(steps) == crash
        try:
            found = T5.from_pretrained(folder)
        except FileNotFoundError:
            assert before == "nothing" and "replace" not in steps[:-1]
            continue
        assert_same(found, old if found.config.logit_scale != 1 else new, steps)
        assert not list(folder.glob(".part-*"))
    # Each file is on the disk before it takes its place.
    assert steps[-5:] == ["fsync", "replace", "fsync", "replace", "fsync"]
    assert {*steps[:-5]} == {"write_text", "open"}


def test_config_and_weights_of_two_saves(tmp_path):
    """A mixture is noticed, also one that somebody made by copying a file."""
    first, second = T5(**OURS), T5(**OURS, scale_logits=False)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path)
    change_config(tmp_path, dropout_rate=0.3)  # an edited configuration counts
    with warnings.catch_warnings(action="error"):
        found = T5.from_pretrained(tmp_path)
    assert found.config == replace(second.config, dropout=0.3)
    shutil.copy(tmp_path / "first/config.json", tmp_path)
    with pytest.warns(UserWarning, match="config.json"):
        assert T5.from_pretrained(tmp_path).config == second.config


def test_what_a_killed_save_left_goes_after_a_day(tmp_path):
    for name, hours in ((".part-old", 25), (".part-new", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / SAFE).touch()
        long_ago = time.time() - hours * 60 * 60
        os.utime(tmp_path / name, (long_ago, long_ago))
    T5(**OURS).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".part-new", "config.json", SAFE}


# --- Clear errors ---------------------------------------------------------


@pytest.mark.parametrize("number", [1, 20, 21, 30])
def test_all_that_does_not_fit_is_named(folder, number):
    """Up to 20 of each kind, and the number of the others."""
    gone, norm = "decoder.block.1.layer.0.layer_norm.weight", "encoder.final_layer_norm.weight"
    weights = read(folder) | {f"extra{k}": torch.ones(1) for k in range(number)}
    weights[norm] = torch.ones(31)
    del weights[gone]
    lines = refuses_to_load(write(folder, weights), folder).splitlines()
    assert f"{number + 2} tensors" in lines[0]
    assert lines[1] == f"{gone} is missing"
    assert sum("extra" in line and "surplus" in line for line in lines) == min(number, 20)
    assert number <= 20 or f"{number - 20} more" in lines[22]
    assert lines[-1] == f"{norm} has shape (31,), not (48,)"
    assert len(lines) == 3 + min(number, 21)


def without(weights, word):
    return {name: w for name, w in weights.items() if word not in name}


LARGE = dict(relative_attention_num_buckets=10**18, relative_attention_max_distance=10**19)
REFUSED = [
    # The tensors do not fit; the first have the prefix of DDP.
    (lambda x: {f"module.{name}": x[name] for name in x}, ["encoder.block.0 is missing"]),
    (lambda x: without(x, "decoder"), ["decoder.block.0 is missing"]),
    (lambda x: without(x, "block.2"), ["3 blocks", "encoder.block.2 is missing"]),
    (lambda x: without(x, "final"), ["2 tensors", "encoder.final_layer_norm"]),
    (lambda x: without(x | {HEAD: x[TABLE]}, TABLE), [f"{TABLE} is missing"]),
    (lambda x: x | {"attention_bias.weight": x[TABLE]}, ["attention_bias.weight is surplus"]),
    (lambda x: x | {f"decoder.{BIAS}": torch.ones(32, 4)}, [f"encoder.{BIAS} is missing"]),
    (lambda x: x | {COPIES[0]: x[TABLE] + 1}, [f"{COPIES[0]} is surplus"]),
    (lambda x: x | {COPIES[1]: x[TABLE] + 1}, [f"{COPIES[1]} is surplus"]),
    (lambda x: x | {HEAD: x[TABLE][:-1]}, [f"{HEAD} has shape (127, 48), not (128, 48)"]),
    (lambda x: x | {TABLE: x[TABLE].to(torch.int8)}, [f"{TABLE} is", "8"]),
    (lambda x: {}, ["config.json"]),
    # The configuration is not a T5's.
    ({"model_type": "bart"}, ["'bart'", "'mt5'"]),
    ({"model_type": ["t5"]}, ["model_type"]),
    ({"model_type": None}, ["model_type None"]),
    ({"feed_forward_proj": "gated-silu"}, ["'gated-silu'", "'relu'"]),
    ({"layer_norm_epsilon": 1e-5}, ["layer_norm_epsilon", "1e-05"]),
    ({"vocab_size": None, "d_kv": None}, ["lacks vocab_size, d_kv"]),
    ({"d_model": "48"}, ["d_model", "'48'"]),
    ({"d_ff": 0}, ["d_ff", "0"]),
    ({"num_heads": 4.0}, ["num_heads", "4.0"]),
    ({"num_decoder_layers": [2]}, ["[2]"]),
    ({"dropout_rate": 7}, ["dropout", "7"]),
    ({"dropout_rate": 10**400}, []),
    ({"eos_token_id": [1, 2]}, ["eos_id", "[1, 2]"]),
    ({"decoder_start_token_id": 128}, ["start_id", "128"]),
    ({"scale_decoder_outputs": "no"}, ["scale_decoder_outputs", "'no'"]),
    # Nothing may be built before these are refused.
    ({"num_layers": 10**5}, ["100000", "encoder.block.3"]),
    ({"num_decoder_layers": 10**9}, ["1000000000", "decoder.block.2"]),
    ({"vocab_size": 10**30}, ["vocab_size"]),
    ({"d_ff": 10**400}, ["d_ff"]),
    ({"d_model": 10**9, "d_ff": 10**9, "num_heads": 10**9}, ["8" + 18 * "0"]),
    (LARGE, ["4" + 18 * "0"]),
]


@pytest.mark.parametrize("change, words", REFUSED)
def test_what_is_no_release_of_t5(folder, change, words):
    if callable(change):
        write(folder, change(read(folder)))
    else:
        change_config(folder, **change)
        words = ["config.json", *words]
    start = time.process_time()
    refuses_to_load(folder, folder, *words)
    assert time.process_time() - start < 5
    if callable(change):
        entries = json.loads((folder / "config.json").read_text())
        refuses(lambda: T5.from_released(entries, read(folder)), *words)


def test_damaged_files(releases, folder):
    damage = [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe\xff", b"[" * 100_000]
    config = folder / "config.json"
    right = config.read_bytes()
    for data in [*damage, b'{"a": ' + b"9" * 5000 + b"}"]:
        config.write_bytes(data)
        refuses_to_load(folder, config)
    config.write_bytes(right)
    for layout in ("safetensors", "bin", "old bin"):
        write_as(layout, folder, releases["t5"][1])
        file = folder / (SAFE if layout == "safetensors" else BIN)
        for data in (file.read_bytes()[:-1000], b"", b"no file", b"\x80\x02broken"):
            file.write_bytes(data)
            refuses_to_load(folder, file, "damaged")


def test_files_that_are_not_there(releases, folder):
    write_as("bin shards", folder, releases["t5"][1])
    for gone in ("pytorch_model-1.bin", "config.json"):
        moved = (folder / gone).rename(folder / "moved")
        refuses(lambda: T5.from_pretrained(folder), gone, error=FileNotFoundError)
        moved.rename(folder / gone)


def test_a_bin_of_other_things(releases, folder):
    sparse, meta = torch.ones(2).to_sparse(), torch.ones(2, device="meta")
    for held in ([torch.ones(2)], {"n": 3}, torch.ones(2), {TABLE: sparse}, {TABLE: meta}):
        refuses_to_load(write_bin(folder, held), BIN)
    # One number that claims to be a matrix of 16 GB
    large = torch.zeros(1).expand(1_000_000, 4_000)
    weights = releases["t5"][1].state_dict()
    change_config(folder, vocab_size=1_000_000, d_model=4_000)
    for name in (TABLE, COPIES[0], HEAD, "other"):
        refuses_to_load(write_bin(folder, weights | {name: large}), BIN, " 16000")


def test_a_compressed_archive(releases, folder):
    file = write_as("bin", folder, releases["t5"][1]) / BIN
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    refuses_to_load(folder, file)


def test_two_shards_with_the_same_tensor(releases, folder):
    """They may, if they agree."""
    ours, reference, _ = releases["t5"]
    write_as("bin shards", folder, reference)
    first, last = (torch.load(folder / f"pytorch_model-{k}.bin") for k in (0, 2))
    name = next(name for name in first if "layer_norm" in name)
    torch.save(last | {name: first[name]}, folder / "pytorch_model-2.bin")
    assert_same(T5.from_pretrained(folder), ours)
    torch.save(last | {name: first[name] + 1}, folder / "pytorch_model-2.bin")
    refuses_to_load(folder, name, "pytorch_model-2.bin")


class Trap(str):
    """A pickle that would write a file."""

    def __reduce__(self):
        return Path.write_text, (Path(self), "caught")


@pytest.mark.parametrize("kind", ["archive", "old", "bare"])
def test_no_pickle_is_run(folder, tmp_path, kind):
    file, trap = folder / BIN, Trap(tmp_path / "harm")
    weights = read(folder) | {"trap": trap}
    write_bin(folder, weights, _use_new_zipfile_serialization=kind == "archive")
    if kind == "bare":
        file.write_bytes(pickle.dumps({TABLE: trap}, protocol=2))
    refuses_to_load(folder, file)
    assert b"write_text" in file.read_bytes()  # the trap is set
    assert not Path(trap).exists()
