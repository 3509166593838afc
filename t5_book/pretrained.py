"""Released weights in and out, in the files that transformers uses.

Built in chapter 15, "Released weights: loading T5, mT5, ByT5, UMT5 and
Flan-T5" (chapters/pretrained.md). Edit the chapter, not this file.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial, reduce
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from t5_book.byte_tokenizer import ByteTokenizer
from t5_book.checks import check_integer
from t5_book.config import T5Config
from t5_book.conversion import (
    logits_scaled,
    our_config,
    our_name,
    released_config,
    released_name,
)
from t5_book.hub import find_release, find_weights, parse_json
from t5_book.t5 import T5
from t5_book.tokenizer import Tokenizer

__all__ = ["load_pretrained", "load_tokenizer", "save_pretrained"]

# The types that weights can have, by their names in safetensors
FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def safetensors_header(tensors: dict, notes: dict[str, str] | None = None) -> bytes:
    """The beginning of a safetensors file, which says what is in it and where.

    Args:
        tensors: by name, in the order in which their numbers will follow;
            only their shapes and dtypes count.
        notes: texts to store with them; default: none.
    """
    dtypes = {dtype: name for name, dtype in FLOATS.items()}
    entries = {"__metadata__": notes} if notes else {}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = start + prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def load_tokenizer(name_or_path: str | Path) -> Tokenizer | ByteTokenizer:
    """Load the tokenizer of a released T5.

    Args:
        name_or_path: a folder, or a file in it; or a name on the hub.

    Raises:
        ValueError: if there is no ``spiece.model``, and it is no ByT5; if
            a file is damaged.
        FileNotFoundError, ImportError, ConnectionError: as
            ``find_release``.
    """
    options = "config.json", "tokenizer_config.json"
    folder = find_release(name_or_path, *options, "spiece.model")
    if folder.is_file():
        folder = folder.parent
    values = {}
    for name in options:
        file = folder / name
        if file.is_file():
            values |= parse_json(file.read_bytes(), file)
    vocabulary = folder / "spiece.model"
    if vocabulary.is_file():
        extra_ids = values.get("extra_ids", 100)
        check_integer(f"extra_ids in {folder}", extra_ids, 0)
        if extra_ids > 1000:  # T5 has 100, UMT5 300
            raise ValueError(f"{folder} asks for {extra_ids} sentinels; T5 has 100")
        return Tokenizer.load(vocabulary, extra_ids=extra_ids)
    is_byt5 = values.get("tokenizer_class") == "ByT5Tokenizer"
    if not is_byt5 and values.get("vocab_size") != 384:
        raise ValueError(f"{folder} has no spiece.model, and is no ByT5")
    return ByteTokenizer()


class StoredTensor(NamedTuple):
    """A tensor that has not been read yet, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str where it is no type that weights can have
    read: Callable[[], Tensor]


def stored_tensor(tensor: Tensor) -> StoredTensor:
    """A tensor in memory; reading it makes a copy."""
    tensor = tensor.detach()
    return StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.clone)


def open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file, and the notes in its header."""
    # "pread" reads from the open file, which may then be replaced by another.
    opened = safe_open(file, "pt", backend="pread")
    stored = {}
    for name in opened.keys():
        part = opened.get_slice(name)
        dtype = FLOATS.get(part.get_dtype(), part.get_dtype())
        read = partial(opened.get_tensor, name)
        stored[name] = StoredTensor(tuple(part.get_shape()), dtype, read)
    return stored, opened.metadata() or {}


def open_pickle(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file of ``torch.save``; no program in it is run."""
    is_archive = zipfile.is_zipfile(file)  # before 2020 they were none
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                # torch.save compresses nothing; what is compressed can grow.
                if part.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{part.filename} is compressed")
    held = torch.load(file, "cpu", weights_only=True, mmap=is_archive)
    stored = {}
    for name, tensor in held.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise TypeError(f"{name} is no plain tensor with numbers")
        stored[str(name)] = stored_tensor(tensor)
    return stored


TABLE = "shared.weight"
HEAD = "lm_head.weight"
# All names of the embedding; the best comes first.
TABLES = (TABLE, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)


