"""What cannot be quantized: one sentence, before anything is sampled; and what a quantized component refuses."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from components import quantized, read_inputs
from diffusers.models.attention_processor import AttnProcessor2_0
from pipelines import PROMPTS, class_conditional, ddim, flux_without_encoders, quiet, stable_diffusion
from tiny_models import MODELS, text_unet, unet
from torch import nn

import qdiff
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.quantize import attach
from qdiff.errors import UserError
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quant_model import QuantModel

W4, W4A8 = QuantConfig(4), QuantConfig(4, 8)
TEXT = {"prompts": PROMPTS}


def refused(pipe, message, config=W4A8, **options):
    """Check that a pipeline is refused in one sentence and before its network runs."""
    networks = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    for network in networks:
        network.register_forward_pre_hook(lambda *_: pytest.fail("it was sampled from"))
    with pytest.raises(UserError, match=message) as raised:
        qdiff.quantize_pipeline(pipe, config, **options)
    assert "\n" not in str(raised.value) and not str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "StableDiffusionPipeline makes images from text; give prompts"),
        ({**TEXT, "component": "prior"}, "has no network prior; name one of its components: .*unet"),
        (
            {**TEXT, "component": "text_encoder"},
            "text_encoder is of type CLIPTextModel, whose forward takes no time",
        ),
        ({**TEXT, "component": "vae"}, "vae is of type AutoencoderKL, whose forward takes no timestep"),
        ({**TEXT, "method": "best"}, "the method is 'best'; choose one of"),
        ({**TEXT, "method": "linear", "settings": QDiffusionConfig()}, "the method takes nothing to set"),
        ({**TEXT, "samples": 0}, "samples is 0; give at least 1"),
        ({**TEXT, "batch_size": 0}, "batch_size is 0; give at least 1"),
    ],
)
def test_arguments(options, message):
    refused(stable_diffusion(), message, **options)


def test_keywords_that_a_pipeline_does_not_take():
    refused(ddim(), "DDIMPipeline takes no prompts; leave them out", prompts=PROMPTS)
    refused(ddim(), "DDIMPipeline takes no colour; leave them out", colour="red")


def test_a_pipeline_without_a_denoiser():
    pipe = ddim()
    pipe.unet, pipe.register_modules = nn.Identity(), None
    refused(pipe, "unet has no layer to quantize")
    del pipe.unet
    pipe.unet = None
    refused(pipe, "DDIMPipeline has no unet or transformer; name the component to quantize")


def test_fewer_calls_than_are_to_be_kept():
    with pytest.raises(UserError, match="2"):
        qdiff.quantize_pipeline(ddim(), W4, samples=1, steps=3, num_inference_steps=2)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (ddim, QuantConfig(4, 8, modulate=True), "a pipeline's loop opens no trajectory for modulation"),
        (class_conditional, QuantConfig(4, split_shortcut=True), "DiTTransformer2DModel has no up blocks to split"),
        (flux_without_encoders, QuantConfig(4, split_shortcut=True), "give prompts|has no up blocks to split"),
    ],
)
def test_widths_that_a_network_cannot_have(make, config, message):
    refused(make(), message, config)


def test_first_and_last_that_are_not_known():
    pipe = class_conditional()
    pipe.transformer.proj_out_3 = pipe.transformer._modules.pop("proj_out_2")
    refused(pipe, "the first and last layer of DiTTransformer2DModel are not known", QuantConfig(4, keep_ends=True))


@pytest.mark.parametrize("options", [{"method": "tfmq-dm"}, {"settings": QDiffusionConfig(temporal_unit=True)}])
def test_a_temporal_unit_that_is_not_known(options):
    refused(ddim(), "temporal unit of UNet2DModel is not known; .* settings with temporal_unit=False", **options)


def test_a_quantized_pipeline(quantized_folder):
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(quantized_folder))
    refused(pipe, "unet is already quantized; load the float pipeline")


@pytest.mark.slow
def test_an_attention_that_is_not_seen():
    """As that of a library's kernel, which calls nothing of torch."""

    class OfALibrary(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return attn.to_out[0](attn.to_q(hidden_states))

    pipe = stable_diffusion()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(OfALibrary())
    with pytest.raises(UserError, match="attn2 computes attention with OfALibrary, whose operands cannot be quantized"):
        qdiff.quantize_pipeline(pipe, W4A8, prompts=PROMPTS, samples=1, steps=1, num_inference_steps=1)
    qdiff.quantize_pipeline(pipe, W4, "linear", prompts=PROMPTS, samples=1, steps=1, num_inference_steps=1)


def lora(network):
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return network


@pytest.mark.slow
def test_a_network_with_an_adapter():
    pytest.importorskip("peft")
    pipe = stable_diffusion()
    lora(pipe.unet)
    refused(pipe, r"tensors that its config does not describe, e\.g\. .* fuse adapters \(pipe\.fuse_lora\(\)", **TEXT)
    pipe = stable_diffusion()
    before = pipe.unet(**MODELS["SD 1"].inputs(2)).sample
    lora(pipe.unet)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not torch.equal(pipe.unet(**MODELS["SD 1"].inputs(2)).sample, before)
    qdiff.quantize_pipeline(pipe, W4, "linear", prompts=PROMPTS, samples=1, steps=1, num_inference_steps=1)


@pytest.mark.parametrize("make", [stable_diffusion, flux_without_encoders])
def test_a_lora_on_top(make, tmp_path):
    pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    pipe = make()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(lora(getattr(make(), name)))}
    type(pipe).save_lora_weights(tmp_path, **layers)
    network = getattr(pipe, name)
    call, samples = read_inputs(network, MODELS["SD 1" if name == "unet" else "FLUX"].inputs(2))
    quantized(network, W4, "linear", None, call, samples)
    refusal = "a LoRA cannot be added to quantized weights; fuse it into the float pipeline"
    # Of FLUX, diffusers looks up the float weights before it asks the network to take the LoRA.
    with pytest.raises(KeyError if name == "transformer" else UserError, match="weight"):
        pipe.load_lora_weights(tmp_path)
    for add in (lambda: network.load_lora_adapter(tmp_path, prefix=name), lambda: lora(network)):
        with pytest.raises(UserError, match=refusal):
            add()


def test_a_float_pipeline_takes_that_lora(tmp_path):
    """So that the refusal above is of the quantized layers."""
    pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(lora(text_unet()))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe = stable_diffusion()
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_active_adapters()


def test_float_weights_are_gone(quantized_folder):
    network = diffusers.UNet2DModel.from_pretrained(quantized_folder / "unet")
    with pytest.raises(UserError, match="the float weights are gone; load the float pipeline"):
        network.dequantize()


def test_a_network_that_scales_inputs():
    """As a given checkpoint may; before anything is packed."""
    network = unet()
    qnn = QuantModel(network, QuantConfig(4, 8))
    layer = next(iter(qnn.layers().values()))
    layer.set_input_scale(torch.full((layer.in_channels,), 2.0))
    with pytest.raises(UserError, match="no place for factors of its layers' input channels; give a checkpoint"):
        attach(network, qnn, {})
    assert layer.packed is None
