"""Files for ComfyUI, decoded by a reader of our own and by comfy-kitchen, against this network's weights."""

from __future__ import annotations

import pytest
import torch
from comfyui_reader import decoded, read_comfyui
from linear_networks import LinearNetwork, MisfitNetwork, random_weights, weight_in_double
from torch import nn

from qdiff.deploy.comfyui import write_comfyui
from qdiff.deploy.weight_format import WriteOptions
from qdiff.errors import UserError

EXACT = WriteOptions(compute_dtype="float32")
TOLERANCE = 1e-9
PREFIX = "model.diffusion_model."
LAYERS = ["first", "block.1", "joined"]


def w4(**config):
    return random_weights(LinearNetwork(), short_steps=True, weight_bits=4, **config)


def w8(symmetric=True):
    network = nn.Sequential(nn.Linear(7, 5), nn.SiLU(), nn.Linear(5, 3))
    return random_weights(network, weight_symmetric=symmetric)


@pytest.fixture
def kitchen():
    """comfy-kitchen with its plain PyTorch backend."""
    module = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    with module.use_backend("eager"):
        yield module


def in_form(qnn, form):
    {"float": lambda: None, "released": qnn.release_float_weights, "packed": qnn.pack_weights}[form]()
    return qnn


@pytest.mark.parametrize("form", ["float", "released", "packed"])
def test_the_file_is_the_network(form, tmp_path):
    """Loaded into a float network, the decoded file computes what the quantized network computes."""
    qnn = w4()
    weights = {name: weight_in_double(qnn, name) for name in LAYERS}
    x = torch.randn(3, 128, dtype=torch.float64)
    written = write_comfyui(in_form(qnn, form), tmp_path / "net.safetensors", EXACT)
    assert written.files == (tmp_path / "net.safetensors",)
    assert written.encodings == dict.fromkeys(LAYERS, "awq_w4a16") and written.dequantized == {}
    state = decoded(*read_comfyui(*written.files))
    network = LinearNetwork().double()
    network.load_state_dict(state)  # strict: no name is missing and none is left over
    for name, weight in weights.items():
        assert torch.equal(network.get_submodule(name).weight, weight)
    with qnn.double().quantized():
        assert (network(x) - qnn(x)).abs().max() < TOLERANCE
    assert state["count"].dtype == torch.int64 and "scratch" not in state


def test_eight_bits_are_exact_for_any_steps(tmp_path):
    qnn = w8()
    written = write_comfyui(qnn, tmp_path / "net.safetensors")  # scales are float32 whatever the compute dtype is
    assert written.encodings == {"0": "int8_tensorwise", "2": "int8_tensorwise"}
    assert "8 bits per row" in written.notes[0]
    state = decoded(*read_comfyui(*written.files))
    assert all(torch.equal(state[f"{name}.weight"], weight_in_double(qnn, name)) for name in qnn.layers())


def test_comfy_kitchen_decodes_eight_bits(kitchen, tmp_path):
    from comfy_kitchen.tensor import TensorWiseINT8Layout as Layout

    qnn = w8()
    tensors, _ = read_comfyui(*write_comfyui(qnn, tmp_path / "net.safetensors").files)
    for name, layer in qnn.layers().items():
        stored, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        params = Layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(stored.shape))
        assert torch.equal(Layout.dequantize(stored, params), layer.dequantized_weight())


