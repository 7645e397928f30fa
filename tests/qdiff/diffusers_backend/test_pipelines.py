"""Whole pipelines in one call: calibrated on their own sampling loop, saved, loaded, and sampled from again."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import DiffusionPipeline
from pipelines import (
    PROMPTS,
    class_conditional,
    ddim,
    encoded_prompts,
    flux_without_encoders,
    images,
    quiet,
    stable_diffusion,
    with_controlnet,
)
from tiny_models import text_unet

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.timesteps import Spacing
from qdiff.diffusers_backend.denoiser import listen
from qdiff.diffusers_backend.recording import record_pipeline
from qdiff.methods.qdiffusion import QDiffusionConfig

QUICK = QDiffusionConfig(iterations=1, act_iterations=1, batch_size=4)
PICTURE = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def inpainting():
    return stable_diffusion("StableDiffusionInpaintPipeline", unet=text_unet(in_channels=9))


PIPELINES = {
    "DDIM": (ddim, {}, {}),
    "SD 2.1": (lambda: stable_diffusion(prediction="v_prediction"), {"prompts": PROMPTS}, {}),
    "inpainting": (inpainting, {"prompts": PROMPTS}, {"image": PICTURE, "mask_image": PICTURE[:, :1].round()}),
    "with ControlNet": (with_controlnet, {"prompts": PROMPTS}, {"image": PICTURE}),
    "DiT": (class_conditional, {}, {"class_labels": [1, 2]}),
    "FLUX": (flux_without_encoders, {}, {**encoded_prompts(), "height": 32, "width": 32}),
}


def quantize(pipe, **options):
    given = {"samples": 2, "steps": 2, "num_inference_steps": 2, "method": "linear", **options}
    return qdiff.quantize_pipeline(pipe, qdiff.QuantConfig(4, 8), run=CalibrationRun(show_progress=False), **given)


@pytest.mark.slow
@pytest.mark.parametrize("width", ["W32", "W32A32"])
def test_corrected_biases_beside_float_weights(width, tmp_path):
    pipe = ddim()
    config = qdiff.QuantConfig(4, 8, layer_bits={"conv_out": width})
    run = CalibrationRun(show_progress=False)
    qdiff.quantize_pipeline(pipe, config, samples=2, steps=2, num_inference_steps=2, method="gptq", run=run)
    expected = images(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_quantized_saved_and_loaded(name, tmp_path):
    make, given, options = PIPELINES[name]
    pipe = make()
    sampled = {**options, **({"prompt": given["prompts"][:2]} if given else {})}
    in_float = images(pipe, **sampled)
    learned = {"method": "qdiff", "settings": QUICK} if name == "DDIM" else {}
    notes = quantize(pipe, **given, **options, **learned)
    before = images(pipe, **sampled)
    assert not torch.equal(before, in_float) and torch.isfinite(before).all()
    if name == "with ControlNet":  # which stays as it is
        assert not hasattr(pipe.controlnet, "hf_quantizer")
        untouched = make().controlnet.state_dict()
        assert all(torch.equal(tensor, untouched[part]) for part, tensor in pipe.controlnet.state_dict().items())
    pipe.save_pretrained(tmp_path)
    absent = {part: None for part, component in pipe.components.items() if component is None}
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, **absent))
    assert torch.equal(images(loaded, **sampled), before)
    assert loaded.scheduler.config.get("prediction_type") == pipe.scheduler.config.get("prediction_type")
    folder = "unet" if hasattr(pipe, "unet") else "transformer"
    config = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qdiff" and config["notes"]["noise_error"] == notes["noise_error"]
    assert (tmp_path / folder / "README.md").is_file()


@pytest.mark.slow
def test_a_component_by_its_name():
    pipe = with_controlnet()
    quantize(pipe, component="controlnet", prompts=PROMPTS, image=PICTURE)
    assert pipe.controlnet.is_quantized and not hasattr(pipe.unet, "hf_quantizer")
    assert torch.isfinite(images(pipe, prompt=PROMPTS[:2], image=PICTURE)).all()


def test_the_data_are_what_the_pipeline_calls_its_network_with():
    pipe, calls = stable_diffusion(), []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    images(pipe, 2, prompt=["a", "b"], num_inference_steps=4)
    handle.remove()
    options = {"num_inference_steps": 4}
    data, call = record_pipeline(pipe, pipe.unet, 2, 2, prompts=["a", "b"], batch_size=2, options=options)
    assert call.names == ("sample", "timestep", "encoder_hidden_states")
    assert [len(i) for i in data.inputs] == [8, 8, 8]  # two images with guidance, at two calls of four
    x, t, context = data.inputs
    kept = [i for i in range(4) if any(torch.equal(calls[i][0][0], part) for part in x.split(4))]
    assert len(kept) == 2
    for rows, index in zip((slice(0, 4), slice(4, 8)), kept, strict=True):
        args, kwargs = calls[index]
        assert torch.equal(x[rows], args[0]) and (t[rows] == args[1]).all()
        assert torch.equal(context[rows], kwargs["encoder_hidden_states"])


@pytest.mark.parametrize(("spacing", "wanted"), [(Spacing.EVERY, [0, 1, 2]), (Spacing.ENDS, [0, 2, 4])])
def test_calls_that_are_kept(spacing, wanted):
    pipe, times = stable_diffusion(), []
    options = {"prompts": PROMPTS, "options": {"num_inference_steps": 5}, "spacing": spacing}
    handle = listen(pipe.unet, lambda args, kwargs: times.append(float(args[1])))
    data, _ = record_pipeline(pipe, pipe.unet, 1, 3, **options)
    handle.remove()
    assert data.inputs[1].unique_consecutive().tolist() == [times[i] for i in wanted]


def test_batches_do_not_change_the_data():
    records = []
    for batch_size in (1, 3):
        options = {"prompts": PROMPTS, "options": {"num_inference_steps": 2}, "batch_size": batch_size}
        data, _ = record_pipeline(pipe := stable_diffusion(), pipe.unet, 3, 1, **options)
        records.append(sorted(data.inputs[0].flatten(1).sum(1).tolist()))
    assert records[0] == pytest.approx(records[1], abs=1e-4)


def test_encoded_prompts_are_one_per_image():
    pipe, given = flux_without_encoders(), encoded_prompts(2)
    options = {**given, "height": 32, "width": 32, "num_inference_steps": 1}
    data, call = record_pipeline(pipe, pipe.transformer, 3, 1, batch_size=2, options=options)
    embeddings = data.inputs[call.names.index("encoder_hidden_states")]
    assert torch.equal(embeddings, given["prompt_embeds"][[0, 1, 0]])


@pytest.mark.slow
def test_the_seed_decides():
    states = []
    for seed in (0, 0, 1):
        pipe = class_conditional()
        quantize(pipe, seed=seed, method="qdiff", settings=QUICK)
        states.append(pipe.transformer.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert any(not torch.equal(states[0][name], tensor) for name, tensor in states[2].items())
