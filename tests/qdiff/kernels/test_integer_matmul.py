"""Integer arithmetic: exact sums, and what a layer and a network give against their simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from thorough import thorough_except
from torch import nn

from ddim.models.diffusion import Model
from qdiff import quant_layer
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.functional import max_level
from qdiff.io.tensor_files import read_float_tensors
from qdiff.kernels import integer_matmul as integer
from qdiff.kernels.integer_matmul import Geometry, Levels, int8_is_exact, int8_is_fast, int8_matmul, integer_product
from qdiff.kernels.packed_weight import PACKED
from qdiff.methods import linear
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import estimate

REPOSITORY = Path(__file__).parents[3]
# Relative L2 of a layer's output without bias: the order in which float32 is summed.
LAYER_TOLERANCE = 1e-5
# … of the bundled network's, where a value on a rounding edge of the next quantizer may fall to the other side and a
# difference in the last bit becomes one of a level. Found: 4.4e-3 to 7.1e-3; with scales that are one level off 11.7e-3
# and more.
NETWORK_TOLERANCE = 9e-3
# … where the first step is in float and changes have one calibrated range: 1.1e-3, and 6.3e-3.
CHANGES_TOLERANCE = 3e-3

N = 3
SQUARE, TOKENS, ROWS = (N, 12, 9, 7), (N, 10, 12), (N, 12)
LAYERS = {
    "conv2d": (lambda: nn.Conv2d(12, 20, 3, padding=1), SQUARE),
    "conv2d 1x1": (lambda: nn.Conv2d(12, 20, 1), SQUARE),
    "conv2d stride": (lambda: nn.Conv2d(12, 20, 3, stride=2), SQUARE),
    "conv2d odd": (lambda: nn.Conv2d(12, 5, (3, 2), (1, 2), padding=(2, 1), dilation=(2, 1)), SQUARE),
    "conv1d": (lambda: nn.Conv1d(12, 20, 3, padding=1), (N, 12, 11)),
    "linear": (lambda: nn.Linear(12, 20), ROWS),
    "linear of tokens": (lambda: nn.Linear(12, 20), TOKENS),
}
WIDTHS = [(8, 8), (4, 8), (3, 8), (8, 4), (4, 4), (4, 16), (8, 16), (1, 2)]
# How activations get their ranges, and what they are of.
MODES = {
    "calibrated": {},
    "tensor": {"act_dynamic": True},
    "sample": {"act_dynamic": True, "act_scale_per": "sample"},
    "modulated": {"modulate": True},
    "modulated sample": {"modulate": True, "act_dynamic": True, "act_scale_per": "sample"},
    "modulated rest": {"modulate": True, "act_dynamic": True, "rest_bits": 8},
}


@pytest.fixture
def int8_where_exact(monkeypatch):
    """Small products are tried in int8 on machines that would not choose it for its time."""
    monkeypatch.setattr(integer, "int8_is_fast", lambda device: True)


def one_layer(kind, bits, mode, symmetric=False, split=False):
    """A network of one layer without bias, its ranges set, and five inputs of a trajectory."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    layer.bias = None
    if split:
        layer.split_at = 5
    options = {"act_symmetric": symmetric, "weight_symmetric": symmetric, "split_shortcut": split}
    qnn = QuantModel(nn.Sequential(layer), QuantConfig(*bits, **options, **MODES[mode]))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) + 0.4
    steps = [x := x + 0.2 * torch.randn(shape, generator=generator) for _ in range(5)]
    (module,) = qnn.layers().values()
    module.init_weight_ranges(qnn.config.weight_range)
    of = steps[1] - steps[0] if qnn.config.modulate else steps[0] * 0.8  # some values are clamped
    for quantizer in qnn.calibrated_act_quantizers().values():
        quantizer.set(*estimate(of, bits[1], qnn.config.act_range, symmetric))
    return qnn, steps


@torch.no_grad()
def run(qnn, steps):
    with qnn.quantized(), qnn.trajectory():
        return torch.stack([qnn(*(x if isinstance(x, tuple) else (x,))) for x in steps])


def plant(monkeypatch, change):
    """Let every integer product see another activation."""
    product = quant_layer.integer_product
    monkeypatch.setattr(quant_layer, "integer_product", lambda x, w, geometry: product(change(x), w, geometry))


def wrong_scale(x):
    """One level too many in the range."""
    return replace(x, delta=x.delta * (1 + 1 / max_level(x.bits)))


