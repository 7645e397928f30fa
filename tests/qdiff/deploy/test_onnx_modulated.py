"""A network that modulates (MoDiff) as two exported models that take and give its state, against the simulated one."""

from __future__ import annotations

import pytest
import torch
from exact_runtimes import require_runtimes
from following import RUNTIMES, relative
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.deploy.onnx_export import export_onnx, first_step_path
from qdiff.deploy.onnx_network import OnnxNetwork, read_model
from qdiff.errors import UserError
from qdiff.interface import split_input
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod

pytestmark = pytest.mark.slow

require_runtimes()

# Relative L2 of ε at every step: float32 sums in another order. A change of the second layer's input that a last bit
# moves over a rounding edge would be 1e-4 at least; none of these inputs has one.
TOLERANCE = 3e-6
ONE_LEVEL = 1 + 1 / 15  # of 4 bits
STEPS, SHAPE = 4, (4, 5, 5)
LAYERS = ("conv", "split", "linear")


class ThreeLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.split = split_input(nn.Conv2d(6, 4, 3, padding=1), 2)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.split(torch.tanh(self.conv(x)))
        return self.linear(hidden.movedim(1, -1)).movedim(-1, 1) + t[:, None, None, None]


# Ranges: calibrated; dynamic per tensor; dynamic per sample, with the first step quantized too.
RANGES = {
    "w8": {"weight_bits": 8},
    "w4": {"weight_bits": 4},
    "w4-tensor": {"weight_bits": 4, "act_dynamic": True},
    "w8-sample-rest8": {"weight_bits": 8, "act_dynamic": True, "act_scale_per": "sample", "rest_bits": 8},
    "w4-rest8": {"weight_bits": 4, "rest_bits": 8},
}


def made(modulate: bool = True, **config: object) -> QuantModel:
    torch.manual_seed(0)
    config = QuantConfig(act_bits=4, modulate=modulate, split_shortcut=True, **config)
    qnn = QuantModel(ThreeLayers(), config)
    for layer in qnn.layers().values():
        layer.init_weight_ranges(RangeMethod.MIN_MAX)
    for number, quantizer in enumerate(qnn.act_quantizers().values()):
        quantizer.set(torch.tensor(0.05 + 0.011 * number), torch.tensor(7 + number % 3))
    return qnn.eval().requires_grad_(False)


