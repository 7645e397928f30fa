"""Whole networks as both runtimes compute them, against the simulated ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from deploy_networks import STEPS
from exact_runtimes import require_runtimes
from following import FREE_STEP_TOLERANCE, RUNTIMES, check_samples, followed_network, opened_network, relative
from thorough import thorough_except
from torch import Tensor

from qdiff.deploy.onnx_network import OnnxNetwork
from qdiff.quant_model import QuantModel

pytestmark = pytest.mark.slow

require_runtimes()

# Relative L2 of what lies between quantizers, both sides continuing from the same integers: last bits of float32,
# which sines of large angles and norms of a few values make a few more.
SUM_TOLERANCE = 2e-5
# … and of what a quantizer makes of the same input: OpenVINO multiplies by 1/δ where torch divides, so a value on an
# edge may fall to the other side; one in some thousand values then differs by a level.
LEVEL_TOLERANCE = 1.5e-3
ONE_LEVEL = 1 + 1 / 255  # changes what a quantizer makes by 3.9e-3

NETWORKS = thorough_except(("ddim", "text", "digits"), "ddim", "text")


@pytest.fixture
def exported(request):
    return lambda name: request.getfixturevalue(f"exported_{name}")


@contextmanager
def scaled(delta: Tensor, channel: int | None = None) -> Iterator[None]:
    """Plant: a step size that is one part in 255 too large inside the block."""
    before = delta.clone()
    (delta if channel is None else delta[channel]).mul_(ONE_LEVEL)
    try:
        yield
    finally:
        delta.copy_(before)


def set_weights_anew(qnn: QuantModel) -> None:
    for layer in qnn.layers().values():
        layer.drop_dequantized()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_the_simulated_one(name, runtime, exported):
    network = exported(name)
    followed = followed_network(network.path, runtime)
    for seed in (1, 2):
        found = followed.differences(network.qnn, *network.inputs(2, seed))
        assert found.sums() < SUM_TOLERANCE, max(found.inputs.items(), key=lambda item: item[1])
        assert found.levels() < LEVEL_TOLERANCE, max(found.rounding.items(), key=lambda item: item[1])


# A few of every kind. Layers of the time embedding move a whole channel, which the norm behind them mostly takes out.
PLANTED = {
    "ddim": ("conv_in", "down.0.block.0.conv1", "mid.attn_1.k", "up.0.block.0.nin_shortcut", "conv_out"),
    "text": (
        *("input_blocks.0.0", "middle_block.1.transformer_blocks.0.attn2.to_k", "output_blocks.0.0.in_layers.2"),
        *("middle_block.1.transformer_blocks.0.ff.net.0.proj", "out.2"),
    ),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", PLANTED)
def test_a_scale_one_level_off_is_seen(name, runtime, exported):
    network = exported(name)
    followed, given = followed_network(network.path, runtime), network.inputs(2, 1)
    layers = network.qnn.layers()
    for layer_name in PLANTED[name]:
        layer = layers[layer_name]
        with scaled(layer.act_quantizers[0].delta):
            found = followed.differences(network.qnn, *given)
        assert found.rounding[f"{layer_name}.act_quantizers.0"] > LEVEL_TOLERANCE, layer_name
        with scaled(layer.weight_quantizers[0].delta, channel=0):
            layer.drop_dequantized()
            found = followed.differences(network.qnn, *given)
        layer.drop_dequantized()
        assert found.sums() > SUM_TOLERANCE, layer_name
    cores = [q for n, q in network.qnn.act_quantizers().items() if n.endswith("act_quantizer_w")]
    with scaled(cores[0].delta):
        assert followed.differences(network.qnn, *given).levels() > LEVEL_TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", thorough_except(("ddim", "digits"), "ddim"))
def test_one_weight_one_level_off_is_seen(name, runtime, exported):
    network = exported(name)
    qnn, given = network.qnn, network.inputs(2, 1)
    followed = followed_network(network.path, runtime)
    layer = qnn.layers()["mid.block_1.conv1"]
    before = layer.weight_int.clone()
    layer.weight_int[0, 0, 1, 1] += 1 if before[0, 0, 1, 1] == 0 else -1
    set_weights_anew(qnn)
    try:
        assert followed.differences(qnn, *given).sums() > SUM_TOLERANCE
    finally:
        layer.weight_int.copy_(before)
        set_weights_anew(qnn)
    assert followed.differences(qnn, *given).sums() < SUM_TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["ddim", "text"])
def test_one_file_takes_any_batch(name, runtime, exported):
    network = exported(name)
    followed, real = followed_network(network.path, runtime), opened_network(network.path, runtime)
    for count in (1, 2, 5):
        given = network.inputs(count, 3)
        assert followed.differences(network.qnn, *given).sums() < SUM_TOLERANCE
        out = real(*given)
        assert out.shape == given[0].shape and out.dtype == torch.float32
        # The samples of a batch do not mix: the last one alone is what it was among others, but for flips.
        assert relative(real(*(value[-1:] for value in given)), out[-1:]) < FREE_STEP_TOLERANCE
    assert relative(out[:1], out[1:2]) > 5 * FREE_STEP_TOLERANCE


@pytest.mark.thorough  # scripts/test_runtimes: the images
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_samples_are_the_simulated_ones(runtime, exported_digits, digits_model):
    network = exported_digits
    check_samples(network.qnn, network.path, runtime, digits_model, "conv_out", STEPS, SUM_TOLERANCE)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads_do_not_change_the_integers(runtime, exported_ddim):
    given = exported_ddim.inputs(3, 5)
    one, two = (OnnxNetwork(exported_ddim.path, runtime, threads)(*given) for threads in (1, 2))
    assert relative(one, two) < FREE_STEP_TOLERANCE
