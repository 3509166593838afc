"""Released weights in and out (chapter 15), against ``transformers``."""

import json
import pickle
import shutil
import weakref
from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hugging_face import difference, exact_norms
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from t5_book import pretrained
from t5_book.pretrained import load_pretrained, released_name
from t5_book.config import T5Config
from t5_book.presets import PRESETS
from t5_book.t5 import T5

# Each family, as small as it goes, with what sets it apart.
GATED = {"feed_forward_proj": "gated-gelu"}
UNTIED = GATED | {"tie_word_embeddings": False}
FAMILIES = {
    "t5": ("T5", {}),
    "t5-v1_1": ("T5", UNTIED),
    "flan-t5": ("T5", UNTIED | {"num_heads": 3, "dropout_rate": 0.05}),
    "mt5": ("MT5", {"vocab_size": 96}),
    "byt5": ("T5", UNTIED | {"num_layers": 4, "num_decoder_layers": 1}),
    "umt5": ("UMT5", {"pad_token_id": 0, "eos_token_id": 1}),
}
SIZES = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=3,
    num_decoder_layers=2, decoder_start_token_id=0,
)  # fmt: skip
TABLE, HEAD = "shared.weight", "lm_head.weight"
COPIES = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
STALE = (
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
)


def make_reference(family: str):
    """A model of ``transformers`` with random weights.

    Version 5.23 ties every fresh model, so we untie what is released so.
    """
    torch.manual_seed(0)
    kind, extra = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**SIZES | extra)
    make = getattr(transformers, f"{kind}ForConditionalGeneration")
    reference = make(config).eval()
    if family != "t5":
        head = torch.randn_like(reference.shared.weight)
        reference.lm_head.weight = nn.Parameter(head * 32**-0.5)
    for name, weight in reference.named_parameters():
        if weight.ndim == 1:  # norms start at one, which would hide bugs
            weight.data += 0.3 * torch.randn_like(weight)
        if "relative_attention_bias" in name:  # small, likewise
            weight.data *= 10
    return reference


def inputs():
    """Sources, targets and a mask, the same for all."""
    generator = torch.Generator().manual_seed(1)
    src = torch.randint(2, 64, (3, 11), generator=generator)
    tgt = torch.randint(2, 64, (3, 7), generator=generator)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, 6:] = mask[1, :3] = False
    return src, tgt, mask


@torch.no_grad()
def their_logits(reference):
    """The reference's logits; UMT5's without the factor it should not have."""
    src, tgt, mask = inputs()
    logits = reference(
        input_ids=src, attention_mask=mask.long(), decoder_input_ids=tgt
    ).logits
    untied = reference.lm_head.weight is not reference.shared.weight
    umt5 = reference.config.model_type == "umt5" and untied
    return logits * 32**0.5 if umt5 else logits


@torch.no_grad()
def our_logits(model):
    src, tgt, mask = inputs()
    return model(src, tgt, mask)


def wide(model):
    """A copy in float64, where rounding can neither hide nor feign a bug."""
    return exact_norms(deepcopy(model).double())


