"""Single layers and attention as both runtimes compute them, against the simulated ones."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from exact_runtimes import SPLIT, require_runtimes
from following import RUNTIMES, relative
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.interface import AttentionCore, split_input
from qdiff.modes import leaf_modes
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer, DynamicActQuantizer, calibrated_act_quantizers
from qdiff.ranges.estimators import RangeMethod

pytestmark = pytest.mark.slow

require_runtimes()

# Relative L2: float32 sums in another order. No input lies on a rounding edge (`away_from_edges`).
TOLERANCE = 3e-6
# … behind a softmax whose output is quantized with 16 bits, where last bits decide a few of its levels.
WIDE_SOFTMAX_TOLERANCE = 1e-4
FORCED = "openvino-split"  # as where there is no VNNI, on every machine
COMPUTED = (*RUNTIMES, FORCED)
LOW, HIGH = -2.0, 2.5  # the range of every quantizer; inputs go beyond it, so that saturation shows
CHANNELS, SIDE = 6, 8
ONE_LEVEL = 1 + 1 / 255

VIEWS = {  # of x [N, 6, 8, 8]
    "conv2d": lambda x: x,
    "conv1d": lambda x: x.flatten(2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "rows": lambda x: x[:, :, 0, 0],
}
LAYERS = {
    "conv2d": lambda: nn.Conv2d(CHANNELS, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(CHANNELS, 8, 3, stride=2, padding=1, bias=False),
    "unpadded": lambda: nn.Conv2d(CHANNELS, 8, 3, stride=2),
    "pointwise": lambda: split_input(nn.Conv2d(CHANNELS, 8, 1), 2),
    "split": lambda: split_input(nn.Conv2d(CHANNELS, 8, 3, padding=1), 2),
    "conv1d": lambda: nn.Conv1d(CHANNELS, 8, 1),
    "tokens": lambda: nn.Linear(CHANNELS, 8),
    "rows": lambda: nn.Linear(CHANNELS, 8, bias=False),
    "split_tokens": lambda: split_input(nn.Linear(CHANNELS, 8), 2),
}
VIEW_OF = {"conv1d": "conv1d", "tokens": "tokens", "split_tokens": "tokens", "rows": "rows"}
CONFIGS = {
    "w8a8": {"weight_bits": 8, "act_bits": 8},  # asymmetric: the window's sum is added
    "w8_symmetric_a8_symmetric": {"weight_symmetric": True, "act_bits": 8, "act_symmetric": True},
    "w4a4": {"weight_bits": 4, "act_bits": 4},
    "w3a16": {"weight_bits": 3, "act_bits": 16},
    "w8": {"weight_bits": 8},
    "a8": {"weight_bits": None, "act_bits": 8},
    # Dynamic ranges: 8 bits need what the zero point is away from the middle, fewer do not.
    "d8_sample": {"act_bits": 8, "act_dynamic": True, "act_scale_per": "sample"},
    "d8": {"weight_bits": 4, "act_bits": 8, "act_dynamic": True},
    "d4_sample": {"weight_bits": 4, "act_bits": 4, "act_dynamic": True, "act_scale_per": "sample"},
    "d3_symmetric": {"act_bits": 3, "act_dynamic": True, "act_symmetric": True},
    "d16": {"weight_bits": 3, "act_bits": 16, "act_dynamic": True},
    "d8_alone": {"weight_bits": None, "act_bits": 8, "act_dynamic": True},
}
# Which layers meet which widths: all of them the widths of the kernels, some the rest.
EVERY_LAYER = ("w8a8", "d8_sample")
CASES = [(c, n) for c in CONFIGS for n in (LAYERS if c in EVERY_LAYER else ("split", "rows", "tokens"))]
ATTENTION = {
    "plain": (False, {"act_bits": 8}),
    "prescaled": (True, {"act_bits": 8, "act_symmetric": True}),
    "wide_softmax": (False, {"act_bits": 8, "softmax_bits": 16}),
    "unquantized": (True, {"act_bits": None}),
    "dynamic": (False, {"act_bits": 4, "act_dynamic": True, "rest_bits": 8}),
}


class Leaves(nn.Module):
    """Many leaves in one network, since tracing has a price a network: x → all their outputs, [N, all]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"{c}-{n}": LAYERS[n]() for c, n in CASES})
        self.attention = nn.ModuleDict({name: AttentionCore(prescale) for name, (prescale, _) in ATTENTION.items()})

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, layer in self.layers.items():
            kind = name.split("-")[1]
            out[name] = layer(VIEWS[VIEW_OF.get(kind, "conv2d")](x))
        q, k, v = (VIEWS["tokens"](x).unflatten(1, (2, -1)) * factor for factor in (1.0, 0.8, 1.2))
        for name, core in self.attention.items():
            out[name] = core(q, k[:, :, :5], v[:, :, :5])
        return out

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        outputs = [out.flatten(1) for out in self.outputs(x).values()]
        return torch.cat([*outputs, t[:, None]], dim=1)


class Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) + t[:, None, None, None]


def set_range(quantizer: ActQuantizer, high: float = HIGH, low: float = LOW) -> None:
    if isinstance(quantizer, DynamicActQuantizer):
        return
    levels = 2**quantizer.bits - 1
    if quantizer.unsigned:
        quantizer.set(torch.tensor(1 / levels), torch.tensor(0))
        return
    delta = (high - low) / levels
    zero_point = 2 ** (quantizer.bits - 1) if quantizer.symmetric else round(-low / delta)
    quantizer.set(torch.tensor(delta), torch.tensor(zero_point))


def away_from_edges(x: Tensor, deltas: list[Tensor]) -> Tensor:
    """Replace values of x that a last bit could move to another level of a quantizer."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        near = torch.zeros_like(x, dtype=torch.bool)
        for delta in deltas:
            near |= ((x / delta) % 1 - 0.5).abs() < 2e-3
        if not near.any():
            return x
        x = torch.where(near, torch.randn(x.shape, generator=generator), x)
    raise AssertionError("no such values")


@pytest.fixture(scope="module")
def leaves() -> QuantModel:
    torch.manual_seed(0)
    network = Leaves()
    qnn = QuantModel(network, QuantConfig(8, 8))
    torch.manual_seed(0)
    for case, name in CASES:  # each with widths of its own
        layer = QuantModule(LAYERS[name](), QuantConfig(**CONFIGS[case], split_shortcut=True))
        if layer.weight_quantizers:
            layer.init_weight_ranges(RangeMethod.MIN_MAX)
        for i, quantizer in enumerate(layer.act_quantizers):
            set_range(quantizer, HIGH * (1 + i / 3))
        network.layers[f"{case}-{name}"] = layer
    for name, (prescale, config) in ATTENTION.items():
        core = QuantAttention(AttentionCore(prescale), QuantConfig(**config))
        for i, quantizer in enumerate(core.children()):
            set_range(quantizer, HIGH * (1 + i / 5))
        network.attention[name] = core
    qnn.requires_grad_(False)
    return qnn


@pytest.fixture(scope="module")
def x(leaves) -> Tensor:
    calibrated = calibrated_act_quantizers(leaves.model).values()
    deltas = {float(q.delta) for q in calibrated if not q.unsigned and q.bits <= 8}
    given = torch.randn(3, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    given[0, :, 0, 0], given[1, :, 0, 0] = 6.0, -5.0  # beyond every range: zero points show where values saturate
    return away_from_edges(given, [torch.tensor(d) for d in sorted(deltas)])


@pytest.fixture(scope="module")
def computed(leaves, x, tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    """Outputs of every leaf by runtime; and the simulated ones."""
    from qdiff.deploy import onnx_network
    from qdiff.deploy.onnx_export import export_onnx

    path = tmp_path_factory.mktemp("leaves") / "leaves.onnx"
    export_onnx(leaves, path, tuple(x.shape[1:]))
    results = {"simulated": simulated(leaves, x)}
    sizes = {name: out[0].numel() for name, out in results["simulated"].items()}
    for runtime in COMPUTED:
        with pytest.MonkeyPatch.context() as patch:
            if runtime == FORCED:
                patch.setattr(onnx_network, "check_exact", lambda *runtime: SPLIT)
            flat = onnx_network.OnnxNetwork(path, runtime.split("-")[0])(x, torch.zeros(len(x)))
        parts = flat[:, :-1].split(list(sizes.values()), dim=1)
        results[runtime] = {
            name: part.reshape(results["simulated"][name].shape) for name, part in zip(sizes, parts, strict=True)
        }
    return results


@torch.no_grad()
def simulated(qnn: QuantModel, x: Tensor) -> dict[str, Tensor]:
    with leaf_modes([qnn.model], weights=True, activations=True):
        return qnn.model.outputs(x)


def misplace(quantizer: ActQuantizer, scale: float = 1.0, levels: int = 0) -> None:
    """Plant an error in a range."""
    right = quantizer.range_of
    quantizer.range_of = lambda x: (right(x)[0] * scale, right(x)[1] + levels)


def planted(qnn: QuantModel, name: str, x: Tensor) -> dict[str, Tensor]:
    """Return what a leaf computes with an error of one level, by what is wrong."""
    results = {}

    def tried(what: str, change) -> None:
        leaf = copy.deepcopy(qnn.model.layers[name])
        change(leaf)
        leaf.drop_dequantized()
        view = VIEWS[VIEW_OF.get(name.split("-")[1], "conv2d")](x)
        with leaf_modes([leaf], weights=True, activations=True), torch.no_grad():
            results[what] = leaf(view)

    layer = qnn.model.layers[name]
    for i in range(len(layer.act_quantizers)):
        tried(f"input scale {i}", lambda leaf, i=i: misplace(leaf.act_quantizers[i], scale=ONE_LEVEL))
        if layer.act_quantizers[i].bits <= 8:
            tried(f"input zero point {i}", lambda leaf, i=i: misplace(leaf.act_quantizers[i], levels=1))
    for i, quantizer in enumerate(layer.weight_quantizers):
        tried(f"weight scale {i}", lambda leaf, i=i: leaf.weight_quantizers[i].delta[1].mul_(ONE_LEVEL))
        middle = 2 ** (quantizer.bits - 1)
        if quantizer.bits == 8 and not quantizer.symmetric:
            tried(f"no correction {i}", lambda leaf, i=i, z=middle: leaf.weight_quantizers[i].zero_point.fill_(z))
    if layer.weight_quantizers:
        tried(
            "one weight", lambda leaf: leaf.weight_int.view(-1)[:1].add_(1 if leaf.weight_int.view(-1)[0] == 0 else -1)
        )
    return results


@pytest.fixture(scope="module")
def planted_in(leaves, x):
    """``planted_in(name)``: as `planted`, computed once for all runtimes."""
    return functools.cache(lambda name: planted(leaves, name, x))


@pytest.mark.parametrize("runtime", COMPUTED)
@pytest.mark.parametrize("name", [f"{c}-{n}" for c, n in CASES])
def test_layer_is_the_simulated_one(name, runtime, computed, planted_in):
    out, expected = computed[runtime][name], computed["simulated"][name]
    assert relative(out, expected) < TOLERANCE
    wrong = planted_in(name)
    assert wrong
    for what, values in wrong.items():
        assert relative(out, values) > 3 * TOLERANCE, what


@pytest.mark.parametrize("runtime", COMPUTED)
@pytest.mark.parametrize("name", ["w8a8-conv2d", "w8a8-strided", "w8a8-split", "w8-split"])
def test_padding_is_zero_at_the_borders(name, runtime, computed, leaves, x):
    """Integers whose zero point is not 0 see zeros there too: the correction counts only what lies inside."""
    out, expected = computed[runtime][name], computed["simulated"][name]
    border = torch.ones(out.shape[2:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert relative(out[..., border], expected[..., border]) < TOLERANCE
    # Planted: the correction as if the input went on beyond its edge, which changes nothing inside.
    layer = leaves.model.layers[name]
    wrong = expected.clone()
    parts = x.split(layer.slices, dim=1)
    for part, acts, quantizer in zip(
        parts, layer.act_quantizers or [nn.Identity()] * len(parts), layer.weight_quantizers, strict=True
    ):
        given = acts(part)
        shift = (quantizer.delta * (128 - quantizer.zero_point)).reshape(-1, 1, 1)
        ones = torch.ones(1, given.shape[1], 3, 3)
        stride = 2 if "strided" in name else 1
        inside = F.conv2d(given, ones, stride=stride, padding=1)
        wrong += (F.conv2d(F.pad(given, (1, 1, 1, 1), mode="replicate"), ones, stride=stride) - inside) * shift
    assert relative(out[..., border], wrong[..., border]) > 3 * TOLERANCE
    if "strided" not in name:
        assert relative(out[..., ~border], wrong[..., ~border]) < TOLERANCE


def test_a_zero_point_at_hand_counts_where_taps_lie_inside(leaves, x, computed, tmp_path, monkeypatch):
    """Planted: as if every tap of a kernel lay inside, also at the borders."""
    from qdiff.deploy import onnx_leaves
    from qdiff.deploy.onnx_export import export_onnx
    from qdiff.deploy.onnx_network import OnnxNetwork

    inside = onnx_leaves._inside
    monkeypatch.setattr(onnx_leaves, "_inside", lambda *where: torch.ones_like(inside(*where)))
    config = QuantConfig(**CONFIGS["d8_sample"])
    for name, sees_it in (("conv2d", True), ("strided", True), ("unpadded", False)):
        alone = QuantModel(Alone(LAYERS[name]()), config)
        alone.model.layer = leaves.model.layers[f"d8_sample-{name}"]
        path = tmp_path / f"{name}.onnx"
        export_onnx(alone, path, tuple(x.shape[1:]))
        out = OnnxNetwork(path, "onnxruntime")(x, torch.zeros(len(x)))
        error = relative(out, computed["simulated"][f"d8_sample-{name}"])
        assert (error > 1000 * TOLERANCE) if sees_it else (error < TOLERANCE), name


def planted_attention(qnn: QuantModel, name: str, x: Tensor) -> dict[object, Tensor]:
    """Return what an attention computes with one operand's scale a level off, by operand."""
    core, wrong = qnn.model.attention[name], {}
    if name == "unquantized":  # scaled twice, or not at all
        tokens = VIEWS["tokens"](x).unflatten(1, (2, -1))
        return {s: core(tokens * s, 0.8 * tokens[:, :, :5], 1.2 * tokens[:, :, :5]) for s in (ONE_LEVEL, 0.5)}
    for operand in "qkvw":
        quantizer = getattr(core, f"act_quantizer_{operand}")
        if quantizer.bits > 8:  # one of 65,536 levels
            continue
        misplace(quantizer, scale=ONE_LEVEL)
        wrong[operand] = simulated(qnn, x)[name]
        del quantizer.range_of
    return wrong


@pytest.fixture(scope="module")
def planted_in_attention(leaves, x):
    """``planted_in_attention(name)``: as `planted_attention`, computed once for all runtimes."""
    return functools.cache(lambda name: planted_attention(leaves, name, x))


@pytest.mark.parametrize("runtime", COMPUTED)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_simulated_one(name, runtime, computed, planted_in_attention):
    out, expected = computed[runtime][name], computed["simulated"][name]
    tolerance = WIDE_SOFTMAX_TOLERANCE if name == "wide_softmax" else TOLERANCE
    assert relative(out, expected) < tolerance
    wrong = planted_in_attention(name)
    assert all(relative(out, values) > 3 * tolerance for values in wrong.values())
    assert len(wrong) == {"wide_softmax": 3, "unquantized": 2}.get(name, 4)


@pytest.mark.parametrize("runtime", COMPUTED)
def test_prescale_and_widths_show(runtime, computed):
    """What differs between the cases is seen by the tolerances above."""
    outputs = computed[runtime]
    names = list(ATTENTION)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert relative(outputs[name], outputs[other]) > 10 * WIDE_SOFTMAX_TOLERANCE
