"""Released weights in and out, against ``transformers``."""

import json
import os
import pickle
import shutil
import time
import warnings
import weakref
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from t5_book import T5, T5Config, load_pretrained, save_pretrained
from t5_book.conversion import our_config, our_name, released_config, released_name
from t5_book.presets import PRESETS
from t5_book.pretrained import StoredTensor, build, released_tensors
from tests.conftest import (
    FAMILIES,
    SMALL,
    difference,
    make_family,
    padded,
    their_logits,
)

TABLE, HEAD = "shared.weight", "lm_head.weight"
COPIES = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
STALE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
OURS = dict(
    dim=24, enc_num_tokens=40, enc_depth=2, enc_heads=2, enc_dim_head=8,
    enc_mlp_mult=8 / 3, dec_num_tokens=40, dec_depth=3, dec_heads=2,
    dec_dim_head=8, dec_mlp_mult=8 / 3,
)  # fmt: skip


# --- Releases to load -----------------------------------------------------


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """For each family: ours, the reference, and the folder that it saved.

    Ours has its weights by another table of names: tests/conftest.py.
    """
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        ours, reference = make_family(family)
        reference.save_pretrained(folder)
        made[family] = ours, reference, folder
    return made


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def release(releases, family, tmp_path):
    """Ours, the reference, and a copy of the folder to change."""
    ours, reference, folder = releases[family]
    return ours, reference, shutil.copytree(folder, tmp_path / family)


@pytest.fixture
def folder(releases, tmp_path):
    """A copy of T5 1.0's folder."""
    return shutil.copytree(releases["t5"][2], tmp_path / "t5")


def read(folder: Path) -> dict:
    return safetensors.torch.load_file(folder / "model.safetensors", backend="pread")


def write(folder: Path, weights: dict) -> Path:
    """Replace the tensors of a folder."""
    weights = {name: w.contiguous().clone() for name, w in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


def write_bin(folder: Path, held) -> Path:
    """Replace the tensors of a folder by a file of ``torch.save``."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(held, folder / "pytorch_model.bin")
    return folder


def change_config(folder: Path, **entries) -> Path:
    """Change entries of ``config.json``; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | entries
    kept = {name: value for name, value in values.items() if value is not None}
    path.write_text(json.dumps(kept))
    return folder


def assert_same(model: T5, ours: T5):
    """Two models agree, weight by weight, and in every choice."""
    assert replace(model.config, dropout=0.0, scale_logits=None) == replace(
        ours.config, scale_logits=None
    )
    assert model.config.logit_scale == ours.config.logit_scale
    weights, wanted = model.state_dict(), ours.state_dict()
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, wanted[name]), name
    assert all(weight.requires_grad for weight in model.parameters())
    assert (model.head.weight is model.dec_emb.weight) == ours.config.tie_head
    assert model.enc_emb is model.dec_emb and not model.training


