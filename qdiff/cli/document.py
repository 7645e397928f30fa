"""Update the tables of a document from runs: the block between two marks is replaced by the table."""

from __future__ import annotations

from pathlib import Path

from qdiff.errors import UserError
from qdiff.io.files import check_writable, written_whole


class DocumentBlock:
    """The lines between ``<!-- table NAME -->`` and ``<!-- end of table NAME -->`` in a markdown file.

    Raises:
        UserError: the file cannot be read, or does not have both marks, once each and in this order.
    """

    def __init__(self, file: str | Path, name: str) -> None:
        self.file = Path(file)
        self.begin, self.end = f"<!-- table {name} -->", f"<!-- end of table {name} -->"
        self._parts()
        check_writable(self.file)

    def _parts(self) -> tuple[str, str]:
        try:
            text = self.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.file} cannot be read ({error}); give a markdown file") from error
        before, begin, rest = text.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not (begin and end) or self.begin in rest or self.end in before + after:
            raise UserError(f"{self.file} needs the lines '{self.begin}' and '{self.end}', once each; add them")
        return before, after

    def replace(self, text: str) -> None:
        """Put ``text`` between the marks; the rest of the file stays as it is."""
        before, after = self._parts()
        with written_whole(self.file) as path:
            path.write_text(f"{before}{self.begin}\n{text.strip()}\n{self.end}{after}", encoding="utf-8")
