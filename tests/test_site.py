"""The site builds without a warning, works offline, and can be read aloud."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from book import chapter_paths, code_of, read_notebook
from book_site import switch_buttons
from tests.small_book import ROOT

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))


class Page(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags = []
        self.text = path.read_text("utf-8")
        self.feed(self.text)
        self.ids = {part.get("id") for _, part in self.tags}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def all(self, *names):
        """The attributes of every tag of these names."""
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def pages():
    """Every page of the site, built without running a chapter."""
    folder = ROOT / "_build" / "check"
    folder.mkdir(parents=True, exist_ok=True)
    tools = {"local_extensions": {"book_site": str(ROOT / "tools")}}
    off = {"execute_notebooks": "off"}
    config = CONFIG | {"execute": CONFIG["execute"] | off, "sphinx": CONFIG["sphinx"] | tools}
    (folder / "_config.yml").write_text(yaml.safe_dump(config), "utf-8")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT]
    places = ["--config", folder / "_config.yml", "--path-output", folder]
    done = subprocess.run(
        [*command, *places, "--quiet", "-W", "--keep-going"], text=True, capture_output=True
    )
    if done.returncode:
        pytest.fail(f"the site:\n{done.stderr}", pytrace=False)
    html = folder / "_build" / "html"
    paths = [*html.glob("*.html"), *html.glob("chapters/*.html")]
    return {str(path.relative_to(html)): Page(path) for path in paths}


def test_every_page_is_listed_and_built(pages):
    listed = {entry["file"] for part in TOC["parts"] for entry in part["chapters"]}
    assert listed == {f"chapters/{path.stem}" for path in (ROOT / "chapters").glob("*.md")}
    assert {f"{name}.html" for name in listed} <= pages.keys()


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
    text = pages["chapters/paper_and_code.html"].text
    links = re.findall(r'href="(\w+)\.html#([^"]+)"', text)
    assert links
    for chapter, label in links:
        text = pages[f"chapters/{chapter}.html"].text
        assert f'<p id="{label}">' in text, f"{chapter}: {label}"


def test_formulas_need_no_network(pages):
    for page in pages.values():
        scripts = [part["src"] for part in page.all("script") if "src" in part]
        if 'class="math' in page.text:
            assert any("_static/mathjax/tex-svg.js" in script for script in scripts)


def test_every_image_says_what_it_shows(pages):
    for name, page in pages.items():
        for image in page.all("img"):
            assert len(image.get("alt", "")) > 3, f"{name}: {image}"
    for path in chapter_paths():
        for cell in code_of(read_notebook(path)):
            if "plt.show()" in cell.source:
                image = cell.metadata.get("mystnb", {}).get("image", {})
                assert image.get("alt"), f"{path.name}: {cell.source}"


def test_pages_have_a_language_and_one_heading(pages):
    for name, page in pages.items():
        if name in ("index.html", "search.html", "genindex.html"):
            continue
        assert page.all("html")[0]["lang"] == "en"
        article = page.text.partition('class="bd-article"')[2]
        assert article.count("<h1") == 1, name


def test_one_setting_turns_the_buttons_on(pages):
    assert CONFIG["repository"]["url"] == ""
    for page in pages.values():
        assert "source-repository-button" not in page.text
        assert "btn-source-edit" not in page.text
    for url in ("", "https://example.org/a/b"):
        config = SimpleNamespace(html_theme_options={"repository_url": url})
        switch_buttons(None, config)
        del config.html_theme_options["repository_url"]
        assert set(config.html_theme_options.values()) == {bool(url)}
