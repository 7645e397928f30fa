"""Networks of one's own, exported: attention with every argument, a call of their own, a layer in several places."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from exact_runtimes import require_runtimes
from following import RUNTIMES, Followed, relative
from torch import Tensor, nn

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.deploy.onnx_export import export_onnx
from qdiff.deploy.onnx_network import OnnxNetwork
from qdiff.interface import AttentionCore
from qdiff.quant_attention import QuantAttention
from qdiff.quant_model import QuantModel

pytestmark = pytest.mark.slow

SUM_TOLERANCE, LEVEL_TOLERANCE = 2e-5, 1.5e-3  # relative L2, as in test_onnx_networks.py
SUMS_ALONE = 3e-6  # relative L2, as in test_onnx_leaves.py
CHANNELS, SIDE = 4, 4
TOKENS = SIDE * SIDE
LOWER = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
WITHOUT_FIRST = LOWER & (torch.arange(TOKENS) > 0)  # the first query sees no key
ARGUMENTS = {
    "scale": {"scale": 1.3},
    "causal": {"is_causal": True},
    "scale and causal": {"scale": 0.2, "is_causal": True},
    "added mask": {"attn_mask": torch.where(LOWER, 0.5, -1.5), "scale": 0.9},
    "no key": {"attn_mask": WITHOUT_FIRST},
}


class Attention(nn.Module):
    def __init__(self, arguments: dict) -> None:
        super().__init__()
        self.arguments = arguments
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, CHANNELS)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(2 * q, 2 * k, v, **self.arguments)[:, 0]


class MaskPerSample(Attention):
    """A sample sees its first keys, more of them at a later timestep."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.arguments = {"attn_mask": torch.arange(TOKENS) < 2 + t[:, None, None, None] / 100}
        return super().forward(x)


class OwnNetwork(nn.Module):
    """Attention of every kind beside each other; one layer has two names and a second place."""

    def __init__(self, kinds: tuple[str, ...] = tuple(ARGUMENTS)) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.attention = nn.ModuleList(Attention(ARGUMENTS[kind]) for kind in kinds)
        self.per_sample = MaskPerSample({})
        self.mix = self.again = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.elsewhere = nn.Sequential(self.mix)
        self.conv_out = nn.Conv2d(CHANNELS * (len(kinds) + 1), 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        h = self.conv_in(x) + (t / 1000)[:, None, None, None]
        h = self.again(torch.sin(self.mix(h))) + self.elsewhere(h)
        tokens = h.flatten(2).mT
        made = [*(attention(tokens) for attention in self.attention), self.per_sample(tokens, t)]
        return {"sample": self.conv_out(torch.cat(made, dim=-1).mT.unflatten(2, (SIDE, SIDE)))}


def call(network: nn.Module, *inputs: Tensor) -> Tensor:
    return network(*inputs)["sample"]


def inputs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, SIDE, SIDE, generator=generator), torch.arange(count) * (900 // count)


def wrapped(network: nn.Module, **config: int | None) -> QuantModel:
    made = QuantModel(network.eval(), QuantConfig(**config), inputs(2, 1), call=call)
    qdiff.calibrate(made, CalibrationSet(inputs(12, 1)), "linear", run=CalibrationRun(show_progress=False))
    return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    require_runtimes()
    torch.manual_seed(0)
    qnn, path = wrapped(OwnNetwork(), weight_bits=8, act_bits=8), tmp_path_factory.mktemp("own") / "model.onnx"
    assert sum(isinstance(module, QuantAttention) for module in qnn.modules()) == len(ARGUMENTS) + 1
    export_onnx(qnn, path, (1, SIDE, SIDE))
    return qnn, path


@contextmanager
def planted(holder: dict, name: str, value: object):
    """Have a call get another argument inside the block."""
    before = holder[name]
    holder[name] = value
    try:
        yield
    finally:
        holder[name] = before


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_attention_has_its_scale_its_order_and_its_mask(runtime, exported):
    qnn, path = exported
    followed, given = Followed(path, runtime), inputs(3, seed=5)  # three samples: the export's example has two
    found = followed.differences(qnn, *given)
    assert found.sums() < SUM_TOLERANCE and found.levels() < LEVEL_TOLERANCE
    for kind, attention in zip(ARGUMENTS, qnn.model.attention, strict=True):
        for name in attention.arguments:
            with planted(attention.arguments, name, False if name == "is_causal" else None):
                wrong = followed.differences(qnn, *given)
            assert max(wrong.sums(), wrong.levels()) > LEVEL_TOLERANCE, (kind, name)


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_network_of_its_own_arithmetic(runtime, tmp_path):
    """Without quantized activations nothing rounds, so sums alone differ: also of a layer with several places."""
    require_runtimes()
    torch.manual_seed(0)
    qnn, path, given = wrapped(OwnNetwork(("causal",)), weight_bits=3), tmp_path / "model.onnx", inputs(3, seed=5)
    export_onnx(qnn, path, (1, SIDE, SIDE))
    found = OnnxNetwork(path, runtime)(*given)
    with qnn.quantized():
        assert relative(found, qnn(*given)) < SUMS_ALONE
    with qnn.quantized():
        qnn.model.again.weights_quantized = False  # planted: the layer computes with its float weight
        assert relative(found, qnn(*given)) > 100 * SUMS_ALONE


class Cores(nn.Module):
    """Attention that was written with `AttentionCore`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.core = nn.Conv2d(1, CHANNELS, 3, padding=1), AttentionCore(prescale=True)
        self.core.causal, self.core.scale = True, 1.3

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = (self.conv_in(x) + (t / 1000)[:, None, None, None]).flatten(2).mT[:, None]
        return self.core(2 * tokens, tokens, tokens)[:, 0].mT.unflatten(2, (SIDE, SIDE))


@torch.no_grad()
def test_a_core_has_its_scale_and_order_though_no_call_sets_them(tmp_path):
    require_runtimes()
    torch.manual_seed(0)
    qnn, path, given = QuantModel(Cores(), QuantConfig(8, 8)), tmp_path / "model.onnx", inputs(3, seed=5)
    qdiff.calibrate(qnn, CalibrationSet(inputs(12, 1)), "linear", run=CalibrationRun(show_progress=False))
    export_onnx(qnn, path, (1, SIDE, SIDE))
    followed = Followed(path, "onnxruntime")
    found = followed.differences(qnn, *given)
    assert found.sums() < SUM_TOLERANCE and found.levels() < LEVEL_TOLERANCE
    for name, value in (("causal", False), ("scale", None)):
        with planted(vars(qnn.model.core), name, value):
            wrong = followed.differences(qnn, *given)
        assert max(wrong.sums(), wrong.levels()) > LEVEL_TOLERANCE, name