def wrong_zero_point(x):
    return replace(x, zero_point=x.zero_point + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("int8_where_exact")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", thorough_except(WIDTHS, (8, 8), (4, 8), (8, 16)), ids=lambda b: f"w{b[0]}a{b[1]}")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer(kind, bits, mode, relative, monkeypatch):
    for symmetric, split in ((False, False), (True, False), (False, True)):
        qnn, steps = one_layer(kind, bits, mode, symmetric, split)
        simulated = run(qnn, steps)
        qnn.pack_weights(integer=True)
        found, since = run(qnn, steps), 0
        for ours, theirs in zip(found, simulated, strict=True):
            assert relative(ours, theirs) < LAYER_TOLERANCE
        if qnn.config.modulate:  # what was not in float from the start are the changes
            since = simulated[0]
            assert relative(found[-1] - since, simulated[-1] - since) < LAYER_TOLERANCE
        for change in (wrong_scale, wrong_zero_point):
            with monkeypatch.context() as patch:
                plant(patch, change)
                assert relative(run(qnn, steps)[-1] - since, simulated[-1] - since) > LAYER_TOLERANCE


@pytest.mark.usefixtures("int8_where_exact")
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bias_is_added_once(kind, relative):
    for mode in ("calibrated", "modulated"):
        qnn, steps = one_layer(kind, (4, 8), mode, split=True)
        (module,) = qnn.layers().values()
        without = run(qnn, steps)
        module.bias = nn.Parameter(torch.randn(module.weight.shape[0]), requires_grad=False)
        simulated = run(qnn, steps)
        qnn.pack_weights(integer=True)
        for found, expected, bare in zip(run(qnn, steps), simulated, without, strict=True):
            assert relative(found, expected) < LAYER_TOLERANCE < relative(found, bare)


@pytest.mark.usefixtures("int8_where_exact")
def test_products_are_of_integers(monkeypatch):
    """Up to 8 bits nothing but int8 products, above nothing of them; the first modulated step is in float."""
    used = []
    for name in ("_int8_sums", "_float64_sums"):
        compute = getattr(integer, name)
        monkeypatch.setattr(integer, name, lambda *a, compute=compute, name=name: (used.append(name), compute(*a))[1])
    monkeypatch.setattr(integer, "int8_is_exact", lambda device: True)
    for bits, mode, expected in (
        ((4, 8), "calibrated", 5 * ["_int8_sums"]),
        ((8, 16), "calibrated", 5 * ["_float64_sums"]),
        ((4, 8), "modulated", 4 * ["_int8_sums"]),
        ((4, 16), "modulated rest", ["_int8_sums"] + 4 * ["_float64_sums"]),
    ):
        qnn, steps = one_layer("conv2d", bits, mode)
        qnn.pack_weights(integer=True)
        run(qnn, steps)
        assert used == expected
        used.clear()


@pytest.mark.parametrize("slow", ["int8_matmul", "double"])
def test_the_faster_of_two_exact_ways_is_taken(slow, monkeypatch):
    """Where int8 products are a plain loop, float64 takes over; both give the same bits."""
    int8 = slow == "double"
    int8_is_fast.cache_clear()
    seconds = iter([1.0, 2.0] if int8 else [2.0, 1.0])
    monkeypatch.setattr(integer, "_seconds", lambda compute: next(seconds))
    used = []
    for name in ("_int8_sums", "_float64_sums"):
        compute = getattr(integer, name)
        monkeypatch.setattr(integer, name, lambda *a, compute=compute, name=name: (used.append(name), compute(*a))[1])
    monkeypatch.setattr(integer, "int8_is_exact", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    zero = torch.tensor(100, dtype=torch.int32)
    x = Levels(torch.randint(0, 256, (5, 70), generator=generator), torch.tensor(0.3), zero, 8)
    weight = Levels(torch.randint(0, 256, (4, 70), generator=generator), torch.rand(4, 1), zero.expand(4, 1), 8)
    try:
        made = integer_product(x, weight, None)
    finally:
        int8_is_fast.cache_clear()
    assert used == ["_int8_sums" if int8 else "_float64_sums"]
    monkeypatch.setattr(integer, "int8_is_fast", lambda device: not int8)
    assert torch.equal(integer_product(x, weight, None), made) and len(set(used)) == 2
    assert int8_is_fast(torch.device("meta"))  # only CPUs are measured


@pytest.mark.usefixtures("int8_where_exact")
@pytest.mark.parametrize("kind", ["conv2d", "linear of tokens"])
def test_a_machine_without_exact_int8(kind, relative, monkeypatch):
    """Pairs of products that saturate at 16 bits, as on CPUs without VNNI, are noticed, and float64 takes over."""

    def saturating(a, b):
        products = a.long()[:, :, None] * b.long()[None]
        return products.view(len(a), -1, 2, b.shape[1]).sum(2).clamp(-(2**15), 2**15 - 1).sum(1).int()

    qnn, steps = one_layer(kind, (8, 8), "calibrated")
    simulated = run(qnn, steps)
    qnn.pack_weights(integer=True)
    int8_is_exact.cache_clear()
    try:
        monkeypatch.setattr(torch, "_int_mm", saturating)
        assert not int8_is_exact(torch.device("cpu"))
        assert relative(run(qnn, steps), simulated) < LAYER_TOLERANCE
        monkeypatch.delattr(torch, "_int_mm")
        int8_is_exact.cache_clear()
        assert not int8_is_exact(torch.device("cpu"))
        assert relative(run(qnn, steps), simulated) < LAYER_TOLERANCE
    finally:
        int8_is_exact.cache_clear()


def test_int8_products_are_exact_here_or_not_used():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (33, 71), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (71, 5), generator=generator, dtype=torch.int8)
    if int8_is_exact(torch.device("cpu")):
        assert torch.equal(int8_matmul(a, b).long(), a.long() @ b.long())


def test_other_devices_take_float64():
    assert not int8_is_exact(torch.device("meta"))


def test_packing_finds_out_whether_products_are_exact():
    """The check waits for the device; a network call then does not."""
    qnn, steps = one_layer("conv2d", (4, 8), "calibrated")
    int8_is_exact.cache_clear()
    qnn.pack_weights(integer=True)
    run(qnn, steps)
    assert int8_is_exact.cache_info().misses == 1 and int8_is_exact.cache_info().hits >= len(steps)


def test_sums_beyond_32_bits():
    terms = 40_000  # 40,000 · 255² > 2³¹
    one = torch.ones(())
    x = Levels(torch.full((1, terms), 255), one, torch.zeros((), dtype=torch.int32), 8)
    weight = Levels(torch.full((2, terms), 255), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 8)
    assert integer_product(x, weight, None).tolist() == [[pytest.approx(terms * 255.0**2, rel=1e-7)] * 2]
    if int8_is_exact(torch.device("cpu")):
        assert (integer._int8_sums(x, weight, None) < 0).all(), "planted: int32 cannot hold them"


@pytest.mark.usefixtures("int8_where_exact")
@pytest.mark.parametrize("per_sample", [False, True])
def test_few_patches_at_a_time(per_sample, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 256, (5, 1, 1, 1) if per_sample else (), generator=generator, dtype=torch.int32)
    x = Levels(torch.randint(0, 256, (5, 3, 6, 6), generator=generator), torch.rand(z.shape) + 1, z, 8)
    channels = torch.randint(0, 16, (4, 1, 1, 1), generator=generator, dtype=torch.int32)
    weight = Levels(torch.randint(0, 16, (4, 3, 3, 3), generator=generator), torch.rand(4, 1, 1, 1), channels, 4)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    monkeypatch.setattr(integer, "int8_is_exact", lambda device: False)
    expected = integer_product(x, weight, geometry)
    calls, matmul = [], int8_matmul
    monkeypatch.setattr(integer, "int8_matmul", lambda a, b: (calls.append(len(a)), matmul(a, b))[1])
    monkeypatch.setattr(integer, "int8_is_exact", lambda device: True)
    monkeypatch.setattr(integer, "ROWS_BYTES", 2 * 36 * 27)
    assert torch.equal(integer_product(x, weight, geometry), expected)
    assert calls == [72, 72, 36]


@torch.no_grad()
def test_float_inputs_meet_dequantized_weights():
    qnn, steps = one_layer("conv2d", (4, 8), "calibrated")
    with qnn.quantized(activations=False):
        expected = qnn(steps[0])
    qnn.pack_weights(integer=True)
    with qnn.quantized(activations=False):
        assert torch.equal(qnn(steps[0]), expected)


def test_quantizers_are_counted():
    qnn, steps = one_layer("conv2d", (4, 8), "sample", split=True)
    qnn.pack_weights(integer=True)
    assert len(qnn.silent_quantizers()) == 2
    run(qnn, steps)
    assert qnn.silent_quantizers() == [] and {q.fired for q in qnn.act_quantizers().values()} == {5}


# ---------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def digits():
    """``digits(**config)``: the bundled model, calibrated by extremes on few samples."""
    config = OmegaConf.load(REPOSITORY / "configs" / "digits.yml")
    state = read_float_tensors(REPOSITORY / "models" / "ddim_digits.safetensors")
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))

    def made(**options):
        network = Model(config)
        network.load_state_dict(state)
        qnn = QuantModel(network, QuantConfig(**options))
        linear.calibrate(qnn, CalibrationSet((x, torch.arange(4) * 250)), None, CalibrationRun(show_progress=False))
        for quantizer in qnn.calibrated_act_quantizers().values() if qnn.config.calibrates_changes else ():
            quantizer.set(torch.tensor(0.02), torch.tensor(2 ** (quantizer.bits - 1)))
        return qnn

    return made