def assert_refused(call, *arguments, names=()):
    """A call raises ValueError, and its message has all these words."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    for name in names:
        assert str(name) in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def our_logits(model, *batch):
    return model(*batch)


BATCH = padded(3, 11, 7, high=40)[:3]


# --- Every family, from every kind of file --------------------------------


def as_safetensors(reference, folder):
    pass


def as_shards(reference, folder):
    (folder / "model.safetensors").unlink()
    reference.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def as_bin(reference, folder):
    """As ``transformers`` 4 wrote them: with all copies of the table."""
    weights = reference.state_dict()
    assert {*COPIES} < {*weights}
    write_bin(folder, weights)


def as_old_bin(reference, folder):
    """As torch wrote them before 2020: no archive."""
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(reference.state_dict(), file, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)


def as_bin_shards(reference, folder):
    (folder / "model.safetensors").unlink()
    items, places = list(reference.state_dict().items()), {}
    for k in range(3):
        name = f"pytorch_model-0000{k + 1}-of-00003.bin"
        torch.save(dict(items[k::3]), folder / name)
        places |= dict.fromkeys(dict(items[k::3]), name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


LAYOUTS = [as_safetensors, as_shards, as_bin, as_old_bin, as_bin_shards]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_files(release, layout):
    ours, reference, folder = release
    layout(reference, folder)
    model = T5.from_pretrained(folder)
    assert_same(model, ours)
    # The reference of tests/conftest.py does not scale an untied UMT5.
    assert difference(our_logits(model, *BATCH), their_logits(reference, *BATCH).detach()) <= 1e-5


def test_from_memory(release):
    ours, reference, _ = release
    config = reference.config.to_dict()
    model = T5.from_released(config, reference.state_dict())
    assert_same(model, ours)
    assert_same(T5.from_released(config, dict(reference.named_parameters())), ours)
    theirs = {weight.data_ptr() for weight in reference.parameters()}
    assert theirs.isdisjoint(weight.data_ptr() for weight in model.parameters())


def test_what_a_path_may_be(releases, tmp_path):
    ours, reference, source = releases["t5-v1_1"]
    folder = shutil.copytree(source, tmp_path / "copy")
    torch.save({"nonsense": torch.ones(1)}, folder / "pytorch_model.bin")
    for path in (folder, str(folder), folder / "model.safetensors"):
        assert_same(load_pretrained(path), ours)
    as_bin_shards(reference, folder)
    assert_same(load_pretrained(folder / "pytorch_model.bin.index.json"), ours)


# --- Names and configuration ----------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if "small" in name])
def test_names_and_shapes_of_the_small_presets(name, monkeypatch):
    """Ours, in their names, are what ``transformers`` has.

    tests/test_t5.py counts the parameters of all presets.
    """
    for init in ("normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, init, lambda tensor, *_, **__: tensor)
    with torch.device("meta"):
        model = T5(**PRESETS[name])
        entries = released_config(model.config)
        kind = "MT5" if name.startswith("mt5") else entries["model_type"].upper()
        config = getattr(transformers, f"{kind}Config")(**entries)
        make = getattr(transformers, f"{kind}ForConditionalGeneration")
        theirs = make(config).state_dict()
    for copied in COPIES + [HEAD] * model.config.tie_head:
        del theirs[copied]
    ours = {}
    for parameter, weight in model.named_parameters():
        ours[released_name(parameter)] = weight.shape
        assert our_name(released_name(parameter)) == parameter
    assert ours == {name: weight.shape for name, weight in theirs.items()}
    assert replace(our_config(entries), tie_head=model.config.tie_head) == model.config


@pytest.mark.parametrize(
    "name", ["classifier.bias", "encoder.blocks.3.norm.weight", "headache.weight", "", "{}"]
)
def test_a_name_that_no_t5_has_stays(name):
    assert released_name(name) == our_name(name) == name


def test_configuration_is_read():
    """Flan-T5's entries, with sizes that are all different."""
    entries = dict(
        model_type="t5", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=3,
        num_layers=3, num_decoder_layers=2, dropout_rate=0.05, pad_token_id=3,
        eos_token_id=4, decoder_start_token_id=5, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=9,
        layer_norm_epsilon=1e-6, n_positions=512, tie_word_embeddings=False,
    )  # fmt: skip
    assert our_config(entries) == T5Config(
        dim=32, enc_num_tokens=64, enc_depth=3, enc_heads=3, enc_dim_head=8,
        enc_mlp_mult=1.5, dec_num_tokens=64, dec_depth=2, dec_heads=3,
        dec_dim_head=8, dec_mlp_mult=1.5, dropout=0.05, feed_forward="gated-gelu",
        num_buckets=8, max_distance=9, pad_id=3, eos_id=4, start_id=5,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_entries_that_may_be_missing(model_type):
    """We take what ``transformers`` takes."""
    kind = getattr(transformers, f"{model_type.upper()}Config")
    entries = {"model_type": model_type} | SMALL
    del entries["num_decoder_layers"]
    given = kind(**entries, decoder_start_token_id=0).to_dict()
    assert given["feed_forward_proj"] == ("relu" if model_type == "t5" else "gated-gelu")
    assert our_config(entries) == our_config(given)
    assert our_config(entries).dropout == 0.1
    assert our_config(entries | {"pad_token_id": 7}).start_id == 7


# --- The tensors decide ---------------------------------------------------


@pytest.mark.parametrize("word", [True, False, None])
def test_the_word_of_the_configuration_does_not_count(release, word):
    ours, _, folder = release
    change_config(folder, tie_word_embeddings=word, scale_decoder_outputs=None)
    assert_same(T5.from_pretrained(folder), ours)


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
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    make = getattr(transformers, f"{kind}ForConditionalGeneration")
    reference = make(config).eval()
    reference.save_pretrained(tmp_path)
    for k in range(2):
        model = T5.from_pretrained(tmp_path)
        assert model.config.tie_head and model.config.logit_scale == 1
        logits = their_logits(reference, *BATCH).detach()
        assert difference(our_logits(model, *BATCH), logits) <= 1e-5
        model.save_pretrained(tmp_path)
        reference = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()


@pytest.mark.parametrize("name", [STALE, *COPIES])
def test_tolerated(releases, folder, name):
    weights = read(folder)
    table = weights[TABLE] if name in COPIES else torch.randn(32, 4)
    assert_same(T5.from_pretrained(write(folder, weights | {name: table})), releases["t5"][0])


@pytest.mark.parametrize("names", [COPIES, COPIES[:1], COPIES[1:]])
def test_a_table_under_other_names(release, names):
    ours, _, folder = release
    weights = read(folder)
    table = weights.pop(TABLE)
    assert_same(T5.from_pretrained(write(folder, weights | dict.fromkeys(names, table))), ours)


def test_biases_are_decided_by_the_tensors(releases, tmp_path):
    """A UMT5 that calls itself T5, and the other way round."""
    for family, word in (("umt5", "t5"), ("t5-v1_1", "umt5")):
        ours, _, folder = releases[family]
        folder = shutil.copytree(folder, tmp_path / family)
        change_config(folder, model_type=word, feed_forward_proj="gated-gelu")
        assert_same(T5.from_pretrained(folder), ours)


# --- Types, places, memory ------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(releases, dtype):
    ours, reference, folder = releases["t5"]
    in_memory = reference.config.to_dict(), reference.state_dict()
    for model in (
        load_pretrained(folder, dtype=dtype),
        T5.from_released(*in_memory, dtype=dtype),
    ):
        assert {w.dtype for w in model.parameters()} == {dtype}
        assert torch.equal(model.enc_emb.weight, ours.enc_emb.weight.to(dtype))


@pytest.mark.parametrize("mixed", [True, False])
def test_the_type_of_the_file_stays(folder, mixed):
    """The widest, if there are two: ``transformers`` keeps ``wo`` in float32."""
    weights = read(folder)
    for name in weights:
        if not (mixed and ".wo." in name):
            weights[name] = weights[name].half()
    model = T5.from_pretrained(write(folder, weights))
    dtype = torch.float32 if mixed else torch.float16
    assert {w.dtype for w in model.parameters()} == {dtype}
    assert torch.equal(model.enc_emb.weight, weights[TABLE].to(dtype))
    assert our_logits(model, *BATCH).dtype == dtype


def test_device(folder):
    with torch.device("meta"):
        assert all(w.is_meta for w in T5.from_pretrained(folder).parameters())
        model = T5.from_pretrained(folder, device="cpu")
    assert all(w.device.type == "cpu" for w in model.parameters())


def test_no_random_number_is_drawn(folder, tmp_path):
    """Neither to load nor to save is a second model made in memory."""
    before = torch.get_rng_state()
    T5.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)


