"""Evaluation on the virtual GPU: the numbers of the CPU."""

from __future__ import annotations

import json

import pytest
from digit_sets import PROMPTS, digits, write_clip, write_npz, write_run
from threadpoolctl import threadpool_limits

pytestmark = pytest.mark.slow

SAME = 1e-6  # relative


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    with threadpool_limits(1):
        yield


def measured(call, *words) -> dict:
    outcome = call("evaluate", *words, "--no-cache", "--json", "-")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_metrics_and_clip_score_are_those_of_the_cpu(call, cuda, tmp_path):
    real = write_npz(tmp_path / "real.npz", digits(0, 40))
    run = write_run(tmp_path / "run", digits(40, 50), prompts=PROMPTS * 2)
    words = (real, run, "--extractor", "digits-classifier", "--metrics", "fid,isc,kid", "--batch_size", 5)
    words += ("--clip", "--clip-model", write_clip(tmp_path / "clip"))
    with cuda.counting() as counts:
        found = measured(call, *words, "--device", "cuda")
    assert counts.launches > 0
    wanted = measured(call, *words, "--device", "cpu")
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for name, value in wanted["metrics"].items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=SAME)
        assert found["metrics"][name] == same, name
    assert found["metrics"]["fid"] > 1 and any("clip" in name for name in found["metrics"])
