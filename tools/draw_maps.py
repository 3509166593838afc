"""Draw the small map of T5 that opens each chapter.

    python tools/draw_maps.py      write chapters/images/map_attention.svg, ...

It is the same map every time: text becomes tokens, tokens lose spans, the
encoder reads what is left, the decoder writes what is missing. The part that
the chapter builds is lit: filled, with a thick border and bold letters, so
that it stands out without colour, too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from book import ROOT

WIDTH, HEIGHT = 640, 690
LEFT, RIGHT, COLUMN = 24, 334, 282  # the two columns and their width
INK, LINE, PLAIN, CARD = "#1f2933", "#5b6b7b", "#eef2f6", "#ffffff"
LIT, LIT_FRAME, LIT_LINE = "#ffcf5c", "#fff4d9", "#9a4a00"

# What each chapter lights: a sentence for those who cannot see it, and the parts.
MODEL = ("The whole model is lit.", "embedding logits encoder decoder")
CHAPTERS = {
    "text_to_text": ("No part is lit.", ""),
    "tokenizer": ("The tokens are lit.", "tokens"),
    "span_corruption": ("Span corruption is lit.", "spans"),
    "toy_language": ("The text is lit.", "text"),
    "rms_norm": ("The norms are lit.", "norm"),
    "attention": ("Attention is lit.", "attention"),
    "relative_position": ("The relative position bias is lit.", "bias"),
    "feed_forward": ("The feed-forward layers are lit.", "feed_forward"),
    "encoder": ("The encoder is lit.", "encoder"),
    "decoder": ("The decoder is lit.", "decoder"),
    "t5": MODEL,
    "generation": ("Generation is lit.", "generation"),
    "beams": ("Generation is lit.", "generation"),
    "byte_tokenizer": ("The tokens are lit.", "tokens"),
    "pretrained": MODEL,
    "objectives": ("Span corruption is lit.", "spans"),
    "corpus": ("The text, the tokens and span corruption are lit.", "text tokens spans"),
    "optimizers": ("The optimizer is lit.", "optimizer"),
    "checkpoints": ("The loss and the training are lit.", "training"),
    "training": ("The loss is lit.", "training"),
    "make_it_fast": ("Attention is lit.", "attention"),
    "many_machines": ("The loss and the optimizer are lit.", "training optimizer"),
    "train_toy": (
        "Everything is lit.",
        "text tokens spans embedding encoder decoder logits optimizer training generation",
    ),
}
DESCRIPTION = (
    "Text becomes tokens, and spans of tokens are hidden. The source goes "
    "through an embedding into the encoder, a stack of layers: norm, "
    "self-attention with a relative position bias, norm, feed-forward. The "
    "target goes through an embedding into the decoder, whose layers have "
    "cross-attention to the encoder as well. The decoder gives logits, for "
    "generation and for training: from the loss, the optimizer changes the model."
)


@dataclass(frozen=True)
class Box:
    """A part of T5 on the map.

    A chapter lights it by its own name or by that of the stack it is in. A
    frame holds other boxes, so its label stands at its top.
    """

    part: str
    label: str
    x: int
    y: int
    width: int
    height: int
    stack: str = ""

    def draw(self, lit: bool) -> str:
        """The SVG of the box."""
        frame = self.part in ("encoder", "decoder")
        fill = {(True, True): LIT_FRAME, (True, False): LIT, (False, True): CARD}
        line, width = (LIT_LINE, 4) if lit else (LINE, 1.5)
        middle = self.y + (25 if frame else self.height / 2 + 6.5)
        return (
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" '
            f'height="{self.height}" rx="8" fill="{fill.get((lit, frame), PLAIN)}" '
            f'stroke="{line}" stroke-width="{width}"/>\n'
            f'<text x="{self.x + self.width / 2:g}" y="{middle:g}" '
            f'font-weight="{"bold" if lit else "normal"}">{self.label}</text>\n'
        )


def stack(name: str, x: int, height: int, *sublayers: tuple[str, str]) -> list[Box]:
    """The frame of a stack, and the boxes of one of its layers."""
    boxes, y = [Box(name, name, x, 196, COLUMN, height)], 226
    for part, label in sublayers:
        flat = part in ("norm", "bias")
        y += 10 if part == "norm" else 0
        boxes.append(Box(part, label, x + 16, y, COLUMN - 32, 28 if flat else 42, name))
        y += 32 if flat else 46
    return boxes


NORM, FORWARD = ("norm", "RMSNorm"), ("feed_forward", "feed-forward")
SELF = NORM, ("attention", "self-attention"), ("bias", "+ relative bias")
CROSS = NORM, ("attention", "cross-attention")
BOXES = [
    Box("text", "text", LEFT, 24, 128, 50),
    Box("tokens", "tokens", 188, 24, 176, 50),
    Box("spans", "span corruption", 400, 24, 216, 50),
    Box("embedding", "embedding", LEFT, 128, COLUMN, 42),
    Box("embedding", "embedding", RIGHT, 128, COLUMN, 42),
    *stack("encoder", LEFT, 246, *SELF, NORM, FORWARD),
    *stack("decoder", RIGHT, 330, *SELF, *CROSS, NORM, FORWARD),
    Box("logits", "logits", RIGHT, 552, COLUMN, 46),
    Box("optimizer", "optimizer", LEFT, 480, COLUMN, 46),
    Box("training", "loss, training", LEFT, 552, COLUMN, 46),
    Box("generation", "generation", RIGHT, 624, COLUMN, 46),
    Box("generation", "text", LEFT, 624, COLUMN, 46),
]
ARROWS = [
    "M152 49 H182", "M364 49 H394",
    "M508 74 V98 H165 V122", "M508 98 H475 V122",
    "M165 170 V190", "M475 170 V190",
    f"M306 409 H{RIGHT + 10}", "M475 526 V546",
    "M334 575 H312", "M165 552 V532", "M165 480 V448",
    "M475 598 V618", "M334 647 H312",
]
WORDS = [
    ("source", 204, 118), ("target", 516, 118),
    ("× layers", LEFT + COLUMN - 48, 220), ("× layers", RIGHT + COLUMN - 48, 220),
]


def draw_map(chapter: str) -> str:
    """The SVG text of a chapter's map."""
    sentence, names = CHAPTERS[chapter]
    lit = names.split()
    return TEMPLATE.format(
        description=f"{DESCRIPTION} {sentence}",
        boxes="".join(box.draw(box.part in lit or box.stack in lit) for box in BOXES),
        words="".join(
            f'<text x="{x}" y="{y}" font-size="18" font-style="italic">{word}</text>\n'
            for word, x, y in WORDS
        ),
        arrows="".join(f'<path d="{path}"/>\n' for path in ARROWS),
    )


TEMPLATE = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
width="{WIDTH * 3 // 4}" height="{HEIGHT * 3 // 4}" role="img" \
aria-labelledby="title desc">
<title id="title">Map of T5</title>
<desc id="desc">{{description}}</desc>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" \
markerHeight="6" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/>\
</marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{CARD}"/>
<g font-family="system-ui, 'DejaVu Sans', Arial, sans-serif" \
font-size="20" fill="{INK}" text-anchor="middle">
{{boxes}}{{words}}</g>
<g fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#tip)">
{{arrows}}</g>
</svg>
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(description="Draw the map of T5 for every chapter.")
    folder = ROOT / "chapters" / "images"
    parser.add_argument("--folder", type=Path, default=folder)
    options = parser.parse_args(arguments)
    for chapter in CHAPTERS:
        path = options.folder / f"map_{chapter}.svg"
        path.write_text(draw_map(chapter), "utf-8", newline="\n")
    print(f"{len(CHAPTERS)} maps in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
