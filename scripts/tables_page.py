"""Write one HTML page of several tables, from what scripts/reproduce.py left in their folders; nothing is run.

    python scripts/tables_page.py configs/tables/leaderboard-*.yaml --out docs/leaderboard.html --title Leaderboard

Each table has the first images of every row, its numbers, plots of quality against time and against size, and its
protocol. Tables without results are listed as not yet run.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from pathlib import Path

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="+", metavar="table", help="files of configs/tables, in the order shown")
    parser.add_argument("--out", required=True, help="the HTML file")
    parser.add_argument("--runs", default="runs", help="folder with the tables' folders (default: %(default)s)")
    parser.add_argument("--title", default="Results", help="heading of the page (default: %(default)s)")
    args = parser.parse_args(arguments)

    from qdiff.cli.table_file import TableFile
    from qdiff.cli.tables_page import tables_page

    files = [TableFile(table, Path(args.runs) / Path(table).stem) for table in args.tables]
    missing = tables_page(Path(args.out), args.title, files)
    print(f"Page: {args.out}" + "".join(f"\nNot yet run: {title}" for title in missing))


if __name__ == "__main__":
    main()
