"""A runtime of one's own is a row: ``--runtime`` chooses it, and parity and benchmarks know it."""

from __future__ import annotations

import pytest
from ddim_runs import SAMPLER, SCRIPT
from run_checks import image_bytes, manifest, succeeded

from qdiff.benchmark.files import NATIVE
from qdiff.benchmark.parity import compared_runtimes
from qdiff.benchmark.variants import variants_of
from qdiff.deploy.runtime import Runtime
from qdiff.deploy.runtimes import RUNTIMES


class Watched(Runtime):
    """As ``torch``, and remembers what it was given."""

    given: list = []  # noqa: RUF012

    def prepare(self, qnn, cache_bytes=0):
        super().prepare(qnn, cache_bytes)
        self.given.append((qnn.is_packed, cache_bytes))


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(Watched, "given", [])
    monkeypatch.setitem(RUNTIMES, "watched", Watched(name="watched", takes_weight_cache=True))
    return Watched.given


def options(tiny, run):
    return (
        *tiny.options,
        *SAMPLER,
        "--ptq",
        "--weight_bit",
        4,
        "--split",
        "--cali_ckpt",
        run / "quantized.safetensors",
    )


@pytest.mark.slow
def test_it_samples(call, tiny, weights_only_run, watched, tmp_path):
    words = options(tiny, weights_only_run)
    succeeded(call(SCRIPT, *words, "--runtime", "watched", "--weight_cache", 1, "-l", tmp_path))
    assert watched == [(True, 2**20)]
    assert manifest(tmp_path)["config"]["runtime"] == "watched"
    assert image_bytes(tmp_path) == image_bytes(weights_only_run)
    # Planted: another row is another runtime.
    succeeded(call(SCRIPT, *words, "--runtime", "torch", "-l", tmp_path / "torch"))
    assert len(watched) == 1


def test_it_is_checked_before_work(call, tiny, watched, tmp_path):
    line = call(SCRIPT, *tiny.options, *SAMPLER, "--runtime", "watched", "-l", tmp_path).error_line()
    assert "--runtime watched needs quantized weights; add --ptq" in line
    assert watched == []


def test_without_its_row_it_is_an_error(call, tiny, tmp_path):
    line = call(SCRIPT, *tiny.options, *SAMPLER, "--runtime", "watched", "-l", tmp_path).error_line()
    assert "invalid choice: 'watched'" in line


def test_parity_and_benchmarks_read_the_row(watched):
    assert compared_runtimes() == ["torch", "torch-int8", "onnxruntime", "openvino", "watched"]
    (variant,) = variants_of(RUNTIMES["watched"]).values()
    assert variant.file == NATIVE and variant.is_simulation