def apart(model, reference) -> float:
    """The largest difference of their logits, in float64."""
    return difference(our_logits(wide(model)), their_logits(wide(reference)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """For each family the reference, and the folder it saved itself to."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = make_reference(family), folder
        made[family][0].save_pretrained(folder)
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def original(request, originals):
    return originals[request.param]


@pytest.fixture
def copy(originals, tmp_path):
    """A folder of one's own with T5 1.0, and its tensors."""
    folder = shutil.copytree(originals["t5"][1], tmp_path / "copy")
    file = folder / "model.safetensors"
    return folder, safetensors.torch.load_file(file, backend="pread")


def write(folder: Path, weights: dict) -> Path:
    """Replace the tensors of a folder."""
    weights = {name: w.contiguous().clone() for name, w in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


def change_config(folder: Path, **entries) -> Path:
    """Change entries of ``config.json``; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | entries
    kept = {name: v for name, v in values.items() if v is not None}
    path.write_text(json.dumps(kept))
    return folder


# --- In: every family, every kind of file ---------------------------------


def assert_same(model, reference):
    theirs = their_logits(reference)
    assert theirs.std() > 0.3  # a comparison of zeros would prove nothing
    assert apart(model, reference) <= 1e-11
    tied = reference.lm_head.weight is reference.shared.weight
    assert (model.head.weight is model.dec_emb.weight) == tied
    assert model.enc_emb is model.dec_emb and not model.training
    assert not any(w.is_meta for w in model.state_dict().values())
    mine = sum(w.numel() for w in model.parameters())
    assert mine == sum(w.numel() for w in reference.parameters())


def test_safetensors(original):
    reference, folder = original
    assert_same(T5.from_pretrained(folder), reference)


def test_a_path_may_be_text_or_a_file(originals):
    reference, folder = originals["t5-v1_1"]
    assert_same(T5.from_pretrained(str(folder)), reference)
    assert_same(T5.from_pretrained(folder / "model.safetensors"), reference)


def test_sharded_safetensors(originals, tmp_path):
    reference = originals["t5-v1_1"][0]
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(T5.from_pretrained(tmp_path), reference)
    index = tmp_path / "model.safetensors.index.json"
    assert_same(T5.from_pretrained(index), reference)


def test_bin(original, tmp_path):
    """As ``transformers`` 4 wrote them: with all copies of the table."""
    reference, folder = original
    shutil.copy(folder / "config.json", tmp_path)
    weights = reference.state_dict()
    assert set(COPIES) < set(weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same(T5.from_pretrained(tmp_path), reference)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before 2020"])
def test_one_bin(originals, tmp_path, archive):
    reference, folder = originals["t5-v1_1"]
    shutil.copy(folder / "config.json", tmp_path)
    options = {"_use_new_zipfile_serialization": archive}
    file = tmp_path / "weights.bin"
    torch.save(reference.state_dict(), file, **options)
    assert_same(T5.from_pretrained(file), reference)


def test_sharded_bin(originals, tmp_path):
    reference, folder = originals["t5-v1_1"]
    shutil.copy(folder / "config.json", tmp_path)
    places = {}
    items = list(reference.state_dict().items())
    for k in range(3):
        name = f"pytorch_model-0000{k + 1}-of-00003.bin"
        torch.save(dict(items[k::3]), tmp_path / name)
        places |= dict.fromkeys(dict(items[k::3]), name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(T5.from_pretrained(tmp_path), reference)


def test_safetensors_come_before_bin(copy):
    folder, _ = copy
    torch.save({"nonsense": torch.ones(1)}, folder / "pytorch_model.bin")
    T5.from_pretrained(folder)


def test_configuration_is_read(originals):
    config = load_pretrained(originals["flan-t5"][1]).config
    assert config == T5Config(
        dim=32, enc_num_tokens=64, enc_depth=3, enc_heads=3, enc_dim_head=8,
        enc_mlp_mult=1.5, dec_num_tokens=64, dec_depth=2, dec_heads=3,
        dec_dim_head=8, dec_mlp_mult=1.5, dropout=0.05, tie_head=False,
        scale_logits=False, feed_forward="gated-gelu",
    )  # fmt: skip
    config = load_pretrained(originals["umt5"][1]).config
    assert config.bias_per_layer and config.dropout == 0.1


def test_entries_that_may_be_missing(copy):
    folder, _ = copy
    wanted = T5.from_pretrained(folder).config
    names = ["decoder_start_token_id", "feed_forward_proj", "eos_token_id",
             "relative_attention_num_buckets", "layer_norm_epsilon",
             "relative_attention_max_distance", "dropout_rate", "dtype",
             "scale_decoder_outputs", "tie_word_embeddings"]  # fmt: skip
    change_config(folder, **dict.fromkeys(names))
    assert T5.from_pretrained(folder).config == wanted


def test_other_special_ids_and_buckets(tmp_path):
    reference = make_reference("t5")
    ids = dict(pad_token_id=3, eos_token_id=4, decoder_start_token_id=5)
    sizes = dict(relative_attention_num_buckets=8,
                 relative_attention_max_distance=9)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.T5Config(**SIZES | ids | sizes)
    reference = transformers.T5ForConditionalGeneration(config).eval()
    for name, weight in reference.named_parameters():
        if "relative_attention_bias" in name:
            weight.data.normal_()
    reference.save_pretrained(tmp_path)
    model = T5.from_pretrained(tmp_path)
    assert_same(model, reference)
    config = model.config
    assert (config.pad_id, config.eos_id, config.start_id) == (3, 4, 5)


@pytest.mark.parametrize("family", ["t5", "byt5", "umt5"])
def test_generates_the_same(originals, family):
    reference, folder = originals[family]
    src, _, mask = inputs()
    model = wide(T5.from_pretrained(folder))
    ours = model.generate(src, mask, max_new_tokens=9)
    theirs = wide(reference).generate(
        src, attention_mask=mask.long(), max_new_tokens=9, do_sample=False
    )
    assert torch.equal(ours, theirs[:, 1:])


# --- The tensors decide ---------------------------------------------------


@pytest.mark.parametrize("word", [True, False, None])
@pytest.mark.parametrize("family", ["t5", "t5-v1_1", "mt5", "umt5"])
def test_the_word_of_the_configuration_does_not_count(
    originals, tmp_path, family, word
):
    reference, folder = originals[family]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change_config(
        tmp_path, tie_word_embeddings=word, scale_decoder_outputs=None
    )
    model = T5.from_pretrained(tmp_path)
    assert_same(model, reference)
    assert model.config.tie_head == model.config.scale_logits
    assert model.config.tie_head == (family == "t5")


def test_an_equal_head_is_tied(copy):
    folder, weights = copy
    T5.from_pretrained(write(folder, weights | {HEAD: weights[TABLE]}))
    model = T5.from_pretrained(folder)
    assert model.head.weight is model.enc_emb.weight
    head = weights[TABLE].clone()
    head[7, 3] += 1e-3
    model = T5.from_pretrained(write(folder, weights | {HEAD: head}))
    assert not model.config.tie_head
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.enc_emb.weight, weights[TABLE])


@pytest.mark.parametrize("word", [True, False])
def test_scaling_where_the_tensors_leave_it_open(copy, word):
    """A tied model may be scaled or not; ``transformers`` writes which."""
    folder, weights = copy
    change_config(folder, scale_decoder_outputs=word)
    config = T5.from_pretrained(folder).config
    assert config.tie_head and config.scale_logits == word
    head = torch.randn_like(weights[TABLE])
    config = T5.from_pretrained(write(folder, weights | {HEAD: head})).config
    assert not config.tie_head and not config.scale_logits


def test_our_own_word_is_for_an_untied_head(originals, tmp_path):
    """What it says of a tied one, ``transformers`` would not know."""
    for family in ("t5", "t5-v1_1"):
        folder = shutil.copytree(originals[family][1], tmp_path / family)
        change_config(folder, scale_logits=family == "t5-v1_1",
                      scale_decoder_outputs=None)  # fmt: skip
        assert T5.from_pretrained(folder).config.scale_logits


def test_a_fresh_v1_1_of_transformers_5(tmp_path):
    """Tied by force, yet not scaled: its configuration says the latter."""
    torch.manual_seed(0)
    config = transformers.T5Config(**SIZES | UNTIED)
    reference = transformers.T5ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    model = T5.from_pretrained(tmp_path)
    assert model.config.tie_head and not model.config.scale_logits
    assert apart(model, reference) <= 1e-11


def test_a_tied_mt5_is_not_scaled(tmp_path):
    """``transformers`` 5.23 ties each fresh one, and never scales."""
    torch.manual_seed(0)
    config = transformers.MT5Config(**SIZES)
    reference = transformers.MT5ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    model = T5.from_pretrained(tmp_path)
    assert model.config.tie_head and not model.config.scale_logits
    assert apart(model, reference) <= 1e-11
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert apart(model, again) <= 1e-11


@pytest.mark.parametrize("name", [STALE, *COPIES])
def test_tolerated(copy, originals, name):
    folder, weights = copy
    table = weights[TABLE] if name in COPIES else torch.randn(32, 4)
    model = T5.from_pretrained(write(folder, weights | {name: table}))
    assert_same(model, originals["t5"][0])


@pytest.mark.parametrize("names", [COPIES, COPIES[:1], COPIES[1:]])
@pytest.mark.parametrize("family", ["t5", "t5-v1_1"])
def test_a_table_under_other_names(originals, tmp_path, family, names):
    reference, folder = originals[family]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    write(tmp_path, weights | dict.fromkeys(names, weights.pop(TABLE)))
    assert TABLE not in safetensors.torch.load_file(file)
    assert_same(T5.from_pretrained(tmp_path), reference)


def test_biases_are_decided_by_the_tensors(originals, tmp_path):
    """A UMT5 that calls itself T5, and the other way round."""
    for family, word in (("umt5", "t5"), ("t5-v1_1", "umt5")):
        reference, folder = originals[family]
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        change_config(tmp_path, model_type=word, **GATED)
        model = T5.from_pretrained(tmp_path)
        assert model.config.bias_per_layer == (family == "umt5")
        assert apart(model, reference) <= 1e-11


# --- Types, places, memory ------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(originals, dtype):
    reference, folder = originals["t5"]
    model = T5.from_pretrained(folder, dtype=dtype)
    assert {w.dtype for w in model.parameters()} == {dtype}
    wanted = reference.shared.weight.to(dtype)
    assert torch.equal(model.enc_emb.weight, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_the_file_stays(copy, dtype):
    folder, weights = copy
    narrow = {name: w.to(dtype) for name, w in weights.items()}
    model = T5.from_pretrained(write(folder, narrow))
    assert {w.dtype for w in model.parameters()} == {dtype}
    assert our_logits(model).dtype == dtype


def test_mixed_types_become_the_widest(copy):
    """Some files keep ``wo`` in float32 beside float16."""
    folder, weights = copy
    mixed = {
        name: w if ".wo." in name else w.half() for name, w in weights.items()
    }
    model = T5.from_pretrained(write(folder, mixed))
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    assert our_logits(model).isfinite().all()


def test_mixed_types_are_converted_one_by_one(copy, monkeypatch):
    """So that there is one copy of the weights, and not two."""
    folder, weights = copy
    write(folder, {n: w if ".wo." in n else w.half() for n, w in weights.items()})
    convert, seen, alive = torch.Tensor.to, [], []

    def noted(tensor, *where):
        if where == (torch.float32,) and tensor.dtype == torch.float16:
            alive.append(sum(old() is not None for old in seen))
            seen.append(weakref.ref(tensor))
        return convert(tensor, *where)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    T5.from_pretrained(folder)
    assert len(alive) > 30 and max(alive) <= 1


def test_device(originals):
    folder = originals["t5"][1]
    with torch.device("meta"):
        model = T5.from_pretrained(folder)
        assert all(w.is_meta for w in model.parameters())
        model = T5.from_pretrained(folder, device="cpu")
    assert all(w.device.type == "cpu" for w in model.parameters())


def test_no_random_number_is_drawn(originals):
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    T5.from_pretrained(originals["t5-v1_1"][1])
    assert torch.equal(torch.rand(1), wanted)


def watch_reads(monkeypatch):
    """Note where each tensor is read to, and how many are alive by then."""
    places, alive, reads = [], [], []
    open_file = pretrained._open

    def watched(read):
        alive.append(sum(r() is not None for r in reads))
        tensor = read()
        places.append(tensor.data_ptr())
        reads.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(pretrained, "_open", lambda file: {
        name: lambda read=read: watched(read)
        for name, read in open_file(file).items()
    })  # fmt: skip
    return places, alive


def test_what_is_read_becomes_the_parameter(originals, monkeypatch):
    """One copy: no tensor is copied after it was read."""
    places, _ = watch_reads(monkeypatch)
    model = T5.from_pretrained(originals["t5-v1_1"][1])
    ours = [w.data_ptr() for w in model.parameters()]
    assert sorted(ours) == sorted(places) and len(set(places)) > 50


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_each_is_converted_before_the_next_is_read(
    originals, tmp_path, monkeypatch, kind
):
    reference, folder = originals["t5-v1_1"]
    if kind == "bin":
        shutil.copy(folder / "config.json", tmp_path)
        torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
        folder = tmp_path
    _, alive = watch_reads(monkeypatch)
    T5.from_pretrained(folder, dtype=torch.bfloat16)
    assert len(alive) > 50 and max(alive) <= 1


def test_it_can_be_trained(originals):
    """Tied weights stay one parameter."""
    model = T5.from_pretrained(originals["t5"][1]).train()
    src, tgt, mask = inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.loss(src, tgt, mask)
    before.backward()
    optimizer.step()
    assert model.loss(src, tgt, mask) < before
    assert torch.equal(model.head.weight, model.enc_emb.weight)


def test_the_file_may_go(copy):
    """The weights are in memory, not in the file."""
    folder, weights = copy
    model = T5.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"0" * 100_000)
    assert torch.equal(model.enc_emb.weight, weights[TABLE])


def test_a_class_of_ones_own(originals):
    class Mine(T5):
        pass

    assert type(Mine.from_pretrained(originals["t5"][1])) is Mine


# --- Out ------------------------------------------------------------------


def test_transformers_opens_what_we_save(original, tmp_path):
    reference, folder = original
    T5.from_pretrained(folder).save_pretrained(tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    umt5 = reference.config.model_type == "umt5"
    kind = "UMT5" if umt5 else "T5"
    assert type(theirs).__name__ == f"{kind}ForConditionalGeneration"
    assert theirs.dtype == torch.float32
    for name, weight in reference.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    theirs, reference = wide(theirs), wide(reference)
    assert difference(their_logits(theirs), their_logits(reference)) <= 1e-11
    src, _, mask = inputs()
    options = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(
        theirs.generate(src, attention_mask=mask.long(), **options),
        reference.generate(src, attention_mask=mask.long(), **options),
    )


def test_round_trip_is_equal_to_the_byte(original, tmp_path):
    T5.from_pretrained(original[1]).save_pretrained(tmp_path / "a")
    T5.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        first = (tmp_path / "a" / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == first
    with safetensors.safe_open(tmp_path / "a/model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


OURS = dict(
    dim=24, enc_num_tokens=40, enc_depth=2, enc_heads=2, enc_dim_head=8,
    enc_mlp_mult=8 / 3, dec_num_tokens=40, dec_depth=3, dec_heads=2,
    dec_dim_head=8, dec_mlp_mult=8 / 3,
)  # fmt: skip


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("per_layer", [True, False])
def test_every_configuration_comes_back(tmp_path, tie, scale, per_layer):
    torch.manual_seed(0)
    gated = tie == per_layer
    choices = dict(
        tie_head=tie, scale_logits=scale,
        feed_forward="gated-gelu" if gated else "relu",
        bias_per_layer=per_layer, dropout=0.2, num_buckets=16,
        max_distance=40, pad_id=3, eos_id=5, start_id=7,
    )  # fmt: skip
    model = T5(**OURS | choices).eval()
    model.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path)
    assert again.config == model.config
    entries = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert entries["tie_word_embeddings"] is tie  # transformers 4 obeys it
    src, tgt, mask = inputs()
    src, tgt = src % 40, tgt % 40
    with torch.no_grad():
        logits = wide(model)(src, tgt, mask)
        assert difference(wide(again)(src, tgt, mask), logits) <= 1e-11
        theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
        theirs = wide(theirs)(
            input_ids=src, attention_mask=mask.long(), decoder_input_ids=tgt
        ).logits
    if per_layer and not scale:  # UMT5 is always scaled there
        theirs = theirs * 24**0.5
    assert difference(logits, theirs) <= 1e-11


@pytest.mark.parametrize("per_layer", [True, False])
def test_one_block_a_side(tmp_path, per_layer):
    sizes = OURS | dict(enc_depth=1, dec_depth=1, bias_per_layer=per_layer)
    T5(**sizes).save_pretrained(tmp_path)
    assert T5.from_pretrained(tmp_path).config == T5Config(**sizes)


def test_dtype_is_written(tmp_path):
    T5(**OURS).bfloat16().save_pretrained(tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dec_heads": 3}, "num_heads 2 and 3"),
        ({"dec_dim_head": 4}, "d_kv 8 and 4"),
        ({"dec_mlp_mult": 2}, "d_ff 64 and 48"),
        (
            {"dec_num_tokens": 30, "tie_token_emb": False},
            "two embedding tables, vocab_size 40 and 30",
        ),
        ({"tie_token_emb": False}, "two embedding tables"),
    ],
)
def test_what_the_format_cannot_say(tmp_path, wrong, message):
    model = T5(**OURS | wrong)
    with pytest.raises(ValueError, match=f"no T5 with {message}; keep"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_without_numbers(tmp_path):
    with torch.device("meta"):
        model = T5(**OURS)
    with pytest.raises(Exception, match="meta"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["save_file", "json"])
def test_a_crash_costs_nothing(tmp_path, monkeypatch, place):
    T5(**OURS).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"config.json", "model.safetensors"}

    def fail(*arguments):
        Path(arguments[place == "save_file"]).write_bytes(b"half")
        raise OSError("no space left on device")

    if place == "save_file":
        monkeypatch.setattr(pretrained, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space"):
        T5(**OURS | {"dim": 16}).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_old_file_is_replaced_not_overwritten(tmp_path):
    """A reader that has it open goes on reading the old one."""
    T5(**OURS).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        before = (tmp_path / name).read_bytes()
        with (tmp_path / name).open("rb") as old:
            T5(**OURS | {"enc_depth": 1}).save_pretrained(tmp_path)
            assert old.read() == before
        assert (tmp_path / name).read_bytes() != before
        T5(**OURS).save_pretrained(tmp_path)


# --- The released sizes ---------------------------------------------------


SMALL = [name for name in PRESETS if name.endswith("small")]


@pytest.mark.parametrize("name", SMALL)
def test_names_and_shapes_of_the_small_presets(name, monkeypatch):
    """Ours, in their names, are what ``transformers`` would load.

    tests/test_t5.py counts the parameters of all 29.
    """
    for init in ("normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, init, lambda tensor, *_, **__: tensor)
    with torch.device("meta"):
        model = T5(**PRESETS[name])
        entries = pretrained._entries(model.config)
        kind = "MT5" if name.startswith("mt5") else entries["model_type"].upper()
        config = getattr(transformers, f"{kind}Config")(**entries)
        make = getattr(transformers, f"{kind}ForConditionalGeneration")
        theirs = make(config).state_dict()
    for copied in COPIES + [HEAD] * model.config.tie_head:
        del theirs[copied]
    ours = {
        released_name(n): w.shape for n, w in model.named_parameters()
    }
    assert ours == {n: w.shape for n, w in theirs.items()}


def test_t5_small_has_its_published_count():
    with torch.device("meta"):
        model = T5(**PRESETS["t5-small"])
    assert sum(w.numel() for w in model.parameters()) == 60_506_624


# --- Clear errors ---------------------------------------------------------


def test_all_that_does_not_fit_is_named(copy):
    folder, weights = copy
    norm = "encoder.final_layer_norm.weight"
    gone = "decoder.block.1.layer.2.DenseReluDense.wi.weight"
    del weights[gone]
    weights |= {norm: torch.ones(31), "classifier.bias": torch.ones(2)}
    with pytest.raises(ValueError) as caught:
        T5.from_pretrained(write(folder, weights))
    head, *lines = str(caught.value).splitlines()
    assert head == f"3 tensors in {folder} do not fit config.json:"
    assert lines == [
        f"{gone} is missing",
        "classifier.bias is surplus",
        f"{norm} has shape (31,), not (32,)",
    ]


def test_names_with_a_prefix_are_shown(copy):
    """As when all weights were saved from a wrapper such as DDP."""
    folder, weights = copy
    write(folder, {f"module.{name}": w for name, w in weights.items()})
    with pytest.raises(ValueError, match="do not fit config.json") as error:
        T5.from_pretrained(folder)
    assert "\nmodule.decoder.block.0" in str(error.value)
    assert "\nshared.weight is missing" in str(error.value)


def test_a_bias_without_a_block(copy):
    folder, weights = copy
    weights["relative_attention_bias.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match="bias.weight is surplus"):
        T5.from_pretrained(write(folder, weights))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", torch.int64, torch.complex64, torch.float8_e4m3fn]
)
def test_a_type_that_weights_cannot_have(copy, dtype):
    with pytest.raises(ValueError, match="dtype is .*pass .*torch.bfloat16"):
        T5.from_pretrained(copy[0], dtype=dtype)


def test_a_model_that_outgrew_its_configuration(tmp_path):
    model = T5(**OURS)
    model.enc_emb = model.dec_emb = nn.Embedding(48, 24)
    model.head.weight = model.enc_emb.weight
    with pytest.raises(ValueError, match=r"shared.weight has shape \(48, 24\)"):
        model.save_pretrained(tmp_path / "new")
    model = T5(**OURS)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight is surplus"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_long_list_is_cut(copy):
    folder, weights = copy
    few = {TABLE: weights[TABLE]}
    with pytest.raises(ValueError, match=f"{len(weights) - 1} tensors") as e:
        T5.from_pretrained(write(folder, few))
    assert len(str(e.value).splitlines()) == 22
    assert str(e.value).endswith("\n...")


def test_an_encoder_alone_is_no_t5(copy):
    folder, weights = copy
    part = {n: w for n, w in weights.items() if "decoder" not in n}
    with pytest.raises(ValueError, match="decoder.block.0.* is missing"):
        T5.from_pretrained(write(folder, part))


def test_a_missing_table(copy):
    folder, weights = copy
    weights[HEAD] = weights.pop(TABLE)
    with pytest.raises(ValueError, match="shared.weight is missing"):
        T5.from_pretrained(write(folder, weights))


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_is_none(copy, name):
    folder, weights = copy
    other = weights | {name: weights[TABLE] + 1}
    with pytest.raises(ValueError, match=f"{name} is surplus"):
        T5.from_pretrained(write(folder, other))


def test_two_tables_without_a_shared_one(copy):
    folder, weights = copy
    table = weights.pop(TABLE)
    weights |= {COPIES[0]: table, COPIES[1]: table + 1}
    with pytest.raises(ValueError, match=f"{COPIES[1]} is surplus"):
        T5.from_pretrained(write(folder, weights))


def test_a_missing_bias_of_umt5(originals, tmp_path):
    folder = shutil.copytree(originals["umt5"][1], tmp_path / "copy")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    gone = next(n for n in weights if "block.1" in n and "_bias" in n)
    del weights[gone]
    with pytest.raises(ValueError, match=f"{gone} is missing"):
        T5.from_pretrained(write(folder, weights))


def test_quantised_weights(copy):
    folder, weights = copy
    weights[TABLE] = weights[TABLE].to(torch.int8)
    with pytest.raises(ValueError, match="shared.weight is torch.int8"):
        T5.from_pretrained(write(folder, weights))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"model_type": "bart"}, "model_type 'bart'.* loads 't5', 'mt5'"),
        ({"model_type": "longt5"}, "model_type 'longt5'"),
        ({"model_type": None}, "model_type None"),
        ({"feed_forward_proj": "gated-silu"}, "'gated-silu'; pass 'relu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05"),
        ({"d_model": None}, "config.json lacks d_model$"),
        ({"vocab_size": None, "d_kv": None}, "lacks d_kv, vocab_size$"),
    ],
)
def test_configurations_of_others(copy, entries, message):
    with pytest.raises(ValueError, match=message):
        T5.from_pretrained(change_config(copy[0], **entries))


def test_files_that_are_not_there(copy, tmp_path):
    folder, _ = copy
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(FileNotFoundError, match="config.json"):
        T5.from_pretrained(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no .*model"):
        T5.from_pretrained(empty)


def test_a_json_file_that_is_no_index(copy):
    folder, _ = copy
    with pytest.raises(ValueError, match="config.json is no index of shards"):
        T5.from_pretrained(folder / "config.json")


def test_a_shard_that_is_not_there(originals, tmp_path):
    originals["t5"][0].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*"))[2]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        T5.from_pretrained(tmp_path)


@pytest.mark.parametrize("data", [b"", b"no file", b"\x80\x02broken"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files(copy, name, data):
    folder, _ = copy
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        T5.from_pretrained(folder)


def test_half_a_download(copy):
    folder, weights = copy
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        T5.from_pretrained(folder)
    file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        T5.from_pretrained(folder)


class Trap:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "caught")


@pytest.mark.parametrize("kind", ["archive", "old", "bare"])
def test_no_pickle_is_run(copy, tmp_path, kind):
    folder, weights = copy
    (folder / "model.safetensors").unlink()
    file, trap = folder / "pytorch_model.bin", Trap(tmp_path / "harm")
    if kind == "bare":
        file.write_bytes(pickle.dumps({TABLE: trap}, protocol=2))
    else:
        options = {"_use_new_zipfile_serialization": kind == "archive"}
        torch.save(weights | {"trap": trap}, file, **options)
    with pytest.raises(ValueError, match="nothing in it was run"):
        T5.from_pretrained(folder)
    assert b"write_text" in file.read_bytes()  # the trap is set
    assert not trap.path.exists()


@pytest.mark.parametrize("held", [[torch.ones(2)], {"n": 3}, torch.ones(2)])
def test_a_bin_of_other_things(copy, held):
    folder, _ = copy
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        T5.from_pretrained(folder)


# --- The hub --------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, originals, tmp_path):
    """A hub with models of two names, one of them in old files alone."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        folder = tmp_path / name.replace("/", "--")
        folder.mkdir(exist_ok=True)
        source = stored[name]
        for pattern in allow_patterns:
            for file in source.glob(pattern):
                shutil.copy(file, folder)
        return str(folder)

    old = shutil.copytree(originals["t5"][1], tmp_path / "stored")
    torch.save(
        originals["t5"][0].state_dict(), old / "pytorch_model.bin"
    )
    (old / "model.safetensors").unlink()
    new = shutil.copytree(originals["t5"][1], tmp_path / "new")
    (new / "pytorch_model.bin").write_bytes(b"large")
    (new / "model.fp16.safetensors").write_bytes(b"large")
    (new / "README.md").write_text("words")
    stored = {"google/new": new, "old": old}
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", snapshot_download
    )
    return asked


def test_from_the_hub(hub, originals, tmp_path):
    model = T5.from_pretrained("google/new")
    assert_same(model, originals["t5"][0])
    fetched = {path.name for path in (tmp_path / "google--new").iterdir()}
    assert fetched == {"config.json", "model.safetensors"}
    assert len(hub) == 1


def test_old_files_from_the_hub(hub, originals):
    assert_same(T5.from_pretrained("old"), originals["t5"][0])
    assert len(hub) == 2 and "pytorch_model.bin" in hub[1][1]


def test_what_is_here_is_not_asked_for(hub, originals):
    T5.from_pretrained(originals["t5"][1])
    assert not hub
