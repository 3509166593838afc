"""Finding a released model's files, here or on the hub; its tokenizer."""

import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from transformers import ByT5Tokenizer

from t5_book import ByteTokenizer, Tokenizer, hub, load_tokenizer
from t5_book.hub import find_release, find_weights

LINES = ["the cats chase the mice and the mice chase the cats"]
SAFE, OLD = "model.safetensors", "pytorch_model.bin"


def write(folder: Path, name: str, **values) -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


# --- Finding files --------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_here_is_found(tmp_path, kind):
    assert find_release(kind(tmp_path), "config.json") == tmp_path


@pytest.mark.parametrize(
    "path", ["./no", "/no/such", "~/no", "no/such/model", "a b", Path("no/x")]
)
def test_paths_that_lead_nowhere(path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        find_release(path)


@pytest.mark.parametrize(
    "files, found",
    [
        ([SAFE], [SAFE]),
        ([OLD], [OLD]),
        ([OLD, SAFE], [SAFE]),
        ([f"{OLD}.index.json", SAFE], [SAFE]),
        ([f"{SAFE}.index.json"], ["1.safetensors", "2.safetensors"]),
        ([f"{SAFE}.index.json", SAFE], [SAFE]),
        ([f"{SAFE}.index.json", OLD], ["1.safetensors", "2.safetensors"]),
    ],
)
def test_which_weights_are_found(tmp_path, files, found):
    for name in files:
        places = {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
        write(tmp_path, name, weight_map=places)
    assert find_weights(tmp_path) == [tmp_path / name for name in found]
    for name in files:
        if not name.endswith("json"):
            assert find_weights(tmp_path / name) == [tmp_path / name]


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*{SAFE}.*{OLD}"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000]
    + [
        json.dumps({"weight_map": {"a": place}})
        for place in ("../x", "/etc/passwd", "..", ".", "", "a/b", "a/")
    ],
)
def test_what_is_no_index(tmp_path, text):
    index = tmp_path / f"{SAFE}.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(index))):
        find_weights(tmp_path)


# --- The hub --------------------------------------------------------------


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A hub with two models; what is asked of it is noted."""
    asked, stored = [], tmp_path / "stored"
    for name, weights in (("google/new", SAFE), ("old", OLD)):
        (stored / name).mkdir(parents=True)
        for file in ("config.json", "README.md", "model.fp16.safetensors", weights):
            (stored / name / file).write_text("{}")

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        folder = tmp_path / "cache" / name
        folder.mkdir(exist_ok=True, parents=True)
        for pattern in allow_patterns:
            for file in (stored / name).glob(pattern):
                (folder / file.name).write_bytes(file.read_bytes())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_from_the_hub(store, tmp_path):
    assert find_weights("google/new") == [tmp_path / "cache/google/new" / SAFE]
    fetched = {path.name for path in (tmp_path / "cache/google/new").iterdir()}
    assert fetched == {"config.json", SAFE} and len(store) == 1


def test_old_files_from_the_hub(store, tmp_path):
    assert find_weights("old") == [tmp_path / "cache/old" / OLD]
    assert [OLD in patterns for _, patterns in store] == [False, True]
    fetched = {path.name for path in (tmp_path / "cache/old").iterdir()}
    assert fetched == {"config.json", OLD}


def test_what_is_here_is_not_asked_for(store, tmp_path):
    (tmp_path / SAFE).touch()
    find_weights(tmp_path)
    assert not store


@pytest.mark.parametrize(
    "raised, wanted",
    [
        (errors.RepositoryNotFoundError, FileNotFoundError),
        (errors.GatedRepoError, FileNotFoundError),
        (errors.HFValidationError, FileNotFoundError),
        (errors.LocalEntryNotFoundError, ConnectionError),
    ],
)
def test_what_the_hub_says(monkeypatch, raised, wanted):
    def snapshot_download(*arguments, **options):
        raise raised.__new__(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(wanted, match="google/t6"):
        find_release("google/t6", "config.json")


def test_offline_on_purpose(tmp_path):
    """The real library, told not to ask, in a process of its own."""
    code = "from t5_book.hub import find_release; find_release('google/t5')"
    places = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | places, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ConnectionError") and "google/t5" in last


def test_without_huggingface_hub(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        find_release("google/flan-t5-small")
    source = Path(hub.__file__).read_text("utf-8")
    assert not re.search("^(import|from) huggingface_hub", source, re.MULTILINE)


# --- Tokenizers -----------------------------------------------------------


def test_a_byt5(tmp_path):
    write(tmp_path, "config.json", vocab_size=384)
    for path in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        loaded = load_tokenizer(path)
        assert isinstance(loaded, ByteTokenizer) and loaded.extra_ids == 11


def test_a_byt5_tokenizer_of_transformers(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


@pytest.mark.parametrize("extra_ids", [None, 0, 300])
def test_a_vocabulary(tmp_path, extra_ids):
    """UMT5 has 300 sentinels; its ``tokenizer_config.json`` says so."""
    Tokenizer.train(LINES, 15).save(tmp_path / "spiece.model")
    write(tmp_path, "config.json", vocab_size=384)
    if extra_ids is not None:
        write(tmp_path, "tokenizer_config.json", extra_ids=extra_ids)
    loaded = load_tokenizer(tmp_path)
    wanted = 100 if extra_ids is None else extra_ids
    assert isinstance(loaded, Tokenizer) and loaded.extra_ids == wanted
    assert loaded.vocab_size == 15 + wanted


def test_a_vocabulary_of_our_own(tmp_path):
    """The file says how many sentinels it was saved with."""
    Tokenizer.train(LINES, 15, extra_ids=10).save(tmp_path / "spiece.model")
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 25 and loaded.sentinel(9) == 15


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*spiece.model"):
        load_tokenizer(write(tmp_path, "config.json", vocab_size=32128))


@pytest.mark.parametrize("extra_ids", [10**7, -1, "100", 1.5])
def test_numbers_of_sentinels_that_no_t5_has(tmp_path, extra_ids):
    Tokenizer.train(LINES, 15).save(tmp_path / "spiece.model")
    write(tmp_path, "tokenizer_config.json", extra_ids=extra_ids)
    with pytest.raises(ValueError, match=re.escape(repr(extra_ids))):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_damaged_settings(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        load_tokenizer(tmp_path)


def test_only_what_was_asked_for_is_fetched(store, tmp_path):
    with pytest.raises(ValueError, match="spiece.model"):
        load_tokenizer("google/new")
    names = ["config.json", "tokenizer_config.json", "spiece.model"]
    assert store == [("google/new", names)]


def test_a_vocabulary_with_its_sentinels(tmp_path):
    """As mT5's: its configuration asks for none on top."""
    plain = Tokenizer.train(LINES, 15)
    proto = plain._processor.serialized_model_proto()
    (tmp_path / "spiece.model").write_bytes(proto)
    text = json.dumps({"extra_ids": 0})
    (tmp_path / "tokenizer_config.json").write_text(text)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 115
    assert loaded.sentinel(99) == plain.sentinel(99) == 15


def test_the_package_needs_no_hub():
    source = Path(hub.__file__).read_text("utf-8")
    assert not re.search("^(import|from) huggingface_hub", source, re.M)