def open_weights(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Open a file of weights: its tensors, not yet read, and its notes.

    Raises:
        ValueError: if the file is damaged, holds more than tensors, or is
            smaller than its tensors.
    """
    with naming_damage(file):
        if file.suffix == ".safetensors":
            stored, notes = open_safetensors(file)
        else:
            stored, notes = open_pickle(file), {}
    sizes = {name: number_of_bytes(tensor) for name, tensor in stored.items()}
    # Its four names may all be one table, which is in the file only once.
    promised = max([sizes.pop(name) for name in TABLES if name in sizes], default=0)
    promised += sum(sizes.values())
    size = file.stat().st_size
    if promised > size:
        raise ValueError(f"{file} has {size} bytes, but promises tensors of {promised}")
    return stored, notes


def number_of_bytes(tensor: StoredTensor) -> int:
    """The room that a tensor takes; 0 if its type is one that is refused anyway."""
    if tensor.dtype not in FLOATS.values():
        return 0
    return prod(tensor.shape) * tensor.dtype.itemsize


@contextmanager
def naming_damage(file: Path):
    """Turn what damaged files raise into a ValueError with the file's name."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged files break in many ways
        raise ValueError(
            f"{file} is damaged, or holds more than tensors; nothing in it was run "
            f"({type(error).__name__})"
        ) from None


def open_shards(files: list[Path]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Open all files of a release, as ``open_weights`` does one.

    Raises:
        ValueError: as ``open_weights``, and if two files contradict each
            other.
    """
    stored, notes = {}, {}
    for file in files:
        found, notes = open_weights(file)
        for name in sorted(found.keys() & stored.keys()):
            if not same_numbers(found[name], stored[name]):
                raise ValueError(f"{name} in {file} is not what another shard says")
        stored.update(found)
    return stored, notes


def same_numbers(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal; reads them only if their shapes are."""
    return one.shape == other.shape and torch.equal(one.read(), other.read())


def drop_copies(stored: dict[str, StoredTensor]) -> None:
    """Keep the embedding once, as ``shared.weight``, and a head if it differs."""
    names = [name for name in TABLES if name in stored]
    for name in names[1:]:
        if same_numbers(stored[name], stored[names[0]]):
            del stored[name]
    if names and names[0] not in (TABLE, HEAD):
        stored[TABLE] = stored.pop(names[0])


def read_weights(
    stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Read tensor by tensor, by our names; empties ``stored``, which closes files."""
    weights = {}
    for name in tqdm(list(stored), "loading", unit="tensor", delay=2):
        weights[our_name(name)] = stored.pop(name).read().to(device, dtype)
    return weights


def check_fit(found: dict[str, tuple], wanted: dict[str, tuple], where: str) -> None:
    """Name the tensors that are missing, surplus or misshapen.

    Args:
        found, wanted: shapes by released names.
        where: what to call the place where they were found.

    Raises:
        ValueError: if there are any; it shows up to 20 of each kind.
    """
    missing = [f"{name} is missing" for name in wanted if name not in found]
    surplus = [f"{name} is surplus" for name in found if name not in wanted]
    misshapen = []
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            misshapen.append(f"{name} has shape {found[name]}, not {shape}")
    lines = []
    for complaints in (missing, surplus, misshapen):
        lines += complaints[:20]
        if len(complaints) > 20:
            lines.append(f"... and {len(complaints) - 20} more")
    if lines:
        number = len(missing) + len(surplus) + len(misshapen)
        subject = "1 tensor does" if number == 1 else f"{number} tensors do"
        lines.insert(0, f"{subject} not fit config.json, in {where}:")
        raise ValueError("\n".join(lines))


def check_possible(config: T5Config, stored: dict[str, StoredTensor]) -> None:
    """Refuse sizes that these tensors cannot have, before a model is built."""
    numbers = sum(prod(tensor.shape) for tensor in stored.values())
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        largest = stack.dim * max(
            config.enc_num_tokens, stack.heads * stack.dim_head, stack.mlp_dim
        )
        largest = max(largest, stack.num_buckets * stack.heads)
        if largest > numbers:
            raise ValueError(
                f"config.json asks for a tensor of {largest} numbers, but all tensors "
                f"together have {numbers}"
            )
        start = f"{side}.block."
        blocks = {name.split(".")[2] for name in stored if name.startswith(start)}
        for k in range(stack.depth):
            if str(k) not in blocks:
                raise ValueError(
                    f"config.json asks for {stack.depth} blocks in the {side}, "
                    f"but {start}{k} is missing"
                )


STALE = ".EncDecAttention.relative_attention_bias.weight"  # no T5 reads it
BIAS = ".SelfAttention.relative_attention_bias.weight"


def build(
    entries: dict,
    stored: dict[str, StoredTensor],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    attention: str,
    model_class: type[T5],
) -> T5:
    """Build a T5 from the entries of ``config.json`` and tensors not yet read.

    Arguments and errors are those of ``load_released``; ``stored`` is empty
    in the end.
    """
    allowed = ", ".join(map(str, FLOATS.values()))
    if dtype not in (None, *FLOATS.values()):
        raise ValueError(f"dtype is {dtype!r}; pass one of {allowed}")
    for name in list(stored):
        if name.endswith(STALE):
            del stored[name]
        elif stored[name].dtype not in FLOATS.values():
            raise ValueError(f"{name} is {stored[name].dtype}; weights are {allowed}")
    config = our_config(entries)
    check_possible(config, stored)

    # What the tensors know better than config.json
    drop_copies(stored)
    tied = HEAD not in stored
    config = replace(config, tie_head=tied, scale_logits=logits_scaled(entries, tied))
    config = replace(config, attention=attention)  # no file says this
    if max(config.enc_depth, config.dec_depth) > 1:
        tables = [name for name in stored if name.endswith(BIAS)]
        per_layer = any(".block.0." not in name for name in tables)
        config = replace(config, bias_per_layer=per_layer)

    with torch.device("meta"):
        model = model_class(**asdict(config))
    found = {name: tensor.shape for name, tensor in stored.items()}
    check_fit(found, released_shapes(model), "the release")

    if dtype is None:  # the widest of theirs
        dtypes = [tensor.dtype for tensor in stored.values()]
        dtype = reduce(torch.promote_types, dtypes)
    weights = read_weights(stored, dtype, device or torch.get_default_device())
    # assign=True: what was read becomes the parameter itself. A tied head is
    # not among the names, and is tied again.
    model.load_state_dict(weights, strict=False, assign=True)
    if tied:
        model.head.weight = model.dec_emb.weight
    return model.eval()


def released_shapes(model: T5) -> dict[str, tuple]:
    """The shapes of a model's weights, by released names."""
    named = model.named_parameters()
    return {released_name(name): tuple(weight.shape) for name, weight in named}


def load_released(
    config: dict,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: str = "plain",
    model_class: type[T5] = T5,
) -> T5:
    """Build a T5 from a configuration and tensors as released files have them.

    This is the way for a model that is in memory: ``load_released(
    theirs.config.to_dict(), theirs.state_dict())``.

    Args:
        config: the entries of a ``config.json``.
        tensors: by the names of ``transformers``. They are copied.
        dtype: of the weights; default: theirs, or the widest of those.
        device: of the weights; default: torch's default.
        attention: how to compute it, as in ``T5Config``; default "plain".
        model_class: ``T5`` or a class derived from it.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the configuration is no T5's, or does not fit the
            tensors; the message names up to 20 tensors of each kind.
    """
    stored = {name: stored_tensor(tensor) for name, tensor in tensors.items()}
    return build(config, stored, dtype, device, attention, model_class)


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: str = "plain",
    model_class: type[T5] = T5,
) -> T5:
    """Load a released T5, or one that ``save_pretrained`` wrote.

    The weights are read tensor by tensor: it takes their own size in memory,
    and little more than the largest of them on top. No program in a file is
    run.

    Args:
        name_or_path: a folder; a file of weights, or an index of them, with
            ``config.json`` beside it; or a name on the hub.
        dtype, device, attention, model_class: as for ``load_released``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if files are damaged, no T5's, or do not fit together;
            see ``load_released``.
        FileNotFoundError, ImportError, ConnectionError: as ``find_weights``.
    """
    files = find_weights(name_or_path)
    folder = files[0].parent
    stored, notes = open_shards(files)
    entries = saved_config(folder / "config.json", notes)
    try:
        return build(entries, stored, dtype, device, attention, model_class)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def saved_config(file: Path, notes: dict[str, str]) -> dict:
    """The entries of a ``config.json``, or of the copy beside the weights.

    ``save_pretrained`` stores a copy with the weights. It counts only if the
    two are from different saves, as after a crash between them.
    """
    copy = notes.get("t5_book_config")
    if copy is None:
        return parse_json(file.read_bytes(), file)
    copied = parse_json(copy, f"the configuration in the weights beside {file}")
    entries = parse_json(file.read_bytes(), file) if file.is_file() else {}
    if entries.get("save_id") == copied.get("save_id"):
        return entries
    warnings.warn(
        f"{file} is not from the same save as the weights beside it; their own copy "
        "of the configuration is used",
        stacklevel=3,
    )
    return copied


def from_pretrained(cls, name_or_path, **options):
    """Load a released T5, as ``t5_book.load_pretrained`` says."""
    return load_pretrained(name_or_path, model_class=cls, **options)


def from_released(cls, config, tensors, **options):
    """Load from memory, as ``t5_book.pretrained.load_released`` says."""
    return load_released(config, tensors, model_class=cls, **options)


T5.from_pretrained = classmethod(from_pretrained)
T5.from_released = classmethod(from_released)


def released_tensors(model: T5) -> dict[str, Tensor]:
    """The weights of a model by released names, each of them once.

    ``safetensors.torch.save_file`` takes them, which it does not do with the
    ``state_dict`` of a tied model. They are the model's own, not copies.

    Raises:
        ValueError: if a weight has no numbers, or if the model is not one
            that its configuration describes.
    """
    with torch.device("meta"):
        plain = T5(**asdict(model.config))
    check_fit(released_shapes(model), released_shapes(plain), "the model")
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device and has no numbers to save")
        if weight.dtype not in FLOATS.values():
            raise ValueError(f"{name} is {weight.dtype}; call model.float() to save it")
        tensors[released_name(name)] = weight.detach()
    return tensors


def write_safetensors(file: Path, tensors: dict[str, Tensor], notes: dict[str, str]):
    """Write tensors and notes; the same file for the same content."""
    # Wide types go first, so that all numbers begin at a multiple of their size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    ordered = {name: tensors[name] for name in names}
    with file.open("wb") as out:
        out.write(safetensors_header(ordered, notes))
        for tensor in ordered.values():
            out.write(tensor.cpu().contiguous().view(torch.uint8).numpy())


def save_pretrained(model: T5, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, for ``transformers``, too.

    A crash leaves the old model or the new one, for ``load_pretrained``; a
    program that reads meanwhile gets one of them as well.

    Args:
        model: a ``T5``.
        folder: where to write; made if it is not there.

    Raises:
        ValueError: as ``released_config`` and ``released_tensors``; nothing
            is written then.
    """
    entries = released_config(model.config)
    tensors = released_tensors(model)
    entries["dtype"] = str(model.head.weight.dtype).removeprefix("torch.")
    # numpy's numbers, which a configuration may hold, have `item`.
    to_json = partial(json.dumps, indent=2, default=lambda number: number.item())
    entries["save_id"] = hashlib.sha256(to_json(entries).encode()).hexdigest()[:16]
    text = to_json(entries) + "\n"

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with TemporaryDirectory(prefix=".part-", dir=folder) as part:
        config, weights = Path(part, "config.json"), Path(part, "model.safetensors")
        config.write_text(text, "utf-8")
        # transformers wants to be told the format
        write_safetensors(weights, tensors, {"format": "pt", "t5_book_config": text})
        for file in (weights, config):
            write_through(file)
            file.replace(folder / file.name)
    write_through(folder)


def write_through(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_leftovers(folder: Path) -> None:
    """Remove what a save left that was killed more than a day ago."""
    for part in folder.glob(".part-*"):
        if part.is_dir() and time.time() - part.stat().st_mtime > 24 * 60 * 60:
            shutil.rmtree(part, ignore_errors=True)


T5.save_pretrained = save_pretrained
