"""Prompts end at newlines alone."""

from __future__ import annotations

import pytest

from qdiff.io.prompt_lines import prompt_lines


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\f", "\v", "\x1c", "\x1d", "\x1e", "\x85"])
def test_other_separators_stay_inside_a_prompt(inside):
    assert prompt_lines(f"a{inside}b\nc") == [f"a{inside}b", "c"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_newlines_of_every_system_end_a_prompt(end):
    assert prompt_lines(f" a {end}{end} {end}b") == ["a", "b"]
