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
from tests.conftest import refuses

LINES = ["the cats chase the mice and the mice chase the cats"]
SAFE, OLD = "model.safetensors", "pytorch_model.bin"
SHARDS = ["1.safetensors", "2.safetensors"]


def write(folder: Path, name: str, **values) -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


# --- Finding files --------------------------------------------------------


@pytest.mark.parametrize(
    "files, found",
    [
        ([SAFE], [SAFE]),
        ([OLD], [OLD]),
        ([OLD, SAFE], [SAFE]),
        ([f"{OLD}.index.json", SAFE], [SAFE]),
        ([f"{SAFE}.index.json"], SHARDS),
        ([f"{SAFE}.index.json", SAFE], [SAFE]),
        ([f"{SAFE}.index.json", OLD], SHARDS),
    ],
)
def test_which_weights_are_found(tmp_path, files, found):
    for name in files:
        write(tmp_path, name, weight_map={"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]})
        if not name.endswith("json"):
            assert find_weights(tmp_path / name) == [tmp_path / name]
    assert find_weights(tmp_path) == [tmp_path / name for name in found]


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path, str(tmp_path), "~"):
        assert find_release(path, "config.json") == tmp_path
    refuses(lambda: find_weights(tmp_path), tmp_path, SAFE, OLD, error=FileNotFoundError)
    for path in ("./no", "/no/such", "~/no", "no/such/model", "a b", Path("no/x")):
        refuses(lambda: find_release(path), path, error=FileNotFoundError)


def test_what_is_no_index(tmp_path):
    index = tmp_path / f"{SAFE}.index.json"
    places = ("../x", "/etc/passwd", "..", ".", "", "a/b", "a/")
    texts = [json.dumps({"weight_map": {"a": place}}) for place in places]
    texts += ["", "{", "[" * 100_000, "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}']
    for text in texts:
        index.write_text(text)
        refuses(lambda: find_weights(tmp_path), index)


# --- The hub --------------------------------------------------------------


def test_from_the_hub(monkeypatch, tmp_path):
    """Only what is needed is fetched, and nothing that is here, or would be."""
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
    refuses(lambda: find_release(Path("google/new")), "google/new", error=FileNotFoundError)
    for name, weights in (("google/new", SAFE), ("old", OLD)):
        folder = tmp_path / "cache" / name
        assert find_weights(name) == [folder / weights]
        assert {path.name for path in folder.iterdir()} == {"config.json", weights}
        assert find_weights(folder) == [folder / weights]
    assert [name for name, _ in asked] == ["google/new", "old", "old"]
    assert [OLD in patterns for _, patterns in asked] == [False, False, True]
    refuses(lambda: load_tokenizer("google/new"), "spiece.model")
    names = ["config.json", "tokenizer_config.json", "spiece.model"]
    assert asked[3:] == [("google/new", names)]


def test_what_the_hub_says(monkeypatch):
    says = {
        errors.RepositoryNotFoundError: FileNotFoundError,
        errors.GatedRepoError: FileNotFoundError,
        errors.HFValidationError: FileNotFoundError,
        errors.LocalEntryNotFoundError: ConnectionError,
    }
    for raised, wanted in says.items():

        def snapshot_download(*arguments, raised=raised, **options):
            raise raised.__new__(raised)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        refuses(lambda: find_release("google/t6", "config.json"), "google/t6", error=wanted)


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
    words = "google/flan-t5-small", "pip install huggingface_hub"
    refuses(lambda: find_release("google/flan-t5-small"), *words, error=ImportError)
    source = Path(hub.__file__).read_text("utf-8")
    assert not re.search("^(import|from) huggingface_hub", source, re.MULTILINE)


# --- Tokenizers -----------------------------------------------------------


def test_a_byt5(tmp_path):
    """Ours is known by its size, that of ``transformers`` by its class."""
    write(tmp_path, "config.json", vocab_size=384)
    for path in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        loaded = load_tokenizer(path)
        assert isinstance(loaded, ByteTokenizer) and loaded.extra_ids == 11
    write(tmp_path, "config.json", vocab_size=32128)
    refuses(lambda: load_tokenizer(tmp_path), tmp_path, "spiece.model")
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_a_vocabulary(tmp_path):
    file = tmp_path / "spiece.model"
    Tokenizer.train(LINES, 15, extra_ids=10).save(file)  # the file of our own says 10
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 25 and loaded.sentinel(9) == 15
    plain = Tokenizer.train(LINES, 15)
    plain.save(file)
    for extra_ids in (None, 0, 300):  # UMT5 has 300
        if extra_ids is not None:
            write(tmp_path, "tokenizer_config.json", extra_ids=extra_ids)
        loaded = load_tokenizer(tmp_path)
        wanted = 100 if extra_ids is None else extra_ids
        assert isinstance(loaded, Tokenizer) and loaded.extra_ids == wanted
        assert loaded.vocab_size == 15 + wanted
    for extra_ids in (2000, 10**7, -1, "100", 1.5):
        write(tmp_path, "tokenizer_config.json", extra_ids=extra_ids)
        refuses(lambda: load_tokenizer(tmp_path), repr(extra_ids))
    # mT5's sentinels are in the file; its configuration asks for none on top.
    file.write_bytes(plain._processor.serialized_model_proto())
    loaded = load_tokenizer(write(tmp_path, "tokenizer_config.json", extra_ids=0))
    assert loaded.vocab_size == 115
    assert loaded.sentinel(99) == plain.sentinel(99) == 15


def test_damaged_settings(tmp_path):
    for name in ("tokenizer_config.json", "config.json"):
        for text in ("", "{", "[1]", "null"):
            (tmp_path / name).write_text(text)
            refuses(lambda: load_tokenizer(tmp_path), tmp_path / name)
        (tmp_path / name).unlink()