class Watched:
    """The tensors of a model, and what becomes of them when they are read."""

    def __init__(self, weights: dict):
        self.alive, self.places, self.reads = [], [], []
        self.stored = {
            name: StoredTensor(tuple(w.shape), w.dtype, lambda w=w: self.read(w))
            for name, w in weights.items()
        }

    def read(self, weight):
        self.alive.append(sum(read() is not None for read in self.reads))
        tensor = weight.detach().clone()
        self.places.append(tensor.data_ptr())
        self.reads.append(weakref.ref(tensor))
        return tensor


@pytest.mark.parametrize("mixed", [True, False])
def test_each_tensor_is_converted_before_the_next_is_read(releases, mixed):
    """So that there is one copy of the weights. Two tables are compared first."""
    _, reference, _ = releases["t5-v1_1"]
    weights = dict(reference.named_parameters())
    if mixed:
        weights = {n: w if ".wo." in n else w.bfloat16() for n, w in weights.items()}
    watched = Watched(weights)
    dtype = None if mixed else torch.bfloat16
    build(reference.config.to_dict(), watched.stored, dtype, None, T5)
    assert len(watched.alive) == len(weights) + 2
    # Those that need no conversion stay; no other is alive when one is read.
    stays = sum(w.dtype == torch.float32 for w in weights.values()) if mixed else 0
    assert max(watched.alive) <= stays + 1


