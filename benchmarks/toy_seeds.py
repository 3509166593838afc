"""Train the toy T5 of the last chapter with other seeds and optimizers.

    python benchmarks/toy_seeds.py      write chapters/toy_seeds.json and
                                        the picture of README.md
    python benchmarks/toy_seeds.py Adafactor "seed 1"     do these again

It runs the chapter's own cells, those tagged ``experiment``. The chapter
quotes the results. Takes about twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import torch

import t5_book

CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"
RESULT = CHAPTERS / "toy_seeds.json"
PICTURE = CHAPTERS / "images" / "result.png"
SHORT = 400  # steps, to compare optimizers
GATED = {"feed_forward": "gated-gelu"}  # as many weights as ReLU has
GATED |= {"enc_mlp_mult": 8 / 3, "dec_mlp_mult": 8 / 3}
# What is varied of the model, and what of the training.
LONG_RUNS = {
    "seed 0": ({"seed": 0}, {"seed": 0}),
    "seed 1": ({"seed": 1}, {"seed": 1}),
    "seed 2": ({"seed": 2}, {"seed": 2}),
    "no position bias": ({"bias": False}, {}),
    "gated GELU": (GATED, {}),
}
LABELS = {  # of the curves in the picture
    "seed 0": "T5, three seeds",
    "seed 1": None,
    "seed 2": None,
    "no position bias": "T5 without position bias",
}


def parts_of(model):
    """The matrices of the blocks, all other weights, and the tables."""
    muon, adamw = t5_book.muon_adamw(model)
    others, tables = [group["params"] for group in adamw.param_groups]
    return muon.param_groups[0]["params"], others, tables


def adamw_for_all(model, lr):
    """As ``muon_adamw``, but AdamW steps with the matrices, too."""
    matrices, others, tables = parts_of(model)
    groups = [
        {"params": matrices, "lr": lr},
        {"params": others, "lr": 0.05},
        {"params": tables, "lr": 0.3},
    ]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]


def adafactor_but_tables(model, lr):
    """Adafactor at a constant rate, and AdamW for the tables."""
    matrices, others, tables = parts_of(model)
    return [
        t5_book.Adafactor(matrices + others, lr),
        torch.optim.AdamW(tables, 0.3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


SHORT_RUNS = {
    "Muon and AdamW, tables at 0.3": ({}, {}),
    "the same, tables at 0.05": ({}, {"table_lr": 0.05}),
    "the same, tables at 0.005": ({}, {"table_lr": 0.005}),
    "the same, no position bias": ({"bias": False}, {}),
    "the same, embeddings at 0.005": ({}, {"embedding_lr": 0.005}),
    "the same, five rounds of Muon": ({}, {"rounds": 5}),
    "the same, gated GELU": (GATED, {}),
    # 0.002 is the best of 0.0005, 0.001, 0.002 and 0.005
    "the same, AdamW instead of Muon": (
        {},
        {"optimizers": adamw_for_all, "lr": 0.002},
    ),
    "Adafactor": ({}, {"optimizers": t5_book.adafactor}),
    # constant: 400 steps at 1 / sqrt(400)
    "Adafactor at 0.05": (
        {},
        {"optimizers": t5_book.adafactor, "warmup": SHORT},
    ),
    "Adafactor at 0.03, tables at 0.3": (
        {},
        {"optimizers": adafactor_but_tables, "lr": 0.03},
    ),
}


def load_experiment() -> dict:
    """Run the cells tagged ``experiment``; give the names they define."""
    names: dict = {}
    for cell in jupytext.read(CHAPTERS / "train_toy.md").cells:
        if "experiment" in cell.metadata.get("tags", ()):
            exec(compile(cell.source, "train_toy.md", "exec"), names)
    return names


def train_all(book: dict, runs: dict, **common) -> dict[str, list[dict]]:
    """The history of every run; two train at a time."""
    models = [
        book["make_model"](**{"seed": 0} | m) for m, _ in runs.values()
    ]

    def train(model, options):
        return book["train_toy"](model, **common | options)

    with ThreadPoolExecutor(max_workers=2) as pool:
        done = pool.map(train, models, [t for _, t in runs.values()])
        return dict(zip(runs, done))


def last(history: list[dict]) -> dict:
    """The result of a run, rounded."""
    record = history[-1]
    return {name: round(record[name], 4) for name in record}


def best_accuracy(book: dict) -> float:
    """Share of the hidden words that the best reader finds."""
    choice = book["best"].best
    tokens = torch.where(choice >= 0, book["token_of"][choice], -1)
    right = (tokens == book["valid"].labels)[book["is_word"]]
    return right.float().mean().item()


def draw(histories: dict[str, list[dict]], floor: float) -> None:
    """Draw the losses of the long runs over the floor."""
    plt.style.use(CHAPTERS / "book.mplstyle")
    figure, ax = plt.subplots(figsize=(6.4, 3.4))
    for name, label in LABELS.items():
        history = histories[name]
        steps, losses = zip(*((r["step"], r["loss"]) for r in history))
        style = "C0-" if name.startswith("seed") else "C1--"
        ax.plot(steps, losses, style, label=label)
    ax.axhline(floor, color="black", ls=":", label="best possible")
    ax.set(xlabel="step", ylabel="nats per target token", ylim=0)
    ax.legend()
    figure.savefig(PICTURE, dpi=150, metadata={"Software": None})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [*LONG_RUNS, *SHORT_RUNS]
    note = f"runs to do again: {'; '.join(known)}"
    parser.add_argument("runs", nargs="*", metavar="NAME", help=note)
    options = parser.parse_args()
    if unknown := set(options.runs) - set(known):
        parser.error(f"no run is called {', '.join(unknown)}")
    return options


def main() -> None:
    """Run everything, or the runs named, and write the results."""
    wanted = parse_arguments().runs
    torch.set_num_threads(1)
    book = load_experiment()
    result = json.loads(RESULT.read_text()) if wanted else {}
    result["floor"] = round(book["floor"], 4)
    result["best"] = round(best_accuracy(book), 4)
    short = {"steps": SHORT}
    kinds = {"runs": (LONG_RUNS, {}), "short": (SHORT_RUNS, short)}
    for kind, (runs, options) in kinds.items():
        chosen = {n: runs[n] for n in runs if n in wanted or not wanted}
        histories = train_all(book, chosen, **options)
        found = {name: last(history) for name, history in histories.items()}
        result[kind] = result.get(kind, {}) | found
        if set(LABELS) <= set(histories):
            draw(histories, book["floor"])
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
