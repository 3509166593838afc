"""Measure how far our T5 is from the one of ``transformers``.

    python benchmarks/exactness.py            print the table; about a minute
    python benchmarks/exactness.py --seeds 9  draw the weights nine times

For each family, with random weights: the largest difference between logits,
relative where they exceed 1, over pairs of unequal lengths, with padding on
either side; the difference between losses; and the relative difference
between gradients, of one weight at worst. ``transformers`` runs torch's
attention in float32 and float64, and its own in the column "eager". Then,
for fresh models, the first loss over the logarithm of the vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from t5_book import PRESETS, T5

# The tests compare in the same way; these are their reference models.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.conftest import (  # noqa: E402
    FAMILIES,
    PAIRS,
    RELEASED,
    batch_with_labels,
    difference,
    exact_norms,
    gradients,
    make_family,
    padded,
    random_ids,
    their_logits,
)

COLUMNS = {
    "logits": "float32 logits",
    "eager": "eager",
    "loss": "loss",
    "gradient": "gradient",
    "logits64": "float64 logits",
    "loss64": "loss",
    "gradient64": "gradient",
}
FRESH = ["t5-small", "t5-v1_1-small", "byt5-small"]


@torch.no_grad()
def logits_differ(pair) -> float:
    """Largest difference between logits, at all pairs of lengths."""
    batches = [padded(3, s, t) for s, t in PAIRS]
    return max(compare(pair, batch) for batch in batches)


@torch.no_grad()
def released_differs(family: str) -> float:
    """The same at a released shape, with 512 and 114 tokens."""
    pair = make_family(family, **RELEASED[family])
    return compare(pair, padded(2, 512, 114, 32100))


def compare(pair, batch) -> float:
    """Largest difference between logits, relative where they exceed 1."""
    ours, reference = pair
    return difference(ours(*batch), their_logits(reference, *batch))


def training_differs(pair) -> tuple[float, float]:
    """Difference between losses, and between gradients of one weight."""
    losses, shares = [], []
    for s, t in [(10, 9), (40, 10), (9, 40)]:
        loss, theirs, grads = gradients(*pair, *batch_with_labels(s, t))
        losses.append((loss - theirs).abs().item())
        for a, b in grads.values():
            shares.append(((a - b).norm() / b.norm()).item())
    return max(losses), max(shares)


def measure(family: str, seed: int) -> dict[str, float]:
    """All differences for one family and one draw of its weights."""
    ours, reference = pair = make_family(family, seed)
    found = {"logits": logits_differ(pair)}
    found["loss"], found["gradient"] = training_differs(pair)
    reference.set_attn_implementation("eager")
    found["eager"] = logits_differ(pair)
    reference.set_attn_implementation("sdpa")
    pair = ours.double(), exact_norms(reference.double())
    found["logits64"] = logits_differ(pair)
    found["loss64"], found["gradient64"] = training_differs(pair)
    return found


def first_loss(preset: str) -> float:
    """Loss of a fresh model, over the logarithm of its vocabulary."""
    torch.manual_seed(0)
    model = T5(**PRESETS[preset]).eval()
    high = model.config.dec_num_tokens
    batch = random_ids(4, 32, 0, high), random_ids(4, 20, 1, high)
    with torch.no_grad():
        return model.loss(*batch).item() / math.log(high)


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    print("| family |", " | ".join(COLUMNS.values()), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for family in FAMILIES:
        draws = [measure(family, seed) for seed in range(seeds)]
        worst = [max(draw[name] for draw in draws) for name in COLUMNS]
        print(f"| {family} |", " | ".join(f"{x:.1e}" for x in worst), "|")
    for family in RELEASED:
        found = released_differs(family)
        print(f"{family} of a small size, 512 and 114 tokens: {found:.1e}")
    for preset in FRESH:
        ratio = first_loss(preset)
        print(f"first loss of {preset}: {ratio:.3f} of ln(vocabulary)")


if __name__ == "__main__":
    main()