def test_what_is_read_becomes_the_parameter(releases):
    _, reference, _ = releases["t5"]
    watched = Watched(dict(reference.named_parameters()))
    model = build(reference.config.to_dict(), watched.stored, None, None, T5)
    places = sorted(weight.data_ptr() for weight in model.parameters())
    assert places == sorted(watched.places) and len(places) > 40


def test_the_file_may_go(releases, folder):
    """The weights are in memory, not in the file."""
    model = T5.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"0" * 100_000)
    assert_same(model, releases["t5"][0])


def test_a_class_of_ones_own(releases):
    class Mine(T5):
        pass

    _, reference, folder = releases["t5"]
    assert type(Mine.from_pretrained(folder)) is Mine
    assert type(Mine.from_released(reference.config.to_dict(), reference.state_dict())) is Mine


# --- Out ------------------------------------------------------------------


def test_transformers_opens_what_we_save(release, tmp_path):
    ours, reference, folder = release
    T5.from_pretrained(folder).save_pretrained(tmp_path / "out")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    kind = "UMT5" if ours.config.bias_per_layer else "T5"
    assert type(theirs).__name__ == f"{kind}ForConditionalGeneration"
    assert theirs.dtype == torch.float32
    for name, weight in reference.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    logits = their_logits(theirs, *BATCH).detach()
    if kind == "UMT5":  # whose logits it scales, tied or not
        logits = logits * 48**0.5
    assert difference(logits, our_logits(ours, *BATCH)) <= 1e-5


def test_round_trip_is_equal_to_the_byte(release, tmp_path):
    T5.from_pretrained(release[2]).save_pretrained(tmp_path / "a")
    for k in range(3):
        T5.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        for name in ("config.json", "model.safetensors"):
            first = (tmp_path / "a" / name).read_bytes()
            assert (tmp_path / "b" / name).read_bytes() == first
    with safetensors.safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scale", [True, False, None])
@pytest.mark.parametrize("per_layer", [True, False])
def test_every_configuration_comes_back(tmp_path, tie, scale, per_layer):
    torch.manual_seed(0)
    choices = dict(
        tie_head=tie, scale_logits=scale, bias_per_layer=per_layer,
        feed_forward="gated-gelu" if tie == per_layer else "relu", dropout=0.2,
        num_buckets=16, max_distance=40, pad_id=3, eos_id=5, start_id=7,
    )  # fmt: skip
    model = T5(**OURS | choices).eval()
    model.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path)
    assert again.config == model.config
    entries = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert entries["tie_word_embeddings"] is tie  # transformers 4 obeys it
    logits = our_logits(model, *BATCH)
    assert torch.equal(our_logits(again, *BATCH), logits)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    theirs = their_logits(theirs, *BATCH).detach()
    if per_layer and model.config.logit_scale == 1:  # UMT5 is always scaled there
        theirs = theirs * 24**0.5
    assert difference(logits, theirs) <= 1e-5


