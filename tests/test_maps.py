"""The map of T5 that opens each chapter."""

import xml.etree.ElementTree as ElementTree

import pytest

from book import chapter_paths
from draw_maps import BOXES, CHAPTERS, LIT, draw_map
from tests.small_book import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def test_every_chapter_has_a_map_and_shows_it():
    assert list(CHAPTERS) == [path.stem for path in chapter_paths()]
    for path in chapter_paths():
        assert f"(images/map_{path.stem}.svg)" in path.read_text("utf-8")
    found = {path.name for path in (ROOT / "chapters" / "images").glob("map_*")}
    assert found == {f"map_{name}.svg" for name in CHAPTERS}


@pytest.mark.parametrize("name", CHAPTERS)
def test_maps_are_what_the_tool_draws(name):
    path = ROOT / "chapters" / "images" / f"map_{name}.svg"
    assert path.read_text("utf-8") == draw_map(name), "run `python tools/draw_maps.py`"


@pytest.mark.parametrize("name", CHAPTERS)
def test_maps_light_the_parts_of_the_chapter_and_say_so(name):
    sentence, parts = CHAPTERS[name]
    root = ElementTree.fromstring(draw_map(name))
    assert root.find(f"{SVG}desc").text.endswith(f" {sentence}")
    labels = [text for text in root.iter(f"{SVG}text") if text.get("font-weight") == "bold"]
    lit = [box for box in BOXES if {box.part, box.stack} & set(parts.split())]
    assert [label.text for label in labels] == [box.label for box in lit]
    assert (LIT in draw_map(name)) == bool(parts)
    assert set(parts.split()) <= {box.part for box in BOXES}


def test_the_last_chapter_lights_everything():
    *_, (_, parts) = CHAPTERS.values()
    assert all({box.part, box.stack} & set(parts.split()) for box in BOXES)
