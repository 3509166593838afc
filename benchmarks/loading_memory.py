"""Measure how much memory it takes to load a T5 of a released size.

    python benchmarks/loading_memory.py                       t5-3b in bfloat16
    python benchmarks/loading_memory.py t5-large --kind bin

Makes a checkpoint of zeros in a temporary folder, loads it in a process of
its own, and compares the peak of that process with the size of the weights.
Files of kind safetensors are sparse and take no room on the disk; those of
kind bin do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from t5_book import PRESETS, T5, T5Config
from t5_book.conversion import released_config, released_name

GB = 1e9
KINDS = {"safetensors": "model", "bin": "pytorch_model"}


def shards(preset: str, size: int, limit: float) -> Iterator[dict]:
    """Names and shapes of a preset's tensors, ``limit`` bytes at a time."""
    with torch.device("meta"):
        model = T5(**PRESETS[preset])
    shard, used = {}, 0
    for name, weight in model.named_parameters():
        if shard and used + weight.numel() * size > limit:
            yield shard
            shard, used = {}, 0
        shard[released_name(name)] = list(weight.shape)
        used += weight.numel() * size
    yield shard


def write_sparse(file: Path, shapes: dict, dtype: torch.dtype) -> None:
    """Write a safetensors file of zeros: its header, and a hole."""
    kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        offsets = [start, end]
        header[name] = dict(dtype=kind, shape=shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def write_bin(file: Path, shapes: dict, dtype: torch.dtype) -> None:
    """Write a file of ``torch.save``, full of zeros."""
    zeros = {n: torch.zeros(shape, dtype=dtype) for n, shape in shapes.items()}
    torch.save(zeros, file)


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write a checkpoint of zeros, with its index."""
    entries = released_config(T5Config(**PRESETS[options.preset]))
    (folder / "config.json").write_text(json.dumps(entries))
    write = write_sparse if options.kind == "safetensors" else write_bin
    dtype, stem = getattr(torch, options.dtype), KINDS[options.kind]
    places, limit = {}, options.shard * GB
    for k, part in enumerate(shards(options.preset, dtype.itemsize, limit)):
        name = f"{stem}-{k:05}.{options.kind}"
        write(folder / name, part, dtype)
        places |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{options.kind}.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def peak() -> float:
    """The largest memory that this process has had so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss counts the parent's, too
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load(folder: str, dtype: str | None) -> None:
    """Load the checkpoint and report; this is the process of its own."""
    before = peak()
    model = T5.from_pretrained(
        folder, dtype=getattr(torch, dtype) if dtype else None
    )
    weights = sum(w.numel() * w.itemsize for w in model.parameters())
    largest = max(w.numel() * w.itemsize for w in model.parameters())
    print(f"the weights         {weights / GB:7.3f} GB")
    print(f"the largest tensor  {largest / GB:7.3f} GB")
    print(f"peak before loading {before / GB:7.3f} GB (Python and torch)")
    print(f"peak of all         {peak() / GB:7.3f} GB")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="A checkpoint of zeros is made in a temporary folder.",
    )
    parser.add_argument("preset", nargs="?", default="t5-3b", choices=PRESETS,
                        metavar="preset", help="default: t5-3b")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", help="in the files",
                        choices=["bfloat16", "float32"])  # fmt: skip
    parser.add_argument("--to", help="convert to this type while loading")
    parser.add_argument("--kind", default="safetensors", choices=KINDS)
    parser.add_argument("--shard", type=float, default=1.0, help="size, GB")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.load:
        load(options.load, options.to)
        return 0
    with TemporaryDirectory() as folder:
        make(Path(folder), options)
        command = [sys.executable, __file__, "--load", folder]
        command += ["--to", options.to] if options.to else []
        quiet = os.environ | {"TQDM_DISABLE": "1"}
        return subprocess.run(command, env=quiet).returncode


if __name__ == "__main__":
    sys.exit(main())