@pytest.mark.parametrize("per_layer", [True, False])
def test_one_block_a_side(tmp_path, per_layer):
    sizes = OURS | dict(enc_depth=1, dec_depth=1, bias_per_layer=per_layer)
    T5(**sizes).save_pretrained(tmp_path)
    assert T5.from_pretrained(tmp_path).config == T5Config(**sizes)


def test_types_that_are_saved(tmp_path):
    model = T5(**OURS).bfloat16()
    model.save_pretrained(tmp_path)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    model.encoder.norm.float()  # of two types: the numbers stay aligned
    save_pretrained(model, tmp_path)
    for tensors in (read(tmp_path), safetensors.torch.load_file(tmp_path / "model.safetensors")):
        for name, weight in released_tensors(model).items():
            assert torch.equal(tensors[name], weight) and tensors[name].dtype == weight.dtype


def test_tensors_for_the_library(tmp_path):
    """It refuses the state_dict of a tied model, and takes this."""
    model = T5(**OURS)
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    write(tmp_path, released_tensors(model))
    (tmp_path / "config.json").write_text(json.dumps(released_config(model.config)))
    assert_same(T5.from_pretrained(tmp_path), model.eval())


def outgrown():
    model = T5(**OURS)
    model.enc_emb = model.dec_emb = nn.Embedding(48, 24)
    model.head.weight = model.enc_emb.weight
    return model


def extended():
    model = T5(**OURS)
    model.extra = nn.Linear(2, 2)
    return model


def without_numbers():
    with torch.device("meta"):
        return T5(**OURS)


TWO_TABLES = {"dec_num_tokens": 30, "tie_token_emb": False}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: T5(**OURS | {"dec_heads": 3}), ["num_heads 2 and 3"]),
        (lambda: T5(**OURS | {"dec_dim_head": 4}), ["d_kv 8 and 4"]),
        (lambda: T5(**OURS | {"dec_mlp_mult": 2}), ["d_ff 64 and 48"]),
        (lambda: T5(**OURS | TWO_TABLES), ["embedding", "vocab_size 40 and 30"]),
        (lambda: T5(**OURS, tie_token_emb=False), ["embedding"]),
        (outgrown, ["shared.weight", "(48, 24)", "(40, 24)"]),
        (extended, ["extra.weight", "surplus"]),
        (without_numbers, ["meta"]),
        (lambda: T5(**OURS).to(torch.float8_e4m3fn), ["float8_e4m3fn"]),
    ],
)
def test_models_that_cannot_be_saved(tmp_path, make, words):
    assert_refused(make().save_pretrained, tmp_path / "new", names=words)
    assert not (tmp_path / "new").exists()


# --- A save leaves the old model or the new one ---------------------------


