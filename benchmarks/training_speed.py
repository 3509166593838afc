"""Compare the speed of training steps with that of transformers.

    python benchmarks/training_speed.py             all rows
    python benchmarks/training_speed.py --quick     fewer rounds
    python benchmarks/training_speed.py --rows d128 some of them

Forward, backward and a step of the same fused AdamW, on the same batch, in
float32, alternating in one process. Against the faster of eager and sdpa.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from bench import compare, faster, save, speed, spread, table
from peers import batch, build, training_step

PATH = Path(__file__).with_suffix(".json")
ROWS = {  # shape, batch, source, target, padded
    "d128": ("d128", 16, 128, 32, True),
    "d128, full rows": ("d128", 16, 128, 32, False),
    "d256": ("d256", 16, 128, 32, True),
    "d256, full rows": ("d256", 16, 128, 32, False),
    "1,024 tokens": ("long", 2, 1024, 128, True),
    "1,024 tokens, full rows": ("long", 2, 1024, 128, False),
    "t5-small": ("t5-small", 2, 128, 32, True),
}
OURS = ["ours plain", "ours sdpa", "ours chunked"]
THEIRS = ["theirs eager", "theirs sdpa"]


def measure(row: str, rounds: int) -> list[dict]:
    """A row of the table for each of our ways, in float32."""
    shape, b, s, t, padded = ROWS[row]
    data = batch(shape, b, s, t, padded)
    works = {
        name: training_step(build(name, shape), *data) for name in OURS + THEIRS
    }
    seconds = compare(works, rounds)
    peer = faster(seconds, *THEIRS)
    return [describe(row, name, peer, seconds) for name in OURS]


def measure_bf16(rounds: int) -> list[dict]:
    """bfloat16 autocast, against our float32 and their bfloat16."""
    data = batch("d256", 16, 128, 32, True)
    works = {"ours float32": training_step(build("ours plain", "d256"), *data)}
    for name in ("ours sdpa", *THEIRS):
        works[f"{name}, bf16"] = training_step(build(name, "d256"), *data, bf16=True)
    seconds = compare(works, rounds)
    peer = faster(seconds, *[f"{name}, bf16" for name in THEIRS])
    return [
        describe("bf16 autocast, d256", "ours sdpa, bf16", against, seconds)
        for against in ("ours float32", peer)
    ]


def describe(row: str, name: str, peer: str, seconds: dict) -> dict:
    """One line of the table."""
    return {
        "training step": row,
        "of": name,
        "against": peer,
        "speed (CPU time)": speed(seconds, name, peer),
        "speed (wall time)": speed(seconds, name, peer, "wall"),
        "ms a step": spread(seconds[name]["cpu"])["median"] * 1000,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds, not 9")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--rows", nargs="*", default=[*ROWS, "bf16"],
                        choices=[*ROWS, "bf16"], metavar="ROW")  # fmt: skip
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else 9
    rows = []
    for row in options.rows:
        if row == "bf16" and not has_bf16():
            print("bf16: this processor has no instructions for it", flush=True)
            continue
        rows += measure_bf16(rounds) if row == "bf16" else measure(row, rounds)
        print(f"{row}: done", file=sys.stderr, flush=True)
    print(table(rows))
    if not options.quick:
        save(PATH, rows)
    return 0


def has_bf16() -> bool:
    """Does this processor multiply in bfloat16?"""
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512_bf16" in info.read_text()


if __name__ == "__main__":
    sys.exit(main())
