"""The files of a released model, on this machine or on the hub.

Built in chapter 15, "Load the released T5" (chapters/pretrained.md). Edit
the chapter, not this file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

__all__ = []


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
