"""The block of a table in a document."""

from __future__ import annotations

import pytest

from qdiff.cli.document import DocumentBlock
from qdiff.errors import UserError

BEGIN, END = "<!-- table digits -->", "<!-- end of table digits -->"
OTHER = "<!-- table digits-vq -->\nkept\n<!-- end of table digits-vq -->"


def test_only_the_block_is_replaced(tmp_path):
    file = tmp_path / "results.md"
    before, after = f"# Results — ε\n\n{OTHER}\n\n", "\n\nThe end.  \n\n"
    file.write_text(f"{before}{BEGIN}\nold\n\nold\n{END}{after}", encoding="utf-8")
    DocumentBlock(file, "digits").replace("\n| a |\n| - |\n\n")
    assert file.read_text(encoding="utf-8") == f"{before}{BEGIN}\n| a |\n| - |\n{END}{after}"
    DocumentBlock(file, "digits").replace("| b |")
    assert file.read_text(encoding="utf-8") == f"{before}{BEGIN}\n| b |\n{END}{after}"
    DocumentBlock(file, "digits-vq").replace("new")
    assert "kept" not in file.read_text(encoding="utf-8") and "| b |" in file.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["results.md"]


def test_what_is_edited_meanwhile_is_kept(tmp_path):
    file = tmp_path / "results.md"
    file.write_text(f"{BEGIN}\n{END}\n")
    block = DocumentBlock(file, "digits")
    file.write_text(f"Written while the table ran.\n{BEGIN}\n{END}\n")
    block.replace("x")
    assert file.read_text() == f"Written while the table ran.\n{BEGIN}\nx\n{END}\n"


@pytest.mark.parametrize(
    "text",
    ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}", f"{BEGIN}{END}{BEGIN}{END}",
     f"{END}{BEGIN}{END}", OTHER],
)  # fmt: skip
def test_marks_must_be_there_once_and_in_order(text, tmp_path):
    file = tmp_path / "results.md"
    file.write_text(text)
    with pytest.raises(UserError, match="once each") as caught:
        DocumentBlock(file, "digits")
    assert BEGIN in str(caught.value) and END in str(caught.value) and str(file) in str(caught.value)
    assert file.read_text() == text


def test_unreadable_files_are_told(tmp_path):
    with pytest.raises(UserError, match=r"none\.md cannot be read"):
        DocumentBlock(tmp_path / "none.md", "digits")
    with pytest.raises(UserError, match="cannot be read"):
        DocumentBlock(tmp_path, "digits")
    (tmp_path / "latin.md").write_bytes(b"\xe4\xff")
    with pytest.raises(UserError, match="cannot be read"):
        DocumentBlock(tmp_path / "latin.md", "digits")
