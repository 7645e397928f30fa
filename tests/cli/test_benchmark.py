"""The benchmark's turns, ratios and table, on calls whose time is known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from qdiff.cli import benchmark
from qdiff.config import QuantConfig, RangeMethod
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel


class Clock:
    """Moves on by what each call takes."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float):
        left = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += left.pop(0)

        return call


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x)


@pytest.fixture
def network():
    torch.manual_seed(0)
    qnn = QuantModel(Scaled(), QuantConfig(4))
    qnn.layers()["layer"].init_weight_ranges(RangeMethod.MIN_MAX)
    return benchmark.Network(Scaled().eval(), qnn, None, None, (torch.randn(2, 1, 4, 4), torch.zeros(2)), 77)


def test_variants_take_turns_and_the_first_turn_does_not_count():
    clock = Clock()
    calls = {"a": clock.taking("a", 100, 1, 2, 3), "b": clock.taking("b", 100, 4, 4, 4)}
    assert benchmark.alternated(calls, 3, clock) == {"a": [1, 2, 3], "b": [4, 4, 4]}
    assert "".join(clock.order) == "abababab"


def test_rows_say_what_was_measured_and_nothing_else(network, monkeypatch):
    seconds = {"torch": [0.4, 0.4, 0.8], "simulated": [0.2, 0.1, 0.2]}
    monkeypatch.setattr(benchmark, "alternated", lambda calls, repeats: {n: seconds[n] for n in calls})
    monkeypatch.setattr(benchmark, "peak_of", lambda network, name, threads: 1000)

    def broken(network, threads):
        raise RuntimeError("no compiler | here\nmore")

    monkeypatch.setitem(benchmark.VARIANTS, "torch-compile", broken)
    float_row, planted, simulated = benchmark.measure(network, ["torch", "torch-compile", "simulated"], 3, 1, calls=10)
    assert (float_row.latency_s, float_row.ratio, float_row.file_bytes) == (0.4, 1.0, 4 * (2 * 9 + 2))
    assert (simulated.latency_s, simulated.file_bytes, simulated.peak_bytes) == (0.2, 77, 1000)
    # Turn by turn 2, 4 and 4.
    assert (simulated.ratio, simulated.ratio_low, simulated.ratio_high) == (2.0, 3.0, 4.0)
    assert simulated.images_per_s == pytest.approx(2 / (0.2 * 10))
    assert planted.latency_s is None and planted.note == "RuntimeError: no compiler | here"
    about = {"model": "tiny", "quant": "W4A32", "batch": 2, "calls": 10, "repeats": 3, "date": "today"}
    text = benchmark.markdown([float_row, planted, simulated], about | {"machine": benchmark.machine(1)})
    lines = text.splitlines()
    assert lines[2].startswith("| torch | 400 (400–600) ms | 1.00 (1.00–1.00) | 0.5 |")
    assert lines[3] == "| torch-compile | not measured: RuntimeError: no compiler / here | – | – | – | – |"
    assert "2.00 (3.00–4.00)" in lines[4]


def test_no_ratio_without_its_base(network, monkeypatch):
    monkeypatch.setattr(benchmark, "peak_of", lambda *_: None)
    (row,) = benchmark.measure(network, ["simulated"], 2, 1, calls=1)
    assert row.latency_s > 0 and row.ratio is None


def test_memory_is_that_of_a_fresh_process(network):
    kept = torch.ones(100 << 20)  # 400 MB here are not there
    there = benchmark.peak_of(network, "simulated", 1)
    assert 50e6 < there < 1.5e9 and kept[0] == 1
    more = benchmark.Network(
        network.float_network, network.qnn, None, None, (torch.ones(64, 1, 512, 512), torch.zeros(64))
    )
    assert benchmark.peak_of(more, "simulated", 1) > there + 60e6


def test_names_of_variants():
    assert benchmark.chosen_variants(None) == list(benchmark.VARIANTS)
    assert benchmark.chosen_variants("openvino, torch,openvino") == ["openvino", "torch"]
    with pytest.raises(UserError, match="no 'tensorrt'; choose from torch, "):
        benchmark.chosen_variants("torch,tensorrt")


def test_json_holds_every_number(tmp_path):
    benchmark.write_json(tmp_path / "out.json", [benchmark.Row("torch", 0.5)], {"batch": 8})
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["batch"] == 8 and found["rows"][0]["latency_s"] == 0.5 and found["rows"][0]["ratio"] is None
