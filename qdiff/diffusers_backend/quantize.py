"""Quantize a diffusers pipeline in place, in one call."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.api import calibrate, choose_widths, method_and_config
from qdiff.calibration.first_token import find_first_tokens
from qdiff.calibration.input_scales import Scaling
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.sample_timesteps import check_timesteps
from qdiff.calibration.temporal_unit import known_temporal_parts
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.card import writes_card
from qdiff.diffusers_backend.component_timesteps import follow_timesteps, timestep_of
from qdiff.diffusers_backend.component_tokens import check_at_first_call, tokens_of, watch_first_tokens
from qdiff.diffusers_backend.config import QDiffConfig
from qdiff.diffusers_backend.denoiser import DenoiserCall, find_denoiser, listen
from qdiff.diffusers_backend.pipeline_in_memory import PipelineInMemory
from qdiff.diffusers_backend.quantizer import QDiffQuantizer
from qdiff.diffusers_backend.recording import check_options, record_pipeline
from qdiff.diffusers_backend.refusals import NO_SCALES, check_is_plain, refuse_changes, refuse_scales
from qdiff.diffusers_backend.structure import (
    check_rebuilds,
    ends_of,
    has_fused_projections,
    is_quantized,
    mark_concatenations,
    switch_on,
)
from qdiff.errors import UserError, require_at_least
from qdiff.evaluation.noise_error import measure_noise_error
from qdiff.methods.registry import DEFAULT
from qdiff.quant_model import QuantModel
from qdiff.tracing.attention_calls import routed_calls
from qdiff.tracing.trace import count_calls
from qdiff.tracing.units import find_unit

HALF = (torch.float16, torch.bfloat16)


def quantize_pipeline(
    pipe: Any,
    config: QuantConfig,
    method: str = DEFAULT,
    settings: Any = None,
    *,
    prompts: Sequence[str] | None = None,
    samples: int = 32,
    steps: int = 16,
    seed: int = 0,
    batch_size: int = 8,
    component: str | None = None,
    units: Sequence[str] | None = None,
    run: CalibrationRun | None = None,
    uniform_widths: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Calibrate a pipeline's denoising network on its own sampling loop, and replace it by the quantized one.

    Afterwards the pipeline samples with packed weights, and ``pipe.save_pretrained`` writes them.

    Args:
        pipe: a float ``DiffusionPipeline`` on the device to calibrate on. A network in half precision is calibrated in
            float32 and converted back.
        config: widths and ranges; ``split_shortcut`` splits the concatenations of up blocks.
        method, settings: a row of `qdiff.methods.registry.METHODS` and its config; None takes the paper's values.
        prompts: for text pipelines, one per image, repeated where there are fewer.
        samples: images that are sampled for calibration.
        steps: network calls that are kept of each.
        seed: of the calibration images and of the fitting; the error is measured on other images.
        batch_size: images per batch.
        component: None takes ``unet`` or ``transformer``.
        units: modules to reconstruct as a whole; None finds residual and transformer blocks.
        run: memory, journal and progress of the calibration.
        uniform_widths: all layers have the config's widths. Otherwise, a method that chooses widths (GRIP) takes them
            as means, unless the config names other layers than the method's own does, or ranges are dynamic; gradients
            then go back through whole runs of the pipeline.
        options: further keywords of the pipeline's call, e.g. ``num_inference_steps``.

    Returns:
        What the model card says: ``method``, ``calibration``, ``noise_error`` (mean squared error of the network's
        output on held-out inputs, and relative to its mean square), ``seconds``.

    Raises:
        UserError: the pipeline or the network cannot be quantized so. What is wrong with the arguments is found before
            anything is sampled.
    """
    row, settings = method_and_config(method, settings)
    if row.scaling.kind is not Scaling.NONE:
        raise UserError(f"{NO_SCALES}, and {row.title} begins with them; choose another method")
    if uniform_widths and not row.chooses_widths:
        raise UserError(f"uniform_widths has no meaning with {row.title}, which chooses no widths; leave it out")
    chooses = row.chooses_for(config) and not uniform_widths
    if chooses:
        require_at_least(0, {"seed": seed})
        config = row.to_choose_from(config)
    require_at_least(1, {"samples": samples, "steps": steps, "batch_size": batch_size})
    name, network = find_denoiser(pipe, component)
    _check_network(name, network, config)
    if getattr(settings, "temporal_unit", False):
        known_temporal_parts(network)
    for unit in units or ():
        find_unit(network, unit)
    check_options(pipe, prompts, options)
    started = time.monotonic()
    record = {"prompts": prompts, "batch_size": batch_size, "options": options}
    visited: set[float] = set()
    handles = [listen(network, lambda args, keywords: visited.update(timestep_of(network, args, keywords).tolist()))]
    if config.bos_aware:
        handles.append(check_at_first_call(network, partial(_in_single_precision, network)))
    try:
        data, call = record_pipeline(pipe, network, samples, steps, seed=seed, spacing=row.spacing, **record)
    finally:
        for handle in handles:
            handle.remove()
    check_timesteps(config, data.inputs[1], visited)
    held_out, _ = record_pipeline(pipe, network, max(1, samples // 8), steps, seed=seed + samples, **record)
    with _in_single_precision(network):
        example = [i[:2].to(network.device) for i in data.inputs]
        _check_attention(network, config, example, call)
        if chooses:
            tokens = find_first_tokens(network, data.inputs, call) if config.bos_aware else {}
            running = PipelineInMemory(pipe, name, network, seed, batch_size, prompts, options)
            config = choose_widths(
                running,
                config,
                seed=seed,
                first_tokens={f"{running.network.family.prefix}{layer}": token for layer, token in tokens.items()},
                show_progress=run is None or run.show_progress,
            )
        qnn = QuantModel(network, config, example, call=call, units=units, ends=ends_of(network))
        calibrate(qnn, data, method, settings, seed=seed, run=run)
        error = measure_noise_error(qnn, held_out, batch_size)
    relative = error["mse"] / error["float_mean_square"]
    notes = {
        "method": row.title,
        "calibration": f"{samples} images at {steps} of the pipeline's steps",
        "seed": seed,
        "noise_error": f"{error['mse']:.3g} ({relative:.3g} of the output's mean square)",
        "seconds": round(time.monotonic() - started, 1),
        "base_model": str(getattr(pipe.config, "_name_or_path", "") or ""),
    }
    attach(network, qnn, notes)
    return notes


def attach(network: nn.Module, qnn: QuantModel, notes: dict[str, Any]) -> None:
    """Make a calibrated network a component that diffusers saves and loads: weights packed, quantized in every call.

    Args:
        network: the diffusers model: ``qnn.model``, or what is in it.
        notes: for the model card (JSON values).

    Raises:
        UserError: layers scale the channels of their input.
    """
    refuse_scales(qnn)
    for layer in qnn.layers().values():  # layers whose weight is packed have forgotten theirs
        layer.float_bias = None
    if qnn.config.weight_bits is not None:
        qnn.pack_weights()
    prefix = next(f"{name}." if name else "" for name, module in qnn.model.named_modules() if module is network)
    values = qnn.config.to_dict()
    # A network without concatenations is split nowhere, and a file that says otherwise would not load.
    values["split_shortcut"] = any(len(layer.slices) > 1 for layer in qnn.layers().values())
    config = QDiffConfig(
        attention=routed_calls(network),
        prescaled=[n for n, m in network.named_modules() if getattr(m, "prescale", False)],
        left_in_float={name.removeprefix(prefix): reason for name, reason in qnn.left_in_float.items()},
        fused_projections=has_fused_projections(network),
        ends=[name.removeprefix(prefix) for name in qnn.ends] if qnn.ends else None,
        timesteps=None if qnn.act_timesteps is None else qnn.act_timesteps.values.tolist(),
        first_tokens=tokens_of(network),
        notes=notes,
        **values,
    )
    make_component(network, config)


def make_component(network: nn.Module, config: QDiffConfig) -> None:
    """Make a network whose quantized layers are packed a component that diffusers saves and loads.

    Args:
        network: the diffusers model.
        config: how it is quantized.
    """

    network.hf_quantizer = QDiffQuantizer(config, pre_quantized=True)
    network.is_quantized, network.quantization_method = True, config.quant_method
    network.register_to_config(quantization_config=config)
    switch_on(network)
    follow_timesteps(network)
    watch_first_tokens(network)
    refuse_changes(network)
    writes_card(network)


def _check_network(name: str, network: nn.Module, config: QuantConfig) -> None:
    """Raise a `UserError` if a component cannot be quantized with these widths, loaded again, or changed at all."""
    if is_quantized(network) or getattr(network, "hf_quantizer", None) is not None:
        raise UserError(f"{name} is already quantized; load the float pipeline")
    if config.modulate:
        raise UserError("a pipeline's loop opens no trajectory for modulation; leave out modulate")
    if config.keep_ends and ends_of(network) is None:
        raise UserError(f"the first and last layer of {type(network).__name__} are not known; leave out keep_ends")
    check_is_plain(network, name)
    if importlib.util.find_spec("accelerate") is None:
        raise UserError('quantized components are loaded with accelerate; run pip install "qdiff[diffusers]"')
    check_rebuilds(network)
    if config.split_shortcut:
        mark_concatenations(network)


def _check_attention(network: nn.Module, config: QuantConfig, example: Sequence[Tensor], call: DenoiserCall) -> None:
    """Raise a `UserError` if attention is computed where its operands are not seen, e.g. in a library's kernel."""
    if config.attention_widths is None:
        return
    counts = count_calls(network, example, call)
    seen = {*counts.attention, *counts.products}
    for name, module in network.named_modules():
        inside = any(other == name or other.startswith(f"{name}.") for other in seen)
        if name in counts.modules and hasattr(module, "processor") and not inside:
            raise UserError(
                f"{name} computes attention with {type(module.processor).__name__}, whose operands cannot be "
                "quantized; give it a processor that calls torch's scaled_dot_product_attention, or leave out act_bits"
            )


@contextlib.contextmanager
def _in_single_precision(network: nn.Module) -> Iterator[None]:
    """Have what a network holds in half precision in float32 inside the block."""

    def tensors() -> dict[str, Tensor]:
        return {**dict(network.named_parameters()), **dict(network.named_buffers())}

    dtypes = {name: t.dtype for name, t in tensors().items() if t.dtype in HALF}
    for name, tensor in tensors().items():
        if name in dtypes:
            tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for name, tensor in tensors().items():
            if name in dtypes:
                tensor.data = tensor.data.to(dtypes[name])
