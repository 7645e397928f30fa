"""GRIP in one call: widths of single layers, chosen by going back through the pipeline's own loop."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import DDIMPipeline, DiffusionPipeline
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
from torch import nn

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.diffusers_backend.denoiser import find_denoiser
from qdiff.diffusers_backend.pipeline_in_memory import PipelineInMemory
from qdiff.errors import UserError
from qdiff.methods.registry import METHODS

TEXT = {"prompts": PROMPTS}
OWN = {name: METHODS["grip"].quant[name] for name in ("split_shortcut", "layer_bits")}
KINDS = {
    "pixels, as the method's own config": (ddim, {}, OWN),
    "text, first token in float": (stable_diffusion, TEXT, {"bos_aware": True}),
    "classes": (class_conditional, {"class_labels": [1, 2]}, {}),
}


def quantize(pipe, fields=None, **options):
    given = {"samples": 2, "steps": 2, "num_inference_steps": 2, "batch_size": 2, "method": "grip", **options}
    config = qdiff.QuantConfig(**{"weight_bits": 4, "act_bits": 8, **(fields or {})})
    return qdiff.quantize_pipeline(pipe, config, run=CalibrationRun(show_progress=False), **given)


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def widths_of(pipe):
    return dict(network_of(pipe).hf_quantizer.quantization_config.quant_config.layer_bits)


@pytest.fixture
def few_images(monkeypatch):
    """Two trajectories instead of sixteen."""
    choose = qdiff.api.choose_widths
    monkeypatch.setattr(
        "qdiff.diffusers_backend.quantize.choose_widths", lambda *given, **more: choose(*given, **more, images=2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_chosen_and_saved(kind, few_images, tmp_path):
    make, options, fields = KINDS[kind]
    pipe = make()
    scheduler = pipe.scheduler
    sizes = {
        name: m.weight.numel() for name, m in network_of(pipe).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    quantize(pipe, fields, **options)
    assert pipe.scheduler is scheduler and torch.is_grad_enabled()
    widths = widths_of(pipe)
    assert set(widths) == set(sizes)
    assert len({bits.weight_bits for bits in widths.values()}) > 1 < len({bits.act_bits for bits in widths.values()})
    assert sum(widths[name].weight_bits * size for name, size in sizes.items()) <= 4 * sum(sizes.values())
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    sampled = {"prompt": PROMPTS[:2]} if "prompts" in options else options
    assert torch.equal(images(loaded, **sampled), images(pipe, **sampled)) and widths_of(loaded) == widths


@pytest.mark.slow
def test_dynamic_ranges_leave_inputs_as_they_are(few_images):
    pipe = ddim()
    quantize(pipe, {"act_dynamic": True})
    widths = widths_of(pipe)
    assert len({bits.weight_bits for bits in widths.values()}) > 2
    assert {name for name, bits in widths.items() if bits.act_bits is not None} == {
        "first",
        "last",
        "conv_in",
        "conv_out",
    }


@pytest.mark.slow
def test_a_network_in_half_precision(few_images):
    pipe = flux_without_encoders()
    nn.Module.to(pipe.transformer, torch.bfloat16)
    given = {name: tensor.to(torch.bfloat16) for name, tensor in encoded_prompts().items()}
    quantize(pipe, height=32, width=32, **given)
    assert widths_of(pipe) and pipe.transformer.dtype == torch.bfloat16
    assert torch.isfinite(images(pipe, **given, height=32, width=32)).all()


@pytest.mark.slow
def test_what_leaves_widths_as_they_are(monkeypatch):
    monkeypatch.setattr("qdiff.diffusers_backend.quantize.choose_widths", None)  # fails if it is called
    pipe = ddim()
    quantize(pipe, uniform_widths=True)
    assert widths_of(pipe) == {}
    pipe = ddim()
    quantize(pipe, {"layer_bits": {"conv_in": "W8A8"}})
    assert set(widths_of(pipe)) == {"conv_in"}
    with pytest.raises(UserError, match="uniform_widths has no meaning with linear"):
        quantize(ddim(), method="linear", uniform_widths=True)


def in_memory(pipe, prompts=(), batch_size=2, component=None, **options):
    component, network = find_denoiser(pipe, component)
    return PipelineInMemory(pipe, component, network, 0, batch_size, prompts, options)


def test_all_steps_of_the_pipeline_are_run():
    """Without num_inference_steps, those of the pipeline's own default; some have None."""
    pipe = ddim()
    assert in_memory(pipe).calls == inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default

    class Own(DDIMPipeline):
        def __call__(self, batch_size=1, generator=None, num_inference_steps=None, output_type="pil"):
            return super().__call__(batch_size, generator, 0.0, num_inference_steps or 4, output_type=output_type)

    pipeline = in_memory(quiet(Own(ddim().unet, ddim().scheduler)))
    assert pipeline.calls == 4 and pipeline.with_steps(3).calls == 3


