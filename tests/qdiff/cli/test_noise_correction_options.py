"""The options of noise correction: what they resolve to, and which combinations are refused."""

from __future__ import annotations

import pytest

from qdiff.cli.options.noise_correction import SAMPLES, CorrectionPlan, add_correction_options, resolve_correction
from qdiff.cli.options.parser import Parser
from qdiff.errors import UserError


def resolved(*words):
    parser = Parser(None)
    add_correction_options(parser)
    return resolve_correction(parser.parse_args([str(word) for word in words]))


def test_off_by_default():
    assert resolved() is None


def test_collected_in_the_run():
    assert resolved("--noise_correction", "d2") == CorrectionPlan("d2", "tensor", SAMPLES, None)
    found = resolved("--noise_correction", "ptqd", "--correction_samples", 7, "--correction_per", "channel")
    assert found.to_dict() == {"kind": "ptqd", "per": "channel", "samples": 7}


def test_from_a_file():
    assert resolved("--correction_path", "a.json").to_dict() == {"path": "a.json"}
    assert resolved("--correction_path", "a.json", "--noise_correction", "d2").kind == "d2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--noise_correction", "d3"), "invalid choice: 'd3'"),
        (("--correction_samples", 3), "--correction_samples has no meaning without --noise_correction"),
        (("--correction_per", "channel"), "--correction_per has no meaning without --noise_correction"),
        (("--noise_correction", "d2", "--correction_samples", 0), "--correction_samples is 0; give at least 1"),
        (("--correction_path", "a", "--correction_samples", 3), "--correction_samples is for collecting"),
    ],
)
def test_refused(words, message):
    with pytest.raises(UserError, match=message):
        resolved(*words)
