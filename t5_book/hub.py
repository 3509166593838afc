"""The files of a released model, on this machine or on the hub.

Built in chapter 15, "Released weights: loading T5, mT5, ByT5, UMT5 and
Flan-T5" (chapters/pretrained.md). Edit the chapter, not this file.
"""

import json
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
        the model. Files that the hub doesn't have are not in it.

    Raises:
        FileNotFoundError: if it is neither here nor on the hub.
        ImportError: if ``huggingface_hub`` is not installed.
        ConnectionError: if the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if isinstance(name_or_path, Path):
        raise FileNotFoundError(f"there is no file or folder {name_or_path}")
    return download(name_or_path, files)


def download(name: str, files: tuple[str, ...]) -> Path:
    """Fetch files of a model from the hub; return their folder."""
    not_here = f"there is no file or folder {name}"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ImportError(
            f"{not_here}; to look for it on the hub, pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except errors.HFValidationError:  # "./model" can't be a name on the hub
        raise FileNotFoundError(not_here) from None
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{not_here}, and no such model on the hub; if it is one for which you "
            "must log in, run: hf auth login"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"{not_here}, and the hub cannot be reached") from error


def parse_json(text: str | bytes, source: object) -> dict:
    """Read a JSON object; ValueError that names ``source`` if it is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is damaged or no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__} and no JSON object")
    return values


def find_weights(name_or_path: str | Path) -> list[Path]:
    """Find the files with the weights, safetensors if there are any.

    Args:
        name_or_path: as for ``find_release``; a file may be one with
            weights or an index of shards.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if an index is damaged, or names files elsewhere.
        ImportError, ConnectionError: as ``find_release``.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = f"{name}.index.json"
        shards = name.replace(".", "-*.")  # model-00001-of-00002.safetensors
        path = find_release(name_or_path, "config.json", name, index, shards)
        for file in (path, path / name, path / index):
            if file.is_file():
                return read_index(file) if file.suffix == ".json" else [file]
    raise FileNotFoundError(
        f"{path} has no model.safetensors, no pytorch_model.bin, and no index of shards"
    )


def read_index(file: Path) -> list[Path]:
    """The shards that an index names; ValueError if they are elsewhere."""
    places = parse_json(file.read_bytes(), file).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{file} is no index of shards: it has no weight_map")
    names = sorted({str(place) for place in places.values()})
    for name in names:
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"{file} names {name!r}, which is no file beside it")
    return [file.with_name(name) for name in names]