def steps(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs of a trajectory: every step is a little away from the one before."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *SHAPE, generator=generator)
    moves = 0.2 * torch.randn(STEPS, count, *SHAPE, generator=generator)
    return [(x + moves[: i + 1].sum(0), torch.full((count,), float(STEPS - i))) for i in range(STEPS)]


def trajectory(network, inputs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    with torch.no_grad(), network.trajectory():
        return [network(*given) for given in inputs]


def simulated(qnn: QuantModel, inputs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    for layer in qnn.layers().values():
        layer.drop_dequantized()
    with qnn.quantized():
        return trajectory(qnn, inputs)


@pytest.fixture(scope="module", params=RANGES)
def exported(request, tmp_path_factory):
    qnn, path = made(**RANGES[request.param]), tmp_path_factory.mktemp("modulated") / "model.onnx"
    export_onnx(qnn, path, SHAPE)
    return qnn, path


def test_the_models_take_and_give_the_state(exported):
    qnn, path = exported
    first, later = read_model(first_step_path(path)), read_model(path)
    states = [f"state.{layer}.{part}" for layer in LAYERS for part in ("input", "output")]
    assert [i.name for i in first.graph.input] == ["x", "t"]
    assert [i.name for i in later.graph.input] == ["x", "t", *states]
    for model in (first, later):
        assert [o.name for o in model.graph.output] == ["eps", *(f"next.{state}" for state in states)]
    # The first step is in float unless it has a width; of a change every layer's slices are quantized.
    kinds = ["QuantizeLinear" in {node.op_type for node in model.graph.node} for model in (first, later)]
    assert kinds == [qnn.config.rest_bits is not None, True]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_step_is_the_simulated_one(runtime, exported):
    qnn, path = exported
    real = OnnxNetwork(path, runtime, qnn=qnn)
    for count, seed in ((2, 0), (3, 1)):  # a second batch of another size: nothing is left of the first
        inputs = steps(count, seed)
        there, expected = trajectory(real, inputs), simulated(qnn, inputs)
        assert max(relative(a, b) for a, b in zip(there, expected, strict=True)) < TOLERANCE
    # What the state makes is seen: each step as a first one; and the same weights without modulation.
    alone = [trajectory(real, [given])[0] for given in inputs]
    assert min(relative(a, b) for a, b in zip(alone[1:], expected[1:], strict=True)) > 100 * TOLERANCE
    plain = made(modulate=False, weight_bits=qnn.config.weight_bits)
    with plain.quantized(), torch.no_grad():
        assert relative(plain(*inputs[-1]), there[-1]) > 100 * TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_scale_one_level_off_is_seen_from_the_second_step_on(runtime, exported):
    qnn, path = exported
    inputs = steps(2)
    there = trajectory(OnnxNetwork(path, runtime), inputs)
    for name, quantizer in qnn.act_quantizers().items():
        if "first" in name:
            continue
        with pytest.MonkeyPatch.context() as patch:
            right = quantizer.range_of
            patch.setattr(quantizer, "range_of", lambda x, right=right: (right(x)[0] * ONE_LEVEL, right(x)[1]))
            wrong = simulated(qnn, inputs)
        assert relative(there[0], wrong[0]) < TOLERANCE  # the first step has no ranges
        assert min(relative(a, b) for a, b in zip(there[1:], wrong[1:], strict=True)) > 3 * TOLERANCE, name
    for name, layer in qnn.layers().items():
        delta = layer.weight_quantizers[0].delta
        before = delta.clone()
        delta[0] *= ONE_LEVEL
        wrong = simulated(qnn, inputs)
        delta.copy_(before)
        assert min(relative(a, b) for a, b in zip(there, wrong, strict=True)) > 3 * TOLERANCE, name


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_called_wrongly_is_said(runtime, exported, tmp_path):
    _, path = exported
    real = OnnxNetwork(path, runtime)
    with pytest.raises(RuntimeError, match=r"open `with network\.trajectory"):
        real(*steps(2)[0])
    with pytest.raises(RuntimeError, match="got a batch of 3 in a trajectory of 2"):
        trajectory(real, [steps(2)[0], steps(3)[1]])
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"alone\.first\.onnx does not exist; write it with scripts/export\.py$"):
        OnnxNetwork(alone, runtime)


def test_the_first_step_of_another_network_is_refused(tmp_path):
    export_onnx(made(weight_bits=8), tmp_path / "model.onnx", SHAPE)
    export_onnx(made(weight_bits=4), tmp_path / "other.onnx", SHAPE)
    first_step_path(tmp_path / "other.onnx").replace(first_step_path(tmp_path / "model.onnx"))
    with pytest.raises(UserError, match=r"model\.first\.onnx was exported with other weights or ranges"):
        OnnxNetwork(tmp_path / "model.onnx", "onnxruntime")


def test_the_name_of_the_first_step_keeps_all_of_the_other():
    assert [first_step_path(name).name for name in ("w4.a8.onnx", "w4.a8")] == ["w4.a8.first.onnx"] * 2


def test_an_export_that_fails_between_its_files_can_be_repeated(tmp_path, monkeypatch):
    """Where model.onnx is, both are: whoever finds it does not export again."""
    onnx = pytest.importorskip("onnx")
    save, written = onnx.save, []

    def failing(model, path) -> None:
        if written:
            raise OSError("disk full")
        written.append(path)
        save(model, path)

    monkeypatch.setattr(onnx, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(made(weight_bits=8), tmp_path / "model.onnx", SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == ["model.first.onnx"]
