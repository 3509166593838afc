"""Draw the small map of T5 that opens each chapter.

    python tools/draw_maps.py      write chapters/images/map_text_to_text.svg, ...

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

from source import CHAPTERS

WIDTH, HEIGHT = 640, 690
LEFT, RIGHT, COLUMN = 24, 334, 282  # the two columns and their width
INK, LINE, PLAIN, CARD = "#1f2933", "#5b6b7b", "#eef2f6", "#ffffff"
LIT, LIT_FRAME, LIT_LINE = "#ffcf5c", "#fff4d9", "#9a4a00"


@dataclass(frozen=True)
class Box:
    """A part of T5 on the map.

    ``part`` names what it is; parts of one name are lit together. A frame
    holds other boxes, so its label stands at its top.
    """

    part: str
    label: str
    x: int
    y: int
    width: int
    height: int
    frame: bool = False

    def draw(self, lit: bool) -> str:
        """The SVG of the box."""
        fill = (LIT_FRAME if self.frame else LIT) if lit else PLAIN
        if self.frame and not lit:
            fill = CARD
        line, width = (LIT_LINE, 4) if lit else (LINE, 1.5)
        weight = "bold" if lit else "normal"
        middle = self.y + (25 if self.frame else self.height / 2 + 6.5)
        return (
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" '
            f'height="{self.height}" rx="8" fill="{fill}" '
            f'stroke="{line}" stroke-width="{width}"/>\n'
            f'<text x="{self.x + self.width / 2:g}" y="{middle:g}" '
            f'font-weight="{weight}">'
            f"{self.label}</text>\n"
        )


def stack(x: int, top: int, *rows: tuple[str, str]) -> list[Box]:
    """The boxes of a layer, one below the other; norms are flat."""
    boxes, y = [], top
    for part, label in rows:
        height = 28 if part in ("norm", "bias") else 42
        y += 10 if part == "norm" else 0
        boxes.append(Box(part, label, x + 16, y, COLUMN - 32, height))
        y += height + 4
    return boxes


NORM = ("norm", "RMSNorm · 5")
SELF = ("attention", "self-attention · 6"), ("bias", "+ relative bias · 7")
CROSS = ("attention", "cross-attention · 6")
FORWARD = ("feed_forward", "feed-forward · 8")
ENCODER = Box("encoder", "encoder · 9", LEFT, 196, COLUMN, 246, frame=True)
DECODER = Box(
    "decoder", "decoder · 10", RIGHT, 196, COLUMN, 330, frame=True
)
BOXES = [
    Box("text", "text · 1, 4", LEFT, 24, 128, 50),
    Box("tokens", "tokens · 2, 14", 188, 24, 176, 50),
    Box("spans", "hide spans · 3, 16", 400, 24, 216, 50),
    Box("model", "embedding · 11", LEFT, 128, COLUMN, 42),
    Box("model", "embedding · 11", RIGHT, 128, COLUMN, 42),
    ENCODER,
    *stack(LEFT, 226, NORM, *SELF, NORM, FORWARD),
    DECODER,
    *stack(RIGHT, 226, NORM, *SELF, NORM, CROSS, NORM, FORWARD),
    Box("model", "logits · 11", RIGHT, 552, COLUMN, 46),
    Box("optimizer", "optimizer · 17", LEFT, 480, COLUMN, 46),
    Box("training", "loss, training · 18", LEFT, 552, COLUMN, 46),
    Box("generation", "generation · 12, 13", RIGHT, 624, COLUMN, 46),
    Box("generation", "text", LEFT, 624, COLUMN, 46),
]
ARROWS = [
    "M152 49 H182",
    "M364 49 H394",
    "M508 74 V98 H165 V122",
    "M508 98 H475 V122",
    "M165 170 V190",
    "M475 170 V190",
    f"M306 409 H{RIGHT + 10}",
    "M475 526 V546",
    "M334 575 H312",
    "M165 552 V532",
    "M165 480 V448",
    "M475 598 V618",
    "M334 647 H312",
]
WORDS = [("inputs", 204, 118), ("targets", 516, 118)]

INSIDE = {
    "encoder": ["encoder", "norm", "attention", "bias", "feed_forward"],
    "decoder": ["decoder", "norm", "attention", "bias", "feed_forward"],
}
STACKS = ["encoder", "decoder", *INSIDE["encoder"][1:]]
CHAPTER_PARTS: dict[int, tuple[str, list[str]]] = {
    1: ("The whole of T5", []),
    2: ("The tokenizer", ["tokens"]),
    3: ("Span corruption", ["spans"]),
    4: ("The text", ["text"]),
    5: ("The norms", ["norm"]),
    6: ("Attention", ["attention"]),
    7: ("The relative position bias", ["bias"]),
    8: ("The feed-forward layers", ["feed_forward"]),
    9: ("The encoder", ["encoder"]),
    10: ("The decoder", ["decoder"]),
    11: ("The whole model", ["model", *STACKS]),
    12: ("Generation", ["generation"]),
    13: ("Generation", ["generation"]),
    14: ("The tokenizer", ["tokens"]),
    15: ("The whole model", ["model", *STACKS]),
    16: ("Span corruption", ["spans"]),
    17: ("The optimizer", ["optimizer"]),
    18: ("Training", ["training"]),
    19: ("Everything", sorted({box.part for box in BOXES})),
}
DESCRIPTION = (
    "Text becomes tokens, and spans of tokens are hidden. The inputs go "
    "through an embedding into the encoder: norm, self-attention with a "
    "relative position bias, norm, feed-forward. The targets go through an embedding "
    "into the decoder: the same, with cross-attention to the encoder between "
    "the two. The decoder gives logits, for generation and for training: "
    "from the loss, the optimizer changes the model."
)


def is_lit(box: Box, parts: list[str]) -> bool:
    """Is this box lit? Chapters 9 and 10 light one column alone."""
    if parts in (["encoder"], ["decoder"]):
        column = LEFT if parts == ["encoder"] else RIGHT
        inside = box.x in (column, column + 16)
        return inside and box.part in INSIDE[parts[0]]
    return box.part in parts


def draw_map(chapter: int) -> str:
    """The SVG text of a chapter's map."""
    title, parts = CHAPTER_PARTS[chapter]
    lit = f"{title} is lit." if parts else "No part is lit."
    boxes = "".join(box.draw(is_lit(box, parts)) for box in BOXES)
    arrows = "".join(f'<path d="{path}"/>\n' for path in ARROWS)
    words = "".join(
        f'<text x="{x}" y="{y}" font-size="18" font-style="italic">'
        f"{word}</text>\n"
        for word, x, y in WORDS
    )
    return TEMPLATE.format(
        title=f"Map of T5, chapter {chapter}: {title}",
        description=f"{DESCRIPTION} {lit}",
        body=boxes,
        arrows=arrows,
        words=words,
    )


TEMPLATE = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
width="{WIDTH * 3 // 4}" height="{HEIGHT * 3 // 4}" role="img" \
aria-labelledby="title desc">
<title id="title">{{title}}</title>
<desc id="desc">{{description}}</desc>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" \
markerHeight="6" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/>\
</marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{CARD}"/>
<g font-family="system-ui, 'DejaVu Sans', Arial, sans-serif" \
font-size="20" fill="{INK}" text-anchor="middle">
{{body}}{{words}}</g>
<g fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#tip)">
{{arrows}}</g>
</svg>
"""


def map_path(chapter: int, folder: Path) -> Path:
    """Where the map of a chapter lies."""
    return folder / f"map_{chapter:02}.svg"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit code."""
    parser = argparse.ArgumentParser(
        description="Draw the map of T5 for every chapter."
    )
    folder = CHAPTERS / "images"
    parser.add_argument("--folder", type=Path, default=folder)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for chapter in CHAPTER_PARTS:
        path = map_path(chapter, options.folder)
        path.write_text(draw_map(chapter), encoding="utf-8")
    print(f"{len(CHAPTER_PARTS)} maps in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