SHAPE = (1, 16, 16)
NETWORKS = [
    {"weight_bits": 4, "act_bits": 8, "split_shortcut": True},
    {"weight_bits": 8, "act_bits": 8, "act_symmetric": True, "softmax_bits": 16},
    {"weight_bits": 4, "act_bits": 8, "split_shortcut": True, "keep_ends": True},
    {"weight_bits": 4, "act_bits": 8, "act_dynamic": True, "act_scale_per": "sample", "rest_bits": 8},
    {"weight_bits": 8, "act_bits": 6, "act_dynamic": True, "modulate": True},
    {"weight_bits": 4, "act_bits": 6, "modulate": True, "split_shortcut": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("config", thorough_except(NETWORKS, NETWORKS[0], NETWORKS[-1]), ids=str)
def test_a_network(config, digits, relative, monkeypatch):
    """Over all steps and samples, each at its own time: one value on an edge behind an embedding moves an image."""
    qnn = digits(**config)
    tolerance = CHANGES_TOLERANCE if qnn.config.calibrates_changes else NETWORK_TOLERANCE
    x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(3))
    times = torch.arange(16) * 60 + 80
    steps = [(x * (1 - 0.02 * i) + 0.05 * i, times - 20 * i) for i in range(5)]
    simulated = run(qnn, steps)
    qnn.pack_weights()
    assert torch.equal(run(qnn, steps), simulated)
    qnn.pack_weights(integer=True)
    assert relative(run(qnn, steps), simulated) < tolerance
    plant(monkeypatch, wrong_scale)
    assert relative(run(qnn, steps), simulated) > tolerance


@torch.no_grad()
@pytest.mark.parametrize("config", thorough_except(NETWORKS[:4], NETWORKS[0]), ids=str)
def test_every_layer_of_a_network(config, digits, relative, monkeypatch):
    """On the inputs of the simulation, where no rounding edge of a layer before matters."""
    qnn, seen = digits(**config), []
    hooks = [
        layer.register_forward_hook(lambda module, args, out, name=name: seen.append((name, module, args[0], out)))
        for name, layer in qnn.layers().items()
    ]
    with qnn.quantized():
        qnn(torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.arange(4) * 250)
    for hook in hooks:
        hook.remove()
    qnn.pack_weights(integer=True)
    with qnn.quantized():
        assert len(seen) == len(qnn.layers())
        for name, layer, x, simulated in seen:
            assert relative(layer(x), simulated) < LAYER_TOLERANCE, name
        plant(monkeypatch, wrong_scale)
        for name, layer, x, simulated in seen:
            assert (relative(layer(x), simulated) > LAYER_TOLERANCE) == layer.multiplies_integers, name
        in_float = [name for name, layer, _, _ in seen if not layer.multiplies_integers]
    assert in_float == (["conv_out"] if config.get("keep_ends") else [])


# ---------------------------------------------------------------------- what cannot be computed is an error


def refused(qnn, match):
    with pytest.raises(UserError, match=match):
        qnn.pack_weights(integer=True)
    assert not qnn.is_packed


@pytest.mark.parametrize("modulate", [False, True])
def test_ranges_a_channel(modulate):
    config = QuantConfig(4, 8, act_dynamic=True, act_scale_per="channel", modulate=modulate)
    qnn = QuantModel(nn.Sequential(nn.Conv2d(4, 4, 3)), config)
    qnn.layers()["0"].init_weight_ranges(config.weight_range)
    refused(qnn, "--act_scale_per tensor or sample")
    qnn.pack_weights()
    with pytest.raises(UserError, match="--act_scale_per"):
        qnn.pack_weights(integer=True)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "0 has 2 groups"),
        (lambda: nn.Conv2d(4, 4, 3, padding="same"), "padding same"),
    ],
)
def test_layers_that_no_network_here_has(layer, match):
    qnn = QuantModel(nn.Sequential(layer()), QuantConfig(4, 8, act_dynamic=True))
    qnn.layers()["0"].init_weight_ranges(qnn.config.weight_range)
    refused(qnn, match)


def test_a_side_without_width(calibrated):
    refused(calibrated(weight_bits=4), "add --quant_act")
    refused(calibrated(weight_bits=None, act_bits=8), "--weight_bit")
    assert "packed" in PACKED
