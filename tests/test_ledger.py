"""The page "Paper and code": what the chapters say, with proofs that exist."""

import re

import pytest
from small_book import cell, write_chapter

from ledger import HEADER, PROOF, main, write_page
from source import CHAPTERS, BookError, read_chapters

PAGE = CHAPTERS / "paper_and_code.md"
OWN = re.compile(rf"^\|.*\| {PROOF.pattern} \|$", re.MULTILINE)
ROW = "| t5x | divides | multiplies | [assert](#one-product) |"
PROOF_CELL = "\n(one-product)=\nThe product:\n" + cell("assert 2 * 3 == 6")


def book(folder, row=ROW, proof=PROOF_CELL, second=""):
    """A book of two chapters, whose second has a row and a proof."""
    other = ROW.replace("one-product", "other").replace("t5x", "paper")
    first = "\n(other)=\nHere:\n" + cell("assert True")
    write_chapter(folder, "01_one.md", first, section(other))
    write_chapter(folder, "02_two.md", proof, section(row), second)
    return read_chapters(folder)


def section(*rows):
    """A table "Paper and code"."""
    table = "\n".join([HEADER, "|---|---|---|---|", *rows])
    return f"\n## Paper and code\n\n{table}\n\n## Exercises\n"


def test_the_page_is_what_the_chapters_say():
    text = write_page(read_chapters())
    assert PAGE.read_text("utf-8") == text, "run `python tools/ledger.py`"


def test_every_chapter_is_on_the_page_with_all_its_rows():
    text = PAGE.read_text("utf-8")
    links = re.findall(r"\[assert\]\(([^()#]+)#", text)
    for chapter in read_chapters():
        own = OWN.findall(chapter.path.read_text("utf-8"))
        assert len(own) == links.count(chapter.path.name) > 0
    assert f"**{len(links)} rows**" in text
    counts = re.findall(r"^\| [\w -]+ \| [^|]+ \| (\d+) \|$", text, re.M)
    assert sum(map(int, counts)) == len(links)


def test_rows_are_grouped_by_chapter_and_link_to_it(tmp_path):
    text = write_page(book(tmp_path))
    heading, row = "## [Chapter 2: Build two](02_two.md)", "02_two.md#one-"
    first = text.index("01_one.md#other")
    assert first < text.index(heading) < text.index(row)
    assert "| t5x | its successor in JAX, with flaxformer | 1 |" in text


def test_names_of_sources_are_spelled_alike(tmp_path):
    row = ROW.replace("t5x", "`transformers` 5.23, `x.py`")
    text = write_page(book(tmp_path, row))
    assert "| transformers 5.23, `x.py` | divides |" in text


@pytest.mark.parametrize(
    "source", ["t5, counts", "T5 1.1", "Ba et al. 2016", "PyTorch's norm"]
)
def test_sources_that_are_known(tmp_path, source):
    assert f"| {source} |" in write_page(
        book(tmp_path, ROW.replace("t5x", source))
    )


HEADING = PROOF_CELL.replace("The product:", "# The product")
WRONG = {
    "no link": (ROW.replace("(#one-product)", ""), PROOF_CELL),
    "has 3 columns and not 4": (ROW.replace("| divides ", ""), PROOF_CELL),
    "has no such label": (ROW.replace("one-product", "other"), PROOF_CELL),
    "but has no such label": (ROW, ""),
    "asserts nothing": (ROW, PROOF_CELL.replace("assert 2", "2")),
    "no code cell follows": (ROW, HEADING),
    "is twice in 02_two.md": (ROW, 2 * PROOF_CELL),
    "is twice in 01_one.md and 02_two.md": (
        ROW,
        PROOF_CELL + "\n(other)=\n",
    ),
    "does not begin with a known source": (
        ROW.replace("t5x", "huggingface"),
        PROOF_CELL,
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(tmp_path, message):
    row, proof = WRONG[message]
    with pytest.raises(BookError, match=message):
        write_page(book(tmp_path, row, proof))


def test_an_assert_in_a_later_cell_proves_nothing(tmp_path):
    proof = PROOF_CELL.replace("assert 2", "2") + cell("assert True")
    with pytest.raises(BookError, match="asserts nothing"):
        write_page(book(tmp_path, proof=proof))


def test_every_chapter_needs_its_table(tmp_path, capsys):
    book(tmp_path)
    write_chapter(tmp_path, "03_three.md", "\nNothing.\n")
    write_chapter(tmp_path, "04_four.md", section()[:-20])
    assert main([f"--folder={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "03_three.md has no table" in error
    assert "04_four.md has no table" in error
    assert not (tmp_path / "paper_and_code.md").exists()


def test_the_command_writes_the_page(tmp_path):
    chapters = book(tmp_path)
    assert main([f"--folder={tmp_path}"]) == 0
    page = tmp_path / "paper_and_code.md"
    assert page.read_text("utf-8") == write_page(chapters)
