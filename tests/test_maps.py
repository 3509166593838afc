"""The map of T5 that opens each chapter."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from draw_maps import BOXES, CHAPTER_PARTS, LIT, draw_map, is_lit, map_path
from source import CHAPTERS, read_chapters

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("chapter", CHAPTER_PARTS)
def test_maps_are_what_the_tool_draws(chapter):
    stored = map_path(chapter, CHAPTERS / "images").read_text("utf-8")
    assert stored == draw_map(chapter), "run `python tools/draw_maps.py`"


@pytest.mark.parametrize("chapter", CHAPTER_PARTS)
def test_maps_say_what_they_show(chapter):
    root = ElementTree.fromstring(draw_map(chapter))
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title.text.startswith(f"Map of T5, chapter {chapter}: ")
    assert description.text.endswith(" lit.")


@pytest.mark.parametrize("chapter", CHAPTER_PARTS)
def test_the_part_of_the_chapter_is_lit_and_no_other(chapter):
    parts = CHAPTER_PARTS[chapter][1]
    lit = {box.part for box in BOXES if is_lit(box, parts)}
    assert set(parts) <= lit
    assert (LIT in draw_map(chapter)) == bool(parts)
    if chapter == max(CHAPTER_PARTS):
        assert all(is_lit(box, parts) for box in BOXES)


def test_boxes_do_not_overlap():
    boxes = [box for box in BOXES if not box.frame]
    for i, one in enumerate(boxes):
        for two in boxes[i + 1 :]:
            apart = (
                one.x + one.width <= two.x
                or two.x + two.width <= one.x
                or one.y + one.height <= two.y
                or two.y + two.height <= one.y
            )
            assert apart, (one.label, two.label)


def test_labels_fit_their_boxes():
    """In bold, as they are when lit, with 8 units to spare at each side."""
    group = ElementTree.fromstring(draw_map(1)).find(f"{SVG}g")
    assert "'DejaVu Sans'" in group.get("font-family")
    font = FontProperties(family="DejaVu Sans", weight="bold")
    size = float(group.get("font-size"))
    for box in BOXES:
        label = TextPath((0, 0), box.label, size=size, prop=font)
        assert label.get_extents().width + 16 <= box.width, box.label


def test_text_is_readable_on_a_phone():
    sizes = re.findall(r'font-size="(\d+)"', draw_map(1))
    width = float(re.search(r'viewBox="0 0 (\d+)', draw_map(1))[1])
    assert min(map(float, sizes)) * 390 / width > 10


def test_every_chapter_shows_its_map():
    for chapter in read_chapters():
        text = chapter.path.read_text("utf-8")
        assert f"(images/map_{chapter.number:02}.svg)" in text