@pytest.fixture
def crash(monkeypatch):
    """Let the k-th call of a function that a save needs fail."""

    @contextmanager
    def prepare(owner, name, k):
        real, calls = getattr(owner, name), []

        def fail(*arguments, **options):
            calls.append(name)
            if len(calls) == k:
                raise OSError("no space left on device")
            return real(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            yield calls

    return prepare


STEPS = [(Path, "write_text"), (Path, "open"), (os, "fsync"), (Path, "replace")]


@pytest.mark.parametrize("owner, name", STEPS)
@pytest.mark.parametrize("before", ["nothing", "t5_book", "transformers"])
def test_a_crash_at_any_step(releases, tmp_path, crash, owner, name, before):
    old, _, source = releases["t5"]
    torch.manual_seed(1)
    new = T5(**asdict(old.config) | {"scale_logits": False}).eval()
    for k in (1, 2, 3):
        folder = tmp_path / f"out{k}"
        if before == "transformers":
            shutil.copytree(source, folder)
        elif before == "t5_book":
            old.save_pretrained(folder)
        with crash(owner, name, k) as calls:
            try:
                new.save_pretrained(folder)
            except OSError:
                assert len(calls) == k
            else:
                assert 1 <= len(calls) < k
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = T5.from_pretrained(folder)
            except FileNotFoundError:
                assert before == "nothing"
                continue
        assert_same(found, old if found.config.logit_scale != 1 else new)
        assert not list(folder.glob(".part-*"))


def test_each_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    steps = []
    for owner, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, real=real, name=name: (steps.append(name), real(*a))[1]
        )
    T5(**OURS).save_pretrained(tmp_path)
    assert steps == ["fsync", "replace", "fsync", "replace", "fsync"]


def test_a_mixture_is_noticed(tmp_path):
    """Also one that somebody made by copying a file."""
    first, second = T5(**OURS), T5(**OURS, scale_logits=False)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    shutil.copy(tmp_path / "first/config.json", tmp_path / "second")
    with pytest.warns(UserWarning, match="config.json"):
        found = T5.from_pretrained(tmp_path / "second")
    assert found.config == second.config