def test_the_int8_product_of_comfy_kitchen(kitchen, tmp_path):
    """A row of one ±1 and zeros is quantized without an error, so the product gives a column of the weight."""
    qnn = w8()
    tensors, _ = read_comfyui(*write_comfyui(qnn, tmp_path / "net.safetensors").files)
    found = kitchen.int8_linear(torch.eye(7), tensors["0.weight"], tensors["0.weight_scale"], None, torch.float32)
    expected = weight_in_double(qnn, "0").T
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_comfy_kitchen_decodes_four_bits(kitchen, name, tmp_path):
    from comfy_kitchen.tensor import TensorCoreAWQW4A16Layout as Layout

    qnn = w4()
    tensors, _ = read_comfyui(*write_comfyui(qnn, tmp_path / "net.safetensors", EXACT).files)
    weight, scale, zeros = (tensors[f"{name}.weight{last}"] for last in ("", "_scale", "_zeros"))
    expected = weight_in_double(qnn, name)
    params = Layout.Params(scale=scale, zeros=zeros, orig_dtype=torch.float64, orig_shape=tuple(expected.shape))
    assert torch.equal(Layout.dequantize(weight, params), expected)
    # The product with the identity is the weight that comfy-kitchen computes with.
    product = kitchen.gemv_awq_w4a16(torch.eye(expected.shape[1]), weight, scale, zeros)
    assert (product.T - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_compute_dtype(dtype, tmp_path):
    qnn = random_weights(LinearNetwork(), weight_bits=4, weight_symmetric=True)
    written = write_comfyui(qnn, tmp_path / "net.safetensors", WriteOptions(compute_dtype=dtype))
    tensors, layers = read_comfyui(*written.files)
    floats = {t.dtype for t in tensors.values() if t.is_floating_point()}
    assert floats == {getattr(torch, dtype)}
    scale = qnn.layers()["first"].weight_quantizers[0].delta.to(getattr(torch, dtype)).double()
    levels = qnn.layers()["first"].integers().double() - 8
    # With symmetric ranges, the rounding of the scale is all there is.
    assert torch.equal(decoded(tensors, layers)["first.weight"], levels * scale)


def test_each_width_has_its_encoding(tmp_path):
    network = LinearNetwork()
    qnn = random_weights(network, short_steps=True, weight_bits=4)
    wide = random_weights(nn.Sequential(nn.Linear(128, 64)), weight_symmetric=True).layers()["0"]
    network.first = wide  # as the first and last layer of a network with keep_ends
    written = write_comfyui(qnn, tmp_path / "net.safetensors", EXACT)
    assert written.encodings == {"first": "int8_tensorwise", "block.1": "awq_w4a16", "joined": "awq_w4a16"}
    state = decoded(*read_comfyui(*written.files))
    assert all(torch.equal(state[f"{name}.weight"], weight_in_double(qnn, name)) for name in LAYERS)


def test_names_carry_the_prefix(tmp_path):
    options = WriteOptions(compute_dtype="float32", prefix=PREFIX)
    tensors, layers = read_comfyui(*write_comfyui(w4(), tmp_path / "net.safetensors", options).files)
    assert sorted(layers) == sorted(PREFIX + name for name in LAYERS)
    assert all(name.startswith(PREFIX) for name in tensors)


def test_asymmetric_ranges_of_eight_bits_are_named(tmp_path):
    with pytest.raises(UserError, match=r"2 of 2 .* 0 \(q − z from -\d+ to \d+, more than int8 holds; .*--w_sym"):
        write_comfyui(w8(symmetric=False), tmp_path / "net.safetensors")


@pytest.mark.parametrize("zero_point", [127, 128, 129])
def test_asymmetric_ranges_fit_where_their_values_do(zero_point, tmp_path):
    """All levels are used, so that q − z reaches 128 and −129 on either side of the middle."""
    qnn = random_weights(nn.Sequential(nn.Linear(256, 2)))
    layer = qnn.layers()["0"]
    layer.weight_quantizers[0].zero_point.fill_(zero_point)
    layer.set_weight_int(torch.stack([torch.arange(256), torch.arange(256).flip(0)]))
    if zero_point != 128:
        with pytest.raises(UserError, match="more than int8 holds"):
            write_comfyui(qnn, tmp_path / "net.safetensors")
        layer.set_weight_int(layer.weight_int.int().clamp(zero_point - 128, zero_point + 127))
    state = decoded(*read_comfyui(*write_comfyui(qnn, tmp_path / "net.safetensors").files))
    assert torch.equal(state["0.weight"], weight_in_double(qnn, "0"))


def test_a_split_layer_of_eight_bits_has_two_scales_per_row(tmp_path):
    sentence = r"1 of 3 .* joined \(split at input channel 128, and int8_tensorwise has one scale per output channel\)"
    with pytest.raises(UserError, match=sentence):
        write_comfyui(random_weights(LinearNetwork(), weight_symmetric=True), tmp_path / "net.safetensors")


def test_what_does_not_fit_is_named_before_anything_is_written(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(UserError) as error:
        write_comfyui(random_weights(MisfitNetwork(), weight_bits=4), path)
    assert str(error.value) == (
        "3 of 4 quantized layers do not fit comfyui: convolution (a convolution); odd (100 input channels, not a "
        "multiple of 64); joined (split at input channel 32, not a multiple of 64); give --convolutions dequantized "
        "and --linears dequantized to store them as floats"
    )
    assert not path.exists()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_comfyui(w4(), tmp_path)
