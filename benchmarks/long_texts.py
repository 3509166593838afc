"""Measure time and memory against the length of the text, and draw both.

    python benchmarks/long_texts.py             128 to 8,192 tokens
    python benchmarks/long_texts.py --quick     up to 1,024 tokens
    python benchmarks/long_texts.py --lengths 4096 --work encode

One text, a small model (2 blocks, 8 heads of 16 features). Time is that of
rounds that alternate in one process; each peak of memory is measured in a
process of its own, above what the process had before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from bench import (
    compare,
    in_a_process,
    limit_memory,
    peak_above_start,
    save,
    speed,
    spread,
    table,
)
from peers import batch, build, encode, training_step

PATH = Path(__file__).with_suffix(".json")
PLOT = Path(__file__).parents[1] / "chapters/images/long_texts.svg"
NAMES = ["ours plain", "ours sdpa", "ours chunked", "theirs eager", "theirs sdpa"]
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192]
WORKS = ["encode", "train"]


def prepare(work: str, name: str, length: int):
    """A function that does the work once."""
    src, labels, mask = batch("long", 1, length, 32, padded=False)
    model = build(name, "long")
    if work == "encode":
        return encode(model, src, mask)
    return training_step(model, src, labels, mask)


def measure_point(work: str, name: str, length: int) -> dict:
    """The peak of this process: a short text first, so that all is loaded."""
    limit_memory()
    run = prepare(work, name, length)
    prepare(work, name, 16)()
    return {"MiB": peak_above_start(run)}


def measure(work: str, length: int, rounds: int, names: list[str]) -> list[dict]:
    """A row for each model that has room at this length."""
    peaks = {}
    for name in names:
        peaks[name] = in_a_process(__file__, work=work, name=name, length=length)
    able = [name for name in names if peaks[name] is not None]
    seconds = compare({name: prepare(work, name, length) for name in able}, rounds)
    rows = []
    for name in able:
        peer = "theirs sdpa" if work == "encode" else "ours plain"
        rows.append({
            "work": work,
            "tokens": length,
            "of": name,
            "MiB": peaks[name]["MiB"],
            "s (CPU)": spread(seconds[name]["cpu"])["median"],
            "s (wall)": spread(seconds[name]["wall"])["median"],
            "against": peer,
            "memory": ratio(peaks, name, peer),
            "speed": speed(seconds, name, peer) if peer in able else "",
        })
    return rows


def ratio(peaks: dict, name: str, peer: str) -> float | str:
    """How many times as much memory, if both are known."""
    points = [peaks.get(who) for who in (name, peer)]
    if None in points or None in [point["MiB"] for point in points]:
        return ""
    return points[0]["MiB"] / points[1]["MiB"]


def draw(rows: list[dict]) -> None:
    """Time and memory against length, training above, the encoder below."""
    import matplotlib.pyplot as plt

    plt.style.use(PLOT.parents[1] / "book.mplstyle")
    figure, axes = plt.subplots(2, 2, figsize=(7, 5.5), sharex=True)
    for line, work in zip(axes, WORKS):
        for ax, value in zip(line, ("s (CPU)", "MiB")):
            for name in NAMES:
                points = [r for r in rows if r["work"] == work and r["of"] == name]
                xs, ys = [r["tokens"] for r in points], [r[value] for r in points]
                style = "--" if name.startswith("theirs") else "-"
                ax.loglog(xs, ys, style, label=name.replace("theirs", "transformers"))
            ax.set(title=f"{work}: {value}")
    axes[1, 0].set_xlabel("tokens")
    axes[1, 1].set_xlabel("tokens")
    axes[0, 0].legend()
    figure.savefig(PLOT)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds, short texts")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--rounds", type=int, help="default: 7, or 3 with --quick")
    parser.add_argument("--lengths", nargs="*", type=int)
    parser.add_argument("--work", nargs="*", default=WORKS, choices=WORKS)
    parser.add_argument("--of", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.point:
        print(json.dumps(measure_point(**json.loads(options.point))))
        return 0
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes
    lengths = options.lengths or (LENGTHS[:4] if options.quick else LENGTHS)
    rounds = options.rounds or (3 if options.quick else 7)
    rows = []
    for work in options.work:
        for length in lengths:
            rows += measure(work, length, rounds, options.of)
            print(f"{work}, {length} tokens: done", file=sys.stderr, flush=True)
    print(table(rows))
    complete = [options.of, options.work] == [NAMES, WORKS] and lengths == LENGTHS
    if complete:
        save(PATH, rows)
        draw(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
