"""Progress in log files: few lines, which say how much is done and how long the rest takes."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest

from qdiff.io import progress
from qdiff.io.progress import INTERVAL, Lines, duration, progress_bar, tracked

REPOSITORY = Path(__file__).parents[3]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lines_of(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def bar_on(clock, total=1000, initial=0, unit="it", unit_scale=False):
    file = io.StringIO()
    return Lines(total, "calibrating", unit, initial, unit_scale, file, clock), file


def test_a_line_at_most_every_interval_and_one_at_the_end(clock):
    bar, file = bar_on(clock)
    with bar:
        for _ in range(800):  # eight updates a second
            clock.now += 0.125
            bar.update(1.25)
    assert lines_of(file) == [
        "calibrating: 30 % (300 of 1000 it), 1 min 10 s left",
        "calibrating: 60 % (600 of 1000 it), 40 s left",
        "calibrating: 90 % (900 of 1000 it), 10 s left",
        "calibrating: 100 % (1000 of 1000 it), took 1 min 40 s",
    ]


def test_a_slow_loop_writes_a_line_for_each_step(clock):
    bar, file = bar_on(clock, total=3)
    with bar:
        for _ in range(3):
            clock.now += 3600
            bar.update()
    assert [line.rpartition(", ")[2] for line in lines_of(file)] == [
        "2 h 0 min left",
        "1 h 0 min left",
        "0 s left",
        "took 3 h 0 min",
    ]


def test_what_was_done_before_does_not_shorten_the_time_left(clock):
    bar, file = bar_on(clock, total=100, initial=90)
    clock.now += INTERVAL
    bar.update(1)
    assert lines_of(file) == ["calibrating: 91 % (91 of 100 it), 4 min 30 s left"]


def test_time_left_is_of_the_speed_since_the_last_line(clock):
    """Units that a journal restores come in one jump; they say nothing of the others."""
    bar, file = bar_on(clock)
    bar.update(500)
    clock.now += INTERVAL
    bar.update(1)
    clock.now += INTERVAL
    bar.update(1)
    assert lines_of(file)[1] == f"calibrating: 50 % (502 of 1000 it), {duration(498 * INTERVAL)} left"


def test_the_note_is_shown(clock):
    bar, file = bar_on(clock)
    bar.set_postfix_str("weights of up.1", refresh=False)
    clock.now += INTERVAL
    bar.update(250)
    assert lines_of(file) == ["calibrating: 25 % (250 of 1000 it), 1 min 30 s left, weights of up.1"]


def test_an_error_is_no_end(clock):
    bar, file = bar_on(clock)
    clock.now = 5
    with pytest.raises(RuntimeError), bar:
        bar.update(999)
        raise RuntimeError
    assert lines_of(file) == ["calibrating: 99 % (999 of 1000 it), stopped after 5 s"]
    bar.close()
    assert len(lines_of(file)) == 1


def test_shares_of_a_unit_add_up_to_all_of_it(clock):
    bar, file = bar_on(clock, total=1)
    with bar:
        for _ in range(10):
            bar.update(0.1)  # 0.9999999999999999
    assert lines_of(file) == ["calibrating: 100 % (1 of 1 it), took 0 s"]


@pytest.mark.parametrize(
    ("total", "expected"),
    [(None, "calibrating: 3.15MB, took 0 s"), (3_145_728, "calibrating: 100 % (3.15M of 3.15MB), took 0 s")],
)
def test_bytes_of_known_and_unknown_number(clock, total, expected):
    bar, file = bar_on(clock, total=None, unit="B", unit_scale=True)
    bar.total = total  # which a download learns after it began
    bar.update(3_145_728)
    bar.close()
    assert lines_of(file) == [expected]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_file_lines(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(3, "sampling", "img") as bar:
            bar.update(3)
    assert "\r" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert file.getvalue() == "sampling: 100 % (3 of 3 img), took 0 s\n"


def test_nothing_is_shown_where_that_was_asked_for(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(3, disable=True) as bar:
            bar.update()
            bar.set_postfix_str("note")
        assert stream.getvalue() == ""


def test_tracked_yields_all_and_counts(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    assert list(tracked("abc", "reading", "file")) == ["a", "b", "c"]
    assert file.getvalue() == "reading: 100 % (3 of 3 file), took 0 s\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (90_000, "25 h 0 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def importing_tqdm(text: str) -> bool:
    names = [
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    return any(name.partition(".")[0] == "tqdm" for name in names)


@pytest.mark.slow
def test_no_loop_has_a_bar_of_its_own():
    assert importing_tqdm("from tqdm.auto import tqdm")
    files = [p for folder in ("qdiff", "ldm", "ddim", "scripts") for p in (REPOSITORY / folder).rglob("*.py")]
    found = [p for p in files if importing_tqdm(p.read_text())]
    assert found == [Path(progress.__file__)]
