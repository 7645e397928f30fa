"""The bundled models with quantized activations as every runtime computes them, against the simulated ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from deploy_networks import network_inputs
from exact_runtimes import require_runtimes
from families import SCRIPTS
from following import RUNTIMES, check_samples, followed_network, opened_network, relative
from thorough import thorough_except
from torch import Tensor

from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.cli.options.parser import Parser
from qdiff.config import QuantConfig
from qdiff.methods import linear
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer

pytestmark = pytest.mark.slow

require_runtimes()

REPOSITORY = Path(__file__).parents[3]
LATENT = REPOSITORY / "models" / "ldm"
STEPS = 4  # of the latent models' samplers

# Relative L2 of a layer's output on the same integers, where the sum alone differs: last bits of float32.
LAYER_TOLERANCE = 1e-5
# … and of all that lies between two quantizers, norms and sines of large angles included.
SUM_TOLERANCE = 2e-5
# … and of what a quantizer makes of the same input: OpenVINO multiplies by 1/δ where torch divides, which moves a value
# in some thousand over a rounding edge.
LEVEL_TOLERANCE = 1.5e-3
# … and of ε by the runtime for itself, where flips at edges add up: for 8 bits some 1 %, and nothing that tells more.
FREE_TOLERANCE = 0.06
ONE_LEVEL = 1 + 1 / 255  # changes what it multiplies by 3.9e-3


@dataclass(frozen=True)
class Bundled:
    """How the tables of configs/tables quantize a bundled model to W4A8."""

    like: str
    words: tuple[str, ...]
    config: dict[str, object]


MODELS = {
    "digits": Bundled(
        "sample_diffusion_ddim",
        ("--config", str(REPOSITORY / "configs" / "digits.yml"), "--use_pretrained"),
        {"split_shortcut": True},
    ),
    "vq": Bundled(
        "sample_diffusion_ldm",
        ("-r", str(LATENT / "digits_vq"), "--seed", "1", "-c", str(STEPS)),
        {"act_symmetric": True},
    ),
    "kl": Bundled("sample_diffusion_ldm", ("-r", str(LATENT / "digits_kl"), "--seed", "1", "-c", str(STEPS)), {}),
    "class": Bundled(
        "sample_diffusion_ldm_imagenet",
        ("--config", str(LATENT / "digits_class" / "config.yaml"), "--ddim_steps", str(STEPS), "--scale", "2"),
        {"split_shortcut": True},
    ),
    "text": Bundled(
        "txt2img",
        ("--config", str(LATENT / "digits_text" / "config.yaml"), "--ddim_steps", str(STEPS), "--scale", "2"),
        {"split_shortcut": True, "softmax_bits": 16},
    ),
}
LATENTS = ("vq", "kl", "class", "text")  # digits is in test_onnx_networks


def quantized(name: str) -> tuple[QuantModel, Pipeline, tuple[Tensor, ...]]:
    """Return a model as W4A8 with ranges of a few random inputs, and others to call it with."""
    bundled = MODELS[name]
    parser = Parser(None)
    SCRIPTS[bundled.like].add_options(parser)
    parser.add_argument("--batch_size", type=int)
    model = SCRIPTS[bundled.like].pipeline_of(parser.parse_args([*bundled.words]))
    model.load(torch.device("cpu"))
    inputs = network_inputs(model.input_shape, model.context_shape)
    qnn = QuantModel(model.network, QuantConfig(weight_bits=4, act_bits=8, **bundled.config))
    linear.calibrate(qnn, CalibrationSet(inputs(4, 1)), None, CalibrationRun(show_progress=False))
    return qnn, model, inputs(2, 5)


# --- Torch, bit for bit; integers, layer by layer on the inputs of the simulation


@pytest.mark.parametrize("name", thorough_except(MODELS, "digits", "text"))
@torch.no_grad()
def test_packed_weights_and_integer_products(name, monkeypatch):
    qnn, _, given = quantized(name)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, args, out, layer_name=layer_name: seen.update({layer_name: (args[0], out)})
        )
        for layer_name, layer in qnn.layers().items()
    ]
    with qnn.quantized():
        expected = qnn(*given)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == qnn.layers().keys()
    qnn.pack_weights()
    with qnn.quantized():
        assert torch.equal(qnn(*given), expected)
    qnn.pack_weights(integer=True)
    with qnn.quantized():
        assert 0 < relative(qnn(*given), expected) < FREE_TOLERANCE
        differences = {n: relative(layer(seen[n][0]), seen[n][1]) for n, layer in qnn.layers().items()}
        assert max(differences.values()) < LAYER_TOLERANCE, max(differences, key=differences.get)
        # Planted: the scale of every activation, and of one weight.
        levels = ActQuantizer.levels

        def scaled_levels(self: ActQuantizer, x: Tensor):
            made = levels(self, x)
            return replace(made, delta=made.delta * ONE_LEVEL)

        monkeypatch.setattr(ActQuantizer, "levels", scaled_levels)
        for layer_name, layer in qnn.layers().items():
            assert relative(layer(seen[layer_name][0]), seen[layer_name][1]) > LAYER_TOLERANCE, layer_name
        monkeypatch.undo()
        layer_name = next(n for n in qnn.layers() if n.endswith(("mid.block_1.conv2", "middle_block.0.out_layers.3")))
        layer = qnn.layers()[layer_name]
        layer.weight_quantizers[0].delta[0].mul_(ONE_LEVEL)  # one channel's
        assert relative(layer(seen[layer_name][0]), seen[layer_name][1]) > LAYER_TOLERANCE


# --- ONNX, on the integers of the runtime


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from qdiff.deploy.onnx_export import export_onnx

    @functools.cache
    def made(name: str) -> tuple[QuantModel, Pipeline, Path, tuple[Tensor, ...]]:
        qnn, model, given = quantized(name)
        path = tmp_path_factory.mktemp("bundled") / f"{name}.onnx"
        export_onnx(qnn, path, model.input_shape, model.context_shape)
        return qnn, model, path, given

    return made


@contextmanager
def scaled(delta: Tensor) -> Iterator[None]:
    """Plant: a step size that is one part in 255 too large inside the block."""
    before = delta.clone()
    delta.mul_(ONE_LEVEL)
    try:
        yield
    finally:
        delta.copy_(before)


PLANTED = ("input_blocks.0.0", "middle_block.0.out_layers.3", "out.2")


@pytest.mark.thorough  # test_onnx_networks: of tiny networks
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", LATENTS)
@torch.no_grad()
def test_exported(name, runtime, exported):
    qnn, model, path, given = exported(name)
    followed = followed_network(path, runtime)
    found = followed.differences(qnn, *given)
    assert found.sums() < SUM_TOLERANCE, max(found.inputs.items(), key=lambda item: item[1])
    assert found.levels() < LEVEL_TOLERANCE, max(found.rounding.items(), key=lambda item: item[1])
    with qnn.quantized():
        assert relative(opened_network(path, runtime)(*given), qnn(*given)) < FREE_TOLERANCE
    check_samples(qnn, path, runtime, model, "out.2", STEPS, SUM_TOLERANCE)
    if name != "vq":  # the same layers in all of them
        return
    for layer_name in PLANTED:
        layer = qnn.layers()[layer_name]
        with scaled(layer.weight_quantizers[0].delta):
            assert followed.differences(qnn, *given).sums() > SUM_TOLERANCE, layer_name
        with scaled(layer.act_quantizers[0].delta):
            found = followed.differences(qnn, *given)
            assert found.rounding[f"{layer_name}.act_quantizers.0"] > LEVEL_TOLERANCE, layer_name
