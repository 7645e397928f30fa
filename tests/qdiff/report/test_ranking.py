"""Best and equal rows among those of the same widths."""

from __future__ import annotations

import pytest

from qdiff.evaluation.column import HIGHER, LOWER, Column
from qdiff.report.columns import COSTS, markdown
from qdiff.report.ranking import Standing, standings

ERROR = Column("e", "error", LOWER, "{:.1f}".format)
PSNR = Column("e", "PSNR", HIGHER, "{:.1f}".format)
B, E, N = Standing.BEST, Standing.EQUAL, Standing.OTHER


def row(value, std=0.0, seeds=3, bits=(4, 8)):
    return {"e": value, "e_std": std, "seeds": seeds, "weight_bits": bits[0], "act_bits": bits[1]}


def test_the_lowest_is_the_best_and_the_highest_of_what_should_be_high():
    rows = [row(1.0), row(2.0), row(3.0)]
    assert standings(ERROR, rows) == [B, N, N]
    assert standings(PSNR, rows) == [N, N, B]


@pytest.mark.parametrize(("value", "expected"), [(1.49, E), (1.51, N)])
def test_equal_within_the_spread_of_both(value, expected):
    """√(0.3² + 0.4²) = 0.5."""
    assert standings(ERROR, [row(1.0, 0.3), row(value, 0.4)]) == [B, expected]


def test_widths_do_not_compete():
    assert standings(ERROR, [row(1.0), row(2.0, bits=(4, 4)), row(3.0, bits=(4, 4))]) == [N, B, N]


def test_rows_outside_a_table_of_seeds_have_no_standing():
    assert standings(ERROR, [row(1.0, seeds=None), row(2.0), row(3.0)]) == [N, B, N]
    assert standings(ERROR, [row(None), row(2.0), row(3.0)]) == [N, B, N]


@pytest.mark.parametrize(("value", "expected"), [(0.69, E), (0.71, N)])
def test_a_row_of_one_seed_has_the_largest_deviation_of_its_widths(value, expected):
    """√(0.4² + 0.3²) = 0.5: neither the deviation of the other row alone (0.3) nor that of other widths (0.9)."""
    rows = [row(0.2, seeds=1), row(1.5, 0.4), row(value, 0.3), row(5.0, 0.9, bits=(4, 4))]
    assert standings(ERROR, rows) == [B, N, expected, N]


def test_without_a_second_seed_no_row_has_a_standing():
    wide = [row(3.0, bits=(8, 8)), row(4.0, bits=(8, 8))]
    assert standings(ERROR, [row(1.0, seeds=1), row(2.0, seeds=1), *wide]) == [N, N, B, N]


def test_what_is_not_a_number_has_no_standing():
    assert standings(ERROR, [row(float("nan")), row(1.0), row(2.0)]) == [N, B, N]
    assert standings(ERROR, [row(1.0), row(2.0), row(float("nan"))]) == [B, N, N]


def test_settings_are_not_ranked():
    bits = next(column for column in COSTS if column.key == "mean_weight_bits")
    assert standings(bits, [{**row(0), "mean_weight_bits": value} for value in (3.7, 4.0)]) == [N, N]


def test_marks_of_a_table():
    rows = [{"label": f"r{i}", **row(v, s)} for i, (v, s) in enumerate([(1e-3, 1e-4), (1.1e-3, 1e-4), (9e-3, 1e-4)])]
    for one in rows:
        one["noise_mse"], one["noise_mse_std"] = one["e"], one["e_std"]
    lines = markdown(rows).splitlines()
    assert lines[2:] == [
        "| r0 | **1.00e-03 ± 1.00e-04** |",
        "| r1 | 1.10e-03 ± 1.00e-04 = |",
        "| r2 | 9.00e-03 ± 1.00e-04 |",
    ]
