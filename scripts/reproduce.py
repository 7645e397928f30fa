"""Run the rows of a table, measure them with one protocol, and write the table: .md, .json, .html and a picture.

    python scripts/reproduce.py configs/tables/digits-demo.yaml --out runs/digits-demo

The float row comes first; if it misses its published value by more than 5 %, the command stops (--force continues and
flags it). Every row has its own run folder; repeating the command continues where it stopped. ``--rows 'float,linear
W4A8'`` runs only these rows; the table then shows them and all rows finished earlier.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("table", help="a file of configs/tables")
    parser.add_argument("--out", help="folder for the runs and the table (default: runs/<name of the file>)")
    parser.add_argument("--device", help="passed on to the runs")
    parser.add_argument("--extractor", help="feature extractor (default: the model config's)")
    parser.add_argument("--extractor-weights", help="weights file of the extractor")
    parser.add_argument("--rows", help="labels of the rows to run, separated by commas (default: all)")
    parser.add_argument(
        "--results",
        help="folder that keeps the numbers and first images of every row; rows whose results are there, by the same "
        "protocol, are not run again, and shown",
    )
    parser.add_argument("--document", help="markdown file whose block '<!-- table NAME -->' becomes the table")
    parser.add_argument("--force", action="store_true", help="continue if the float row misses its published value")
    parser.add_argument(
        "--published",
        action="store_true",
        help="run nothing: print the papers' numbers alone, every row marked as not run (also to --document)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the rows as JSON and stop")
    args = parser.parse_args(arguments)

    from qdiff.cli.document import DocumentBlock
    from qdiff.cli.published_numbers import published_markdown
    from qdiff.cli.table import TableRun
    from qdiff.cli.table_file import TableFile
    from qdiff.errors import UserError

    file = TableFile(args.table, args.out)
    block = None if args.document is None else DocumentBlock(args.document, file.path.stem)
    if args.published:
        if args.rows is not None:
            raise UserError("--published writes the numbers of all rows; leave --rows out")
        text = published_markdown(file)
        print(text)
        if block is not None:
            block.replace(text)
        return
    table = TableRun(file, args.device, args.extractor, args.extractor_weights, args.rows, args.force, args.results)
    if args.dry_run:
        table.print_commands()
        return
    text = table.run()
    if block is not None:
        block.replace(text)


if __name__ == "__main__":
    main()
