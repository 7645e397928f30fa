"""Tables in markdown: with a head, as more lines of one, and with cells that would end early."""

from __future__ import annotations

from qdiff.io.markdown import markdown_table


def test_a_table():
    assert (
        markdown_table([("a", "1"), ("b", "2")], ["", "count"]) == "|  | count |\n| --- | --- |\n| a | 1 |\n| b | 2 |"
    )


def test_lines_of_a_table():
    assert markdown_table(["ab", "cd"]) == "| a | b |\n| c | d |"


def test_a_cell_stays_one_cell():
    assert markdown_table([["--a_range mse|ema", "x"]]) == "| --a_range mse/ema | x |"
