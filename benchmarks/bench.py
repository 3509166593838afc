"""What the benchmarks share: fair comparisons, and how they are written down.

A speed is a ratio against a peer that does the same work in the same run:
``compare`` alternates A B A B in one process, so that whatever else the
machine does meets both. CPU time counts the work of all threads and is the
steadier of the two; wall time is what you wait for.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles

import torch

MB = 2**20


def compare(
    works: dict[str, Callable[[], object]], rounds: int = 7, warmups: int = 1
) -> dict[str, dict[str, list[float]]]:
    """Measure several ways of doing the same work, one after the other.

    Args:
        works: by name, functions without arguments.
        rounds: how often each is called; default 7.
        warmups: how often each is called before that, unmeasured.

    Returns:
        By name, seconds of each round: ``{"cpu": [...], "wall": [...]}``.
    """
    seconds = {name: {"cpu": [], "wall": []} for name in works}
    for number in range(warmups + rounds):
        for name, work in works.items():
            gc.collect()  # not in the middle of someone's round
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number >= warmups:
                seconds[name]["cpu"].append(cpu)
                seconds[name]["wall"].append(wall)
    return seconds


def spread(numbers: list[float]) -> dict[str, float]:
    """The median of some numbers, and the quartiles on both sides of it."""
    if len(numbers) == 1:
        return {"median": numbers[0], "low": numbers[0], "high": numbers[0]}
    low, median, high = quantiles(numbers, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def speed(
    seconds: dict[str, dict[str, list[float]]],
    ours: str,
    theirs: str,
    clock: str = "cpu",
) -> dict[str, float]:
    """How many times as fast ``ours`` is: the spread of the rounds' ratios."""
    pairs = zip(seconds[theirs][clock], seconds[ours][clock])
    return spread([their_time / our_time for their_time, our_time in pairs])


def faster(
    seconds: dict[str, dict[str, list[float]]], *names: str, clock: str = "cpu"
) -> str:
    """The name with the smallest median, such as eager or sdpa."""
    return min(names, key=lambda name: spread(seconds[name][clock])["median"])


def table(rows: list[dict]) -> str:
    """Rows with the same keys, as a table in Markdown."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    """One value as text; a spread as its median and its quartiles."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def save(path: Path | str, rows: object) -> None:
    """Write results as JSON, with the machine that they were measured on."""
    result = {"machine": machine(), "rows": rows}
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def machine() -> dict:
    """Processor, threads and versions."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "ctranslate2"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }


def processor() -> str:
    """What the processor is called."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


# --- Memory ---------------------------------------------------------------


def peak_above_start(work: Callable[[], object]) -> float | None:
    """MiB by which the memory of this process rises at most while it works.

    A process keeps what it has freed, so a second measurement in the same
    process would come out too low: call ``in_a_process`` for each point.
    Returns None where the start can't be told, as outside Linux.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = _memory("VmRSS")
    work()
    return (_memory("VmHWM") - start) / MB


def _memory(field: str) -> int:
    """Bytes that the kernel counts for this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def in_a_process(script: str, **point: object) -> dict | None:
    """Run ``script --point '{...}'`` in a fresh process; read its last line.

    Returns:
        What the script printed as JSON, or None if it ran out of memory.
    """
    command = [sys.executable, script, "--point", json.dumps(point)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def limit_memory(share: float = 0.8) -> None:
    """Let this process fail rather than fill the memory of the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (int(share * total),) * 2)


def main(arguments: list[str] | None = None) -> int:
    """Print what ``save`` writes about this machine."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    print(json.dumps(machine(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
