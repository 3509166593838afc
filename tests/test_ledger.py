"""The page "Paper and code": what the chapters say, with proofs that exist."""

import pytest

from book import BookError, read_chapters
from ledger import HEADER, HEADING, main, write_page
from tests.small_book import ROOT, cell, make_book

ROW = r"| t5x | divides \| halves | multiplies | [assert](#product) |"
PROOF = "\n(product)=\nThe product:\n" + cell("assert 2 * 3 == 6")


def table(*rows):
    """A section "Paper and code"."""
    return "\n".join([f"\n{HEADING}\n", HEADER, "|---|---|---|---|", *rows, "\n## Next\n"])


def page(root, row=ROW, proof=PROOF):
    """The page of a book of two chapters, whose second has this row and proof."""
    first = [table(ROW.replace("product", "other")), PROOF.replace("product", "other")]
    return write_page(read_chapters(make_book(root, one=first, two=[table(row), proof])))


def test_the_page_is_what_the_chapters_say():
    text = (ROOT / "chapters" / "paper_and_code.md").read_text("utf-8")
    assert write_page(read_chapters()) == text, "run `python tools/ledger.py`"


def test_rows_are_grouped_by_chapter_and_link_to_it(tmp_path):
    text = page(tmp_path)
    heading, row = "\n## [Build two](two.md)\n", ROW.replace("(#", "(two.md#")
    assert text.index("(one.md#other)") < text.index(heading) < text.index(row)
    assert "**2 rows**" in text


WRONG = {
    "no link": (ROW.replace("(#product)", ""), PROOF),
    "three columns": (ROW.replace("| multiplies ", ""), PROOF),
    "no such label": (ROW, ""),
    "a label of another chapter": (ROW.replace("product", "other"), PROOF),
    "no assert": (ROW, PROOF.replace("assert 2", "2")),
    "the assert is in a later cell": (
        ROW, PROOF.replace("assert 2", "2") + cell("assert True")
    ),
    "a heading in between": (ROW, PROOF.replace("The product:", "# The product")),
    "no rows": ("", PROOF),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused(tmp_path, what):
    with pytest.raises(BookError, match=r"two\.md"):
        page(tmp_path, *WRONG[what])


def test_the_command_writes_the_page_or_says_all_that_is_wrong(tmp_path, capsys):
    text = page(tmp_path)
    assert main([f"--root={tmp_path}"]) == 0
    path = tmp_path / "chapters" / "paper_and_code.md"
    assert path.read_text("utf-8") == text
    empty = f"\n{HEADING}\n"
    make_book(tmp_path, three=[empty], four=[empty], five=[])
    assert main([f"--root={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "three.md" in error and "four.md" in error and "five.md" not in error
    assert path.read_text("utf-8") == text
