"""Tables of published numbers, without a run."""

from __future__ import annotations

import pytest
import yaml

from qdiff.cli.published_numbers import published_markdown
from qdiff.cli.table_file import TableFile
from qdiff.errors import UserError
from qdiff.io.repository import REPOSITORY

TABLES = REPOSITORY / "configs" / "tables"
PAGE = REPOSITORY / "docs" / "papers.md"


def table(tmp_path, rows: list[dict], **more) -> TableFile:
    spec = yaml.safe_load((TABLES / "digits.yaml").read_text())
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**spec, "rows": rows, "source": "A paper", **more}))
    return TableFile(tmp_path / "t.yaml")


def test_rows_with_numbers_are_marked_as_not_run_and_the_others_named(tmp_path):
    rows = [
        {"label": "float", "published": {"fid": 4.22}},
        {"label": "W4", "options": "--ptq --weight_bit 4", "published": {"sfid": 9.0}, "unverified": True},
        {"label": "W3", "options": "--ptq --weight_bit 3"},
    ]
    assert published_markdown(table(tmp_path, rows, notes=["One note."])) == (
        "|  | FID (paper) ↓ | sFID (paper) ↓ | measured here |\n"
        "| --- | --- | --- | --- |\n"
        "| float | 4.22 | – | not run |\n"
        "| W4 | – | 9.00 | not run |\n\n"
        "Published numbers: A paper.\n\n"
        "Rows without a published number, not run either: W3.\n\n"
        "One note.\n\n"
        "Published numbers quoted from memory of the paper, to be verified: W4.\n"
    )


def test_a_table_without_published_numbers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"t\.yaml has no published numbers"):
        published_markdown(table(tmp_path, [{"label": "float"}]))


@pytest.mark.parametrize("file", sorted(TABLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_page_of_the_papers_has_every_published_number(file):
    one, page = TableFile(file), PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- table {file.stem} -->\n", f"\n<!-- end of table {file.stem} -->"
    if any(row.published for row in one.rows):
        assert page.partition(begin)[2].partition(end)[0] == published_markdown(one).strip()
        assert f"## {one.title}\n\n`configs/tables/{file.name}`\n\n{begin}" in page
    else:
        assert begin not in page