def picture_to_picture():
    return stable_diffusion("StableDiffusionImg2ImgPipeline")


ENCODED = encoded_prompts()
TWICE = {
    "true_cfg_scale": 3.0,
    "negative_prompt_embeds": ENCODED["prompt_embeds"],
    "negative_pooled_prompt_embeds": ENCODED["pooled_prompt_embeds"],
}
FLUX = {**ENCODED, "height": 32, "width": 32}
PICTURE = {"prompts": PROMPTS, "image": torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
ONE = {"batch_size": 1, "negative_prompt": ["b"]}
LOOPS = {
    "two calls a step": (flux_without_encoders, {**FLUX, **TWICE, "num_inference_steps": 2}, 4),
    "sigmas": (flux_without_encoders, {**FLUX, "sigmas": [1.0, 0.7, 0.3]}, 3),
    "part of the steps": (picture_to_picture, {**PICTURE, "strength": 0.5, "num_inference_steps": 4}, 2),
    "ControlNet": (with_controlnet, {**PICTURE, "num_inference_steps": 2}, 2),
    "batches of one": (stable_diffusion, {**TEXT, **ONE, "num_inference_steps": 3}, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOPS)
def test_loops_are_followed_to_their_end(kind):
    make, options, calls = LOOPS[kind]
    pipe = make()
    pipeline = in_memory(pipe, **options)
    rows = range(pipeline.batch_size)
    assert pipeline.calls == calls
    with torch.no_grad():
        made = pipeline.sample_latents(pipeline.network, rows)
        whole = pipeline.sample(pipeline.network, rows, calibration=True)
    assert torch.equal(made, whole)
    config = qdiff.choose_widths(pipeline, qdiff.QuantConfig(4, 8), images=2, show_progress=False)
    assert config.layer_bits
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert all(p.grad is None for part in parts for p in part.parameters())


class Hidden(DDIMPipeline):
    """Its scheduler's steps are taken by another object."""

    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="pil"):
        seen, self.scheduler = self.scheduler, ddim().scheduler
        try:
            return super().__call__(batch_size, generator, 0.0, num_inference_steps, output_type=output_type)
        finally:
            self.scheduler = seen


def test_loops_that_cannot_be_followed():
    pipeline = in_memory(quiet(Hidden(ddim().unet, ddim().scheduler)), num_inference_steps=2)
    with pytest.raises(UserError, match=r"Hidden takes no step of its scheduler .*uniform_widths=True"):
        pipeline.sample_latents(pipeline.network, range(2))
    with pytest.raises(UserError, match="controlnet answers with something else than a sample; give --uniform_widths"):
        in_memory(with_controlnet(), component="controlnet", num_inference_steps=2, **PICTURE)


def test_wrong_arguments_are_told_before_sampling(monkeypatch):
    monkeypatch.setattr("qdiff.diffusers_backend.quantize.record_pipeline", None)  # fails if it is called
    with pytest.raises(UserError, match="seed is -1"):
        quantize(ddim(), seed=-1)
    with pytest.raises(UserError, match="has no module nothing; give names"):
        quantize(ddim(), units=["nothing"])
