"""A model family of one's own is a network, a pipeline and a row: the scripts' flow runs it; qdiff is not touched."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from families import SCRIPTS

from qdiff.cli.script import Script, parser_like, sampling_script
from qdiff.errors import UserError
from qdiff.pipeline import Pipeline
from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule

EXAMPLE = Path(__file__).parents[2] / "examples" / "quantize_your_module.py"
SHAPE = (1, 8, 8)


def network() -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("quantize_your_module", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Denoiser().eval()


class ThreeConvolutions(Pipeline):
    """The network of the example with a sampler of a few steps."""

    @classmethod
    def from_args(cls, args):
        schedule = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 5e-4, 1000))
        sampler = Sampler(schedule, SHAPE, SamplerOptions(steps=args.steps), args.seed)
        made = cls("three", sampler, args.images, args.batch_size or 2)
        made.config = {"weights": "random", "sampler": {"steps": args.steps}, "images": args.images}
        return made

    def build_network(self):
        with torch.device("meta"):
            return network(), None

    def load(self, device, network=True):
        self.network = globals()["network"]() if network else self.build_network()[0]
        self.move_to(device)

    def move_to(self, device):
        self.device = device
        self.network.to(device)


def add_options(parser):
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setitem(sys.modules, "three_convolutions", sys.modules[__name__])
    return Script("sample_three", add_options, "three_convolutions:ThreeConvolutions")


def run(row, *words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        sampling_script(row, "A family of one's own.")([str(word) for word in words])
    return out.getvalue()


def test_it_is_quantized_and_sampled(row, tmp_path):
    quantized = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--cali_st", 2, "--cali_n", 4)
    few = ("--cali_iters", 2, "--cali_iters_a", 2, "--device", "cpu")
    run(row, *quantized, *few, "-l", tmp_path / "run")
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert made["status"] == "finished" and made["config"]["method"] == "qdiff"
    assert len(made["reconstruction_errors"]) == 6  # three layers, weights and activations
    assert made["activation_quantizers"] == {"total": 3, "silent": []}
    assert len(list((tmp_path / "run" / "img").glob("*.png"))) == 3
    before = (tmp_path / "run" / "img" / "00001.png").read_bytes()
    loaded = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--device", "cpu")
    run(row, *loaded, "--cali_ckpt", tmp_path / "run" / "quantized.safetensors", "--resume", "-l", tmp_path / "again")
    assert (tmp_path / "again" / "img" / "00001.png").read_bytes() == before


def test_other_commands_name_it(row):
    scripts = {**SCRIPTS, row.name: row}
    words = ["--like", "sample_three", "--steps", "8"]
    args = parser_like(None, words, scripts).parse_args(words)
    args.batch_size = None
    assert scripts[args.like].pipeline_of(args).calls == 8
    with pytest.raises(UserError, match="sample_three"):
        parser_like(None, words, SCRIPTS).parse_args(words)  # without its row
