"""Quantized pipelines on a (virtual) GPU, offloaded, compiled and copied."""

from __future__ import annotations

import copy
import pickle

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from pipelines import ddim, images, quiet
from tiny_models import unet
from virtual_cuda.modules import left_behind

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.errors import UserError

# Relative L2: attention sums in another order there, and a value on a rounding edge falls to the other side.
CLOSE = 0.1

SMALL = {"block_out_channels": (4,), "up_block_types": ("UpBlock2D",), "mid_block_type": None}


@pytest.fixture
def pipe(quantized_folder):
    return quiet(diffusers.DiffusionPipeline.from_pretrained(quantized_folder))


@pytest.mark.slow
def test_moved_to_a_gpu_and_back(pipe, cuda, relative):
    expected = images(pipe)
    pipe.to("cuda")
    assert not left_behind(pipe.unet) and pipe.unet.device.type == "cuda"
    assert relative(images(pipe).cpu(), expected) < CLOSE
    pipe.to("cpu")
    assert torch.equal(images(pipe), expected)


@pytest.mark.slow
def test_calibrated_on_a_gpu(cuda, relative):
    made = []
    for device in ("cpu", "cuda"):
        pipe = ddim(**SMALL, down_block_types=("AttnDownBlock2D",), attention_head_dim=4).to(device)
        options = {"samples": 4, "steps": 1, "num_inference_steps": 1, "run": CalibrationRun(show_progress=False)}
        qdiff.quantize_pipeline(pipe, qdiff.QuantConfig(4, 8), "linear", **options)
        assert not left_behind(pipe.unet) or device == "cpu"
        made.append(images(pipe).cpu())
    assert relative(made[1], made[0]) < CLOSE


@pytest.mark.slow
def test_offloaded_as_a_whole(pipe, cuda, relative):
    expected = images(pipe)
    pipe.enable_model_cpu_offload(device="cuda")
    where = set()
    pipe.unet.conv_in.register_forward_pre_hook(lambda layer, args: where.update({args[0].device, layer.bias.device}))
    assert relative(images(pipe).cpu(), expected) < CLOSE
    assert where == {torch.device("cuda", 0)}
    pipe.maybe_free_model_hooks()
    assert {t.device.type for t in pipe.unet.state_dict().values()} == {"cpu"}


@pytest.mark.slow
def test_offloading_layer_by_layer_is_refused(pipe, cuda):
    pipe.enable_sequential_cpu_offload(device="cuda")
    with pytest.raises(UserError, match=r"cannot be offloaded layer by layer; call pipe\.enable_model_cpu_offload\(\)"):
        images(pipe)
    pipe.remove_all_hooks()
    expected = images(quiet(diffusers.DiffusionPipeline.from_pretrained(pipe.config._name_or_path)))
    assert torch.equal(images(pipe.to("cpu")), expected), "the way back"


def test_an_offloaded_pipeline_is_not_quantized(cuda):
    made = ddim()
    made.enable_model_cpu_offload(device="cuda")
    with pytest.raises(UserError, match=r"unet is offloaded; call pipe\.remove_all_hooks\(\)"):
        qdiff.quantize_pipeline(made, qdiff.QuantConfig(4))
    made.remove_all_hooks()
    assert not qdiff.diffusers_backend.structure.is_quantized(made.unet)


@pytest.mark.slow
@torch.no_grad()
def test_compiled(tmp_path):
    """With weights alone quantized, the whole network is one graph."""
    unet(**SMALL, down_block_types=("DownBlock2D",)).save_pretrained(tmp_path)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path, quantization_config=qdiff.QDiffConfig(weight_bits=4))
    given = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    expected = network(*given).sample
    assert network.hf_quantizer.is_compileable
    assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(*given).sample, expected)


def test_a_compiled_network_is_not_quantized():
    made = ddim()
    made.unet = torch.compile(made.unet, backend="eager")
    with pytest.raises(UserError, match="unet is compiled; quantize it first and compile it then"):
        qdiff.quantize_pipeline(made, qdiff.QuantConfig(4))
    made = ddim()
    made.unet.mid_block.compile(backend="eager")
    with pytest.raises(UserError, match="unet has compiled modules; quantize it first and compile it then"):
        qdiff.quantize_pipeline(made, qdiff.QuantConfig(4))


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_are_independent(pipe, copied, tmp_path):
    expected = images(pipe)
    twin = copied(pipe)
    assert torch.equal(images(twin), expected)
    twin.unet.conv_out.weight_quantizers[0].delta.zero_()
    twin.unet.conv_out.bias.zero_()
    assert torch.equal(images(pipe), expected) and not torch.equal(images(twin), expected)
    twin.save_pretrained(tmp_path)
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(images(loaded), images(twin)), "it saves its own weights"