def test_an_edited_configuration_counts(tmp_path):
    T5(**OURS).save_pretrained(tmp_path)
    change_config(tmp_path, dropout_rate=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert T5.from_pretrained(tmp_path).config == T5Config(**OURS, dropout=0.3)


def test_a_reader_goes_on_reading_the_old_file(tmp_path):
    T5(**OURS).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        before = (tmp_path / name).read_bytes()
        with (tmp_path / name).open("rb") as old:
            T5(**OURS | {"enc_depth": 1}).save_pretrained(tmp_path)
            assert old.read() == before
        assert (tmp_path / name).read_bytes() != before
        T5(**OURS).save_pretrained(tmp_path)


def test_what_a_killed_save_left_goes_after_a_day(tmp_path):
    for name, age in ((".part-old", 25), (".part-new", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        long_ago = time.time() - age * 60 * 60
        os.utime(tmp_path / name, (long_ago, long_ago))
    T5(**OURS).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".part-new", "config.json", "model.safetensors"}


# --- Clear errors ---------------------------------------------------------


def test_all_that_does_not_fit_is_named(folder):
    weights = read(folder)
    norm = "encoder.final_layer_norm.weight"
    gone = "decoder.block.1.layer.2.DenseReluDense.wi.weight"
    del weights[gone]
    weights |= {norm: torch.ones(31), "classifier.bias": torch.ones(2)}
    message = assert_refused(T5.from_pretrained, write(folder, weights), names=[folder])
    assert "3 tensors" in message
    assert message.splitlines()[1:] == [
        f"{gone} is missing",
        "classifier.bias is surplus",
        f"{norm} has shape (31,), not (48,)",
    ]


@pytest.mark.parametrize("number", [20, 21, 30])
def test_a_long_list_is_cut(folder, number):
    surplus = {f"extra{k}": torch.ones(1) for k in range(number)}
    message = assert_refused(T5.from_pretrained, write(folder, read(folder) | surplus))
    lines = message.splitlines()
    assert f"{number} tensors" in lines[0] and len(lines) == min(number, 21) + 1
    if number > 20:
        assert f"{number - 20} more" in lines[-1]


def without(*words):
    return lambda weights: {n: w for n, w in weights.items() if not any(x in n for x in words)}


def renamed(old, new):
    return lambda weights: {n.replace(old, new): w for n, w in weights.items()}


def added(name, make):
    return lambda weights: weights | {name: make(weights[TABLE])}


@pytest.mark.parametrize(
    "change, words",
    [
        (renamed("", "module."), ["encoder.block.0 is missing"]),  # DDP's prefix
        (without("decoder"), ["decoder.block.0 is missing"]),
        (without("block.2"), ["3 blocks", "encoder.block.2 is missing"]),
        (without("final"), ["2 tensors", "encoder.final_layer_norm.weight is missing"]),
        (renamed(TABLE, HEAD), [f"{TABLE} is missing", f"{HEAD} is surplus"][:1]),
        (added("relative_attention_bias.weight", torch.clone), ["bias.weight is surplus"]),
        (added(COPIES[0], lambda x: x + 1), [f"{COPIES[0]} is surplus"]),
        (added(COPIES[1], lambda x: x + 1), [f"{COPIES[1]} is surplus"]),
        (added(HEAD, lambda x: x[:-1]), [f"{HEAD} has shape (127, 48), not (128, 48)"]),
        (added(TABLE, lambda x: x.to(torch.int8)), [f"{TABLE} is I8"]),
        (lambda _: {}, ["config.json"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(folder, change, words):
    weights = change(read(folder))
    assert_refused(T5.from_pretrained, write(folder, weights), names=words)
    if change(read(folder)):
        entries = json.loads((folder / "config.json").read_text())
        words = [word.replace("I8", "torch.int8") for word in words]
        assert_refused(T5.from_released, entries, weights, names=words)


def test_a_missing_bias_of_umt5(releases, tmp_path):
    folder = shutil.copytree(releases["umt5"][2], tmp_path / "umt5")
    weights = read(folder)
    gone = next(name for name in weights if "block.1" in name and "_bias" in name)
    assert_refused(
        T5.from_pretrained, write(folder, without(gone)(weights)), names=[f"{gone} is missing"]
    )


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"model_type": "bart"}, ["'bart'", "'mt5'"]),
        ({"model_type": ["t5"]}, ["model_type"]),
        ({"model_type": None}, ["model_type None"]),
        ({"feed_forward_proj": "gated-silu"}, ["'gated-silu'", "'relu'"]),
        ({"layer_norm_epsilon": 1e-5}, ["layer_norm_epsilon", "1e-05"]),
        ({"d_model": None}, ["lacks d_model"]),
        ({"vocab_size": None, "d_kv": None}, ["lacks vocab_size, d_kv"]),
        ({"d_model": "48"}, ["d_model", "'48'"]),
        ({"d_ff": 0}, ["d_ff", "0"]),
        ({"num_heads": 4.0}, ["num_heads", "4.0"]),
        ({"num_decoder_layers": [2]}, ["[2]"]),
        ({"dropout_rate": 7}, ["dropout", "7"]),
        ({"dropout_rate": 10**400}, ["config.json"]),
        ({"eos_token_id": [1, 2]}, ["eos_id", "[1, 2]"]),
        ({"decoder_start_token_id": 128}, ["start_id", "128"]),
        ({"scale_decoder_outputs": "no"}, ["scale_decoder_outputs", "'no'"]),
        # Nothing may be built before these are refused.
        ({"num_layers": 10**5}, ["100000", "encoder.block.3"]),
        ({"num_decoder_layers": 10**9}, ["1000000000", "decoder.block.2"]),
        ({"vocab_size": 10**30}, ["vocab_size"]),
        ({"d_ff": 10**400}, ["d_ff"]),
        ({"d_model": 10**9, "d_ff": 10**9, "num_heads": 10**9}, ["8" + 18 * "0"]),
        (
            {
                "relative_attention_num_buckets": 10**18,
                "relative_attention_max_distance": 10**19,
            },
            ["4" + 18 * "0"],
        ),
    ],
)
def test_configurations_of_others(folder, entries, words):
    start = time.process_time()
    assert_refused(
        T5.from_pretrained, change_config(folder, **entries), names=[folder, "config.json", *words]
    )
    assert time.process_time() - start < 5


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_a_type_that_weights_cannot_have(folder, dtype):
    with pytest.raises(ValueError, match=r"torch.bfloat16") as caught:
        load_pretrained(folder, dtype=dtype)
    assert repr(dtype) in str(caught.value)


def test_files_that_are_not_there(releases, folder, tmp_path):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        T5.from_pretrained(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        T5.from_pretrained(tmp_path / "empty")
    shutil.copytree(releases["t5"][2], tmp_path / "shards")
    as_bin_shards(releases["t5"][1], tmp_path / "shards")
    (tmp_path / "shards/pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003"):
        T5.from_pretrained(tmp_path / "shards")


DAMAGED = [
    b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe\xff", b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED, ids=lambda data: repr(data[:9]))
def test_a_damaged_configuration(folder, data):
    (folder / "config.json").write_bytes(data)
    assert_refused(T5.from_pretrained, folder, names=[folder / "config.json"])


@pytest.mark.parametrize("data", [b"", b"no file", b"\x80\x02broken"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights(folder, name, data):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    assert_refused(T5.from_pretrained, folder, names=[folder / name, "damaged"])


@pytest.mark.parametrize("layout", [as_safetensors, as_bin, as_old_bin])
def test_half_a_download(releases, folder, layout):
    layout(releases["t5"][1], folder)
    file = next(path for path in folder.iterdir() if "model." in path.name)
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(T5.from_pretrained, folder, names=[file])


@pytest.mark.parametrize(
    "held",
    [
        [torch.ones(2)],
        {"n": 3},
        torch.ones(2),
        {TABLE: torch.ones(2).to_sparse()},
        {TABLE: torch.ones(2, device="meta")},
    ],
    ids=["list", "number", "tensor", "sparse", "meta"],
)
def test_a_bin_of_other_things(folder, held):
    assert_refused(T5.from_pretrained, write_bin(folder, held), names=["pytorch_model.bin"])


@pytest.mark.parametrize("name", [TABLE, COPIES[0], HEAD, "other"])
def test_a_tensor_that_is_larger_than_its_file(releases, folder, name):
    """One number that claims to be a matrix of 16 GB."""
    weights = releases["t5"][1].state_dict()
    large = torch.zeros(1).expand(1_000_000, 4_000)
    write_bin(folder, weights | {name: large})
    change_config(folder, vocab_size=1_000_000, d_model=4_000)
    assert_refused(T5.from_pretrained, folder, names=["pytorch_model.bin", " 16000"])


def test_a_compressed_archive(releases, folder):
    write_bin(folder, releases["t5"][1].state_dict())
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert_refused(T5.from_pretrained, folder, names=["pytorch_model.bin"])


@pytest.mark.parametrize("agree", [True, False])
def test_two_shards_with_the_same_tensor(releases, folder, agree):
    ours, reference, _ = releases["t5"]
    as_bin_shards(reference, folder)
    shards = sorted(folder.glob("*.bin"))
    name, weight = next(
        (name, weight) for name, weight in torch.load(shards[0]).items() if "layer_norm" in name
    )
    last = torch.load(shards[2])
    torch.save(last | {name: weight if agree else weight + 1}, shards[2])
    if agree:
        assert_same(T5.from_pretrained(folder), ours)
    else:
        assert_refused(T5.from_pretrained, folder, names=[name, shards[2].name])


class Trap:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "caught")


@pytest.mark.parametrize("kind", ["archive", "old", "bare"])
def test_no_pickle_is_run(folder, tmp_path, kind):
    weights = read(folder)
    (folder / "model.safetensors").unlink()
    file, trap = folder / "pytorch_model.bin", Trap(tmp_path / "harm")
    if kind == "bare":
        file.write_bytes(pickle.dumps({TABLE: trap}, protocol=2))
    else:
        options = {"_use_new_zipfile_serialization": kind == "archive"}
        torch.save(weights | {"trap": trap}, file, **options)
    assert_refused(T5.from_pretrained, folder, names=[file])
    assert b"write_text" in file.read_bytes()  # the trap is set
    assert not trap.path.exists()
