"""Pipelines whose text layers leave the first token in float: quantized in one call, saved, loaded and refused."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import DiffusionPipeline
from pipelines import PROMPTS, images, quiet, stable_diffusion
from text_network import other_texts, text_data, texts, wrapped
from tiny_models import TEXT, TOKENS, text_unet

import qdiff
from qdiff.calibration.first_token import find_first_tokens
from qdiff.calibration.run import CalibrationRun
from qdiff.diffusers_backend.component_tokens import make_token_places, watch_first_tokens
from qdiff.diffusers_backend.convert_state import check_convertible
from qdiff.diffusers_backend.denoiser import read_call
from qdiff.diffusers_backend.module import Denoiser
from qdiff.diffusers_backend.quantizer import QDiffQuantizer
from qdiff.errors import UserError

W8A8 = qdiff.QuantConfig(8, 8, bos_aware=True)


def quantize(pipe, config=W8A8, **options):
    given = {"samples": 2, "steps": 2, "num_inference_steps": 2, "method": "linear", **options}
    return qdiff.quantize_pipeline(pipe, config, run=CalibrationRun(show_progress=False), **given)


@pytest.mark.slow
@torch.no_grad()
def test_quantized_saved_and_loaded(tmp_path):
    pipe = stable_diffusion()
    notes = quantize(pipe, prompts=PROMPTS)
    assert float(notes["noise_error"].split("(")[1].split()[0]) < 0.3  # a network of random weights
    before = images(pipe, prompt=PROMPTS[:2])
    layers = pipe.unet.hf_quantizer.quantization_config.first_tokens
    assert layers and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in layers)
    assert list(layers.values()).count(True) == 1
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert torch.equal(images(loaded, prompt=PROMPTS[:2]), before)
    assert "8 bits, the first token of a text in float" in (tmp_path / "unet" / "README.md").read_text()
    half = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, dtype=torch.bfloat16)
    assert images(quiet(half), prompt=PROMPTS[:2]).isfinite().all()
    other = torch.randn(2, TOKENS, TEXT)
    with pytest.raises(UserError, match="begins with another token than in calibration"):
        images(loaded, prompt_embeds=other, negative_prompt_embeds=other)


@torch.no_grad()
def test_found_where_conditions_are_joined():
    network = text_unet()
    context = torch.randn(2, TOKENS, TEXT)
    context[1, 0] = context[0, 0]
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": context}
    denoiser = Denoiser(network)
    found = find_first_tokens(denoiser, denoiser.describe(*read_call(network, (), given)))
    assert found and all(name.startswith("network.") for name in found)
    assert torch.equal(next(iter(found.values())).input, context[0, 0])


def test_texts_that_begin_differently_are_found_at_the_first_call():
    pipe, calls = stable_diffusion(), []
    pipe.unet.conv_out.register_forward_hook(lambda *_: calls.append(None))
    prompts = {"prompt_embeds": torch.randn(2, TOKENS, TEXT), "guidance_scale": 1.0}
    with pytest.raises(UserError, match="first token of the context is not the same for all samples"):
        quantize(pipe, **prompts)
    assert len(calls) == 1  # the one in which the layers are found


@torch.no_grad()
def test_on_a_gpu_another_token_is_told_after_the_call(cuda):
    qnn = wrapped()
    qdiff.calibrate(qnn, text_data(), "linear", run=CalibrationRun(show_progress=False))
    network = qnn.to("cuda").model
    for _ in range(2):
        watch_first_tokens(network)
    same, other = (tuple(part.to("cuda") for part in some(seed=2)) for some in (texts, other_texts))
    with qnn.quantized():
        network(*same)
        with pytest.raises(UserError, match="begins with another token"):
            network(*other)


def test_what_has_no_place_for_it_refuses():
    with pytest.raises(UserError, match=r"mid_block is no quantized layer, .* quantize the pipeline again"):
        make_token_places(text_unet(), {"mid_block": False})
    with pytest.raises(UserError, match=r"outputs of the first token need calibration data; .* or leave out bos_aware"):
        QDiffQuantizer(qdiff.QDiffConfig(weight_bits=4, bos_aware=True), pre_quantized=False)
    with pytest.raises(UserError, match=r"not converted; quantize the pipeline with .* --bos_aware"):
        check_convertible(W8A8)
