"""The site builds without a warning, works offline, and can be read aloud."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from small_book import ROOT

from runs import code_of, read_notebook
from source import CHAPTERS, read_chapters

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))


def build(folder: Path, **settings) -> Path:
    """Build the site without running a chapter; a warning is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | settings
    config["execute"] = config["execute"] | {"execute_notebooks": "off"}
    tools = str(ROOT / "tools")
    config["sphinx"] = config["sphinx"] | {
        "local_extensions": {"book_site": tools}
    }
    path = folder / "_config.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = Path(sys.executable).with_name("jupyter-book")
    done = subprocess.run(
        [command, "build", ROOT, "--config", path, "--path-output", folder]
        + ["--quiet", "-W", "--keep-going"],
        text=True,
        capture_output=True,
    )
    if done.returncode:
        pytest.fail(f"the site:\n{done.stderr}", pytrace=False)
    return folder / "_build" / "html"


@pytest.fixture(scope="module")
def pages():
    """Every page of the site, parsed."""
    html = build(ROOT / "_build" / "check")
    paths = [*html.glob("*.html"), *html.glob("chapters/*.html")]
    found = {str(path.relative_to(html)): path for path in paths}
    return {n: Page(p.read_text("utf-8")) for n, p in found.items()}


class Page(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags = []
        self.text = text
        self.feed(text)
        self.ids = {part.get("id") for _, part in self.tags}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def all(self, *names):
        """The attributes of every tag of these names."""
        return [attributes for tag, attributes in self.tags if tag in names]


def test_every_chapter_has_its_page(pages):
    for path in CHAPTERS.glob("*.md"):
        assert f"chapters/{path.stem}.html" in pages


def test_nothing_is_loaded_from_elsewhere(pages):
    for name, page in pages.items():
        for part in page.all("script", "link", "img", "iframe", "source"):
            where = part.get("src") or part.get("href", "")
            assert "//" not in where, f"{name} loads {where}"
        scripts = re.findall(r"<script.*?</script>", page.text, re.DOTALL)
        assert not re.search(r"https?://", "".join(scripts)), name


def test_every_link_within_the_site_lands(pages):
    """On a page that exists and, after a ``#``, on a place in it."""
    for name, page in pages.items():
        for link in page.all("a"):
            path, _, anchor = link.get("href", "").partition("#")
            if ":" in path or not (path.endswith(".html") or anchor):
                continue
            goal = os.path.normpath(Path(name).parent / path)
            goal = pages[goal if path else name]
            assert not anchor or anchor in goal.ids, f"{name}: {link}"


def test_the_page_paper_and_code_links_to_paragraphs(pages):
    page = pages["chapters/paper_and_code.html"]
    links = re.findall(r'href="(\d\w+).html#([^"]+)"', page.text)
    assert len(links) > 50
    for chapter, label in links:
        text = pages[f"chapters/{chapter}.html"].text
        assert f'<p id="{label}">' in text, f"{chapter}: {label}"


def test_formulas_need_no_network(pages):
    for page in pages.values():
        scripts = [p["src"] for p in page.all("script") if "src" in p]
        if 'class="math' in page.text:
            assert any("_static/mathjax/tex-svg.js" in s for s in scripts)


def test_every_image_says_what_it_shows(pages):
    for name, page in pages.items():
        for image in page.all("img"):
            assert len(image.get("alt", "")) > 3, f"{name}: {image}"


def test_pages_have_a_language_a_title_and_one_heading(pages):
    for name, page in pages.items():
        if name in ("index.html", "search.html", "genindex.html"):
            continue
        assert page.all("html")[0]["lang"] == "en"
        assert len(page.all("title")) >= 1
        article = page.text.partition('class="bd-article"')[2]
        assert article.count("<h1") == 1, name


def test_without_an_address_nothing_needs_one(pages):
    assert CONFIG["repository"]["url"] == ""
    for page in pages.values():
        assert "source-repository-button" not in page.text
        assert "btn-source-edit" not in page.text


def test_table_of_contents_lists_every_chapter_in_order():
    listed = [c["file"] for part in TOC["parts"] for c in part["chapters"]]
    chapters = [f"chapters/{c.path.stem}" for c in read_chapters()]
    assert [name for name in listed if name in chapters] == chapters
    every = {f"chapters/{path.stem}" for path in CHAPTERS.glob("*.md")}
    assert set(listed) == every


@pytest.mark.parametrize("chapter", read_chapters(), ids=lambda c: c.module)
def test_every_figure_says_what_it_shows(chapter):
    for cell in code_of(read_notebook(chapter.path)):
        if "plt.show()" in cell.source:
            image = cell.metadata.get("mystnb", {}).get("image", {})
            assert len(image.get("alt", "")) > 30, cell.source


def test_one_setting_turns_the_buttons_on():
    from types import SimpleNamespace

    from book_site import switch_buttons

    for url, on in (("", False), ("https://example.org/a/b", True)):
        config = SimpleNamespace(html_theme_options={"repository_url": url})
        switch_buttons(None, config)
        del config.html_theme_options["repository_url"]
        assert set(config.html_theme_options.values()) == {on}
