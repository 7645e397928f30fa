"""Sums behind layers without a bias: OpenVINO adds them at another place, which is wrong unless it is kept from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact_runtimes import SPLIT, require_runtimes
from following import RUNTIMES, relative
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod

pytestmark = pytest.mark.slow

require_runtimes()

TOLERANCE = 3e-6  # relative L2; the wrong sum is 1
SHAPE = (8, 6, 6)
LAYERS = {
    "conv": lambda bias: nn.Conv2d(8, 8, 3, padding=1, bias=bias),
    "pointwise": lambda bias: nn.Conv2d(8, 8, 1, bias=bias),
    "linear": lambda bias: nn.Linear(8, 8, bias=bias),
}
WEIGHTS = ({"weight_bits": 4}, {"weight_bits": 8, "weight_symmetric": True}, {"weight_bits": 8})
BIASES = {"none": False, "zeros": True, "some": True}


class Residuals(nn.Module):
    """x → h + layer(silu(h)) with h = layer(x), for every kind of layer and of its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict()
        for kind, made in LAYERS.items():
            for name, bias in BIASES.items():
                pair = nn.ModuleList([made(bias), made(bias)])
                if name == "zeros":
                    for layer in pair:
                        nn.init.zeros_(layer.bias)
                self.pairs[f"{kind}_{name}"] = pair

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        outputs = []
        for name, (first, second) in self.pairs.items():
            given = x.movedim(1, -1) if name.startswith("linear") else x
            hidden = first(given)
            out = hidden + second(F.silu(hidden))
            outputs.append(out.movedim(-1, 1) if name.startswith("linear") else out)
        return torch.cat(outputs, dim=1) + t[:, None, None, None]


@pytest.fixture(scope="module", params=WEIGHTS)
def exported(request, tmp_path_factory):
    """A network's file, its input and what it computes of it."""
    from qdiff.deploy.onnx_export import export_onnx

    torch.manual_seed(0)
    qnn = QuantModel(Residuals(), QuantConfig(**request.param, act_bits=8)).requires_grad_(False)
    for layer in qnn.layers().values():
        layer.init_weight_ranges(RangeMethod.MIN_MAX)
    for number, quantizer in enumerate(qnn.act_quantizers().values()):
        quantizer.set(torch.tensor(0.02 + 0.003 * number), torch.tensor(100 + number))
    path = tmp_path_factory.mktemp("residuals") / "model.onnx"
    export_onnx(qnn, path, SHAPE)
    given = torch.randn(2, *SHAPE), torch.zeros(2)
    with qnn.quantized():
        return path, given, dict(zip(qnn.model.pairs, qnn(*given).split(8, dim=1), strict=True))


@pytest.mark.parametrize("split", [False, True])
def test_a_residual_is_added_to_what_was_scaled(exported, split, monkeypatch):
    from qdiff.deploy import onnx_network

    if split:  # as where there is no VNNI, on every machine
        monkeypatch.setattr(onnx_network, "check_exact", lambda *runtime: SPLIT)
    path, given, expected = exported
    for runtime in RUNTIMES:
        out = onnx_network.OnnxNetwork(path, runtime)(*given).split(8, dim=1)
        for (name, wanted), there in zip(expected.items(), out, strict=True):
            assert relative(there, wanted) < TOLERANCE, (runtime, name)
