"""Text to bytes and back: the tokenizer of ByT5.

Built in chapter 14, "Read bytes instead of words"
(chapters/byte_tokenizer.md). Edit the chapter, not this file.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from t5_book.tokenizer import Tokenizer

__all__ = [
    "ByteTokenizer",
    "find_release",
    "find_weights",
    "load_tokenizer",
]


class ByteTokenizer:
    """Turn text into the ids of its bytes, and ids into text, as ByT5 does.

    The methods are those of ``Tokenizer``, less ``train``, ``load`` and
    ``save``. A byte's id is its number plus 3, and sentinel ``k`` has the
    id ``258 - k``, as in ByT5's training.

    Args:
        extra_ids: number of sentinels; default 11, the number of bytes at
            the top that no text has. Fewer will do.
        multiple_of: what ``padded_vocab_size`` is a multiple of.

    Raises:
        ValueError: if there are more sentinels than free bytes.

    Built in chapter 14, "Read bytes instead of words" (Xue et al. 2021;
    seqio, ``vocabularies.py``; sentinels as t5's ``preprocessors.py``
    counts them).
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2
    vocab_size = 259  # the three above, and 256 bytes
    padded_vocab_size = Tokenizer.padded_vocab_size
    sentinel = Tokenizer.sentinel
    _check_ids = Tokenizer._check_ids

    def __init__(self, extra_ids: int = 11, multiple_of: int = 128):
        if not 0 <= extra_ids <= 11:
            raise ValueError(
                f"extra_ids is {extra_ids}; pass 0 to 11: the bytes below "
                "the 11 highest stand in texts"
            )
        self.extra_ids = extra_ids
        self.multiple_of = multiple_of

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids, without the eos.

        ``<extra_id_k>`` becomes the id of that sentinel; spaces beside it
        stay.

        Raises:
            TypeError: if ``text`` is not one ``str``.
            ValueError: if the text has a sentinel out of range, or half
                of a surrogate pair, which UTF-8 has no bytes for.
        """
        if not isinstance(text, str):
            raise TypeError(f"{type(text)} is no text; pass one str")
        parts = _SENTINEL.split(text) if self.extra_ids else [text]
        ids = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(self.sentinel(int(part)))
            else:
                ids.extend(byte + 3 for byte in part.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text; sentinels show, pad, eos and unk do not.

        Bytes that are no UTF-8 are left out.

        Args:
            ids: the ids of one text: a list, or a tensor with one axis.

        Raises:
            TypeError: if an id is not an integer.
            ValueError: if an id is out of range.
        """
        text = b""
        for i in self._check_ids(ids):
            if self._is_sentinel(i):
                text += self._name(i).encode()
            elif i > self.unk_id:
                text += bytes([i - 3])
        return text.decode(errors="ignore")

    def _is_sentinel(self, i: int) -> bool:
        return i >= self.vocab_size - self.extra_ids

    def _name(self, i: int) -> str:
        return f"<extra_id_{self.vocab_size - 1 - i}>"

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id; arguments as for ``decode``."""
        return [self._piece(i) for i in self._check_ids(ids)]

    def _piece(self, i: int) -> str:
        if i <= self.unk_id:
            return ("<pad>", "</s>", "<unk>")[i]
        if self._is_sentinel(i):
            return self._name(i)
        byte = i - 3
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"


_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]*)>")


def find_release(name_or_path: str | Path, *files: str) -> Path:
    """Find a released model, on this machine or on the hub.

    Args:
        name_or_path: a folder or a file here; or the name of a model on
            the hub, such as ``"google/flan-t5-small"``.
        files: names of the files to fetch from the hub; ``*`` fits all.

    Returns:
        The path itself, or the folder in which ``huggingface_hub`` keeps
        the files of that model; those that do not exist are not in it.

    Raises:
        FileNotFoundError: if it is neither here nor on the hub.
        ImportError: if ``huggingface_hub`` is not installed.
        ConnectionError: if the hub cannot be reached.

    Built in chapter 14, "Read bytes instead of words".
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    lost = f"there is no file or folder {name_or_path}"
    if isinstance(name_or_path, Path):
        raise FileNotFoundError(lost)
    return _download(name_or_path, files, lost)


def _download(name: str, files: Sequence[str], lost: str) -> Path:
    """Fetch files of a model from the hub; return their folder."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        hint = "to look for it on the hub, pip install huggingface_hub"
        raise ImportError(f"{lost}; {hint}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except errors.HFValidationError:  # such as "./model"
        raise FileNotFoundError(lost) from None
    except errors.RepositoryNotFoundError as error:
        hint = "or it is one for which you must log in: hf auth login"
        message = f"{lost}, and no such model on the hub, {hint}"
        raise FileNotFoundError(message) from error
    except errors.LocalEntryNotFoundError as error:
        message = f"{lost}, and the hub cannot be reached"
        raise ConnectionError(message) from error


def find_weights(name_or_path: str | Path) -> list[Path]:
    """Find the files with the weights, safetensors if there are any.

    ``name_or_path`` is as for ``find_release``, which may raise, too.
    FileNotFoundError or ValueError if there are no weights, or no index.
    Built in chapter 14, "Read bytes instead of words".
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        names = whole, f"{whole}.index.json", whole.replace(".", "-*.")
        path = find_release(name_or_path, "config.json", *names)
        found = [path, *(path / name for name in names)]
        if found := [file for file in found if file.is_file()]:
            break
    else:
        wrong = "no model.safetensors, no pytorch_model.bin, and no index"
        raise FileNotFoundError(f"{path} has {wrong} of shards")
    if found[0].suffix != ".json":
        return found[:1]
    shards = json.loads(found[0].read_text("utf-8")).get("weight_map")
    if not shards:
        raise ValueError(f"{found[0]} is no index of shards")
    return [found[0].with_name(name) for name in sorted({*shards.values()})]


def load_tokenizer(name_or_path: str | Path) -> Tokenizer | ByteTokenizer:
    """Load the tokenizer of a released T5.

    Args:
        name_or_path: a folder, or a name on the hub; see ``find_release``.

    Raises:
        ValueError: if there is no ``spiece.model``, and it is no ByT5.
        FileNotFoundError, ImportError, ConnectionError: as
            ``find_release``.

    Built in chapter 14, "Read bytes instead of words".
    """
    files = "config.json", "tokenizer_config.json", "spiece.model"
    folder = find_release(name_or_path, *files)
    values = {}
    for file in filter(Path.is_file, (folder / name for name in files[:2])):
        values |= json.loads(file.read_text("utf-8"))
    if (folder / files[2]).is_file():
        extra_ids = values.get("extra_ids", 100)
        return Tokenizer.load(folder / files[2], extra_ids=extra_ids)
    named = values.get("tokenizer_class") == "ByT5Tokenizer"
    if not (named or values.get("vocab_size") == 384):
        raise ValueError(f"{folder} has no spiece.model, and is no ByT5")
    return ByteTokenizer()
