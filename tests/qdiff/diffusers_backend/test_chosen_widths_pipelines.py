"""GRIP in one call: widths of single layers, chosen by going back through the pipeline's own loop."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import DiffusionPipeline
from pipelines import PROMPTS, class_conditional, ddim, encoded_prompts, flux_without_encoders, images, stable_diffusion
from torch import nn

import qdiff
from qdiff.calibration.run import CalibrationRun
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


def test_all_steps_of_the_pipeline_are_run(monkeypatch):
    """Without num_inference_steps, those of the pipeline's own default."""
    pipe, calls = ddim(), []
    steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default

    def noted(pipeline, config, **options):
        calls.append(pipeline.calls)
        raise UserError("enough")

    monkeypatch.setattr("qdiff.diffusers_backend.quantize.choose_widths", noted)
    with pytest.raises(UserError, match="enough"):
        qdiff.quantize_pipeline(pipe, qdiff.QuantConfig(4, 8), "grip", samples=1, steps=1)
    assert calls == [steps]
