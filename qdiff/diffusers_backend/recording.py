"""Calibration data from a pipeline's own loop: what its denoising network is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.timesteps import Spacing, spaced
from qdiff.diffusers_backend.denoiser import DenoiserCall, listen, read_call
from qdiff.errors import UserError


@torch.no_grad()
def record_pipeline(
    pipe: Any,
    network: nn.Module,
    samples: int,
    steps: int,
    *,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    options: Mapping[str, Any] | None = None,
    spacing: Spacing = Spacing.EVERY,
) -> tuple[CalibrationSet, DenoiserCall]:
    """Sample from a pipeline and keep its network's inputs at chosen calls.

    Guidance that doubles the batch gives two rows per image and kept call.

    Args:
        network: the component that is listened to.
        samples: number of images.
        steps: calls to keep of each sampling run.
        prompts: one per image, repeated from the start where there are fewer; for text pipelines.
        seed: image number i is drawn from seed + i.
        batch_size: images per batch.
        options: further keywords for the pipeline's call. Encoded prompts (tensors such as ``prompt_embeds``) and
            ``class_labels`` are one per image, repeated as prompts are.
        spacing: which calls are kept.

    Returns:
        The inputs on the CPU, and how the pipeline passes them to the network.

    Raises:
        UserError: the pipeline makes fewer calls than ``steps``, or calls its network otherwise at some of them.
    """
    options = dict(options or {})
    kept: list[tuple[Tensor, ...]] = []
    call: DenoiserCall | None = None
    for first in range(0, samples, batch_size):
        rows = range(first, min(first + batch_size, samples))
        calls: list[tuple[tuple, dict]] = []
        handle = listen(network, lambda args, kwargs, calls=calls: calls.append((args, kwargs)))
        try:
            pipe(**arguments_of(pipe, rows, prompts, seed, options))
        finally:
            handle.remove()
        for index in spaced(len(calls), steps, spacing):
            found, inputs = read_call(network, *calls[index])
            if call is not None and found.names != call.names:
                raise UserError(
                    f"{type(pipe).__name__} calls its network with other arguments at some steps "
                    f"({', '.join(found.names)}); record it with options for which they stay the same"
                )
            call = call or found
            kept.append(tuple(i.detach().cpu() for i in inputs))
    return CalibrationSet(tuple(torch.cat(part) for part in zip(*kept, strict=True))), call


def check_options(pipe: Any, prompts: Sequence[str] | None, options: Mapping[str, Any]) -> None:
    """Raise a `UserError` if a pipeline, or a class of pipelines, cannot be called with what is given."""
    name = (pipe if inspect.isclass(pipe) else type(pipe)).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    takes_text = "prompt" in parameters
    if takes_text and not prompts and not {"prompt", "prompt_embeds"} & set(options):
        raise UserError(f"{name} makes images from text; give prompts")
    if prompts and not takes_text:
        raise UserError(f"{name} takes no prompts; leave them out")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(set(options) - set(parameters))
        if unknown:
            raise UserError(f"{name} takes no {', '.join(unknown)}; leave them out")
    given = {"self", "prompt", "batch_size", "generator", "class_labels", *options}
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [n for n in needed if n not in given]
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)}; give them as keywords")


def arguments_of(
    pipe: Any, rows: Sequence[int], prompts: Sequence[str] | None, seed: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keywords with which a pipeline makes the images numbered ``rows``; latents are not decoded."""
    parameters = inspect.signature(pipe.__call__).parameters
    made: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed + row) for row in rows]}
    given = dict(options)
    if prompts:
        made["prompt"] = [prompts[row % len(prompts)] for row in rows]
    elif "class_labels" in parameters:
        labels = list(given.pop("class_labels", ())) or range(count_classes(pipe))
        made["class_labels"] = [int(labels[row % len(labels)]) for row in rows]
    elif "batch_size" in parameters:
        made["batch_size"] = len(rows)
    if "output_type" in parameters and hasattr(pipe, "vae"):
        made["output_type"] = "latent"
    for name, value in given.items():
        if "prompt" in name and isinstance(value, Tensor):
            given[name] = value[[row % len(value) for row in rows]]
    return {**made, **given}


def count_classes(pipe: Any) -> int:
    """Return the number of classes of a class-conditional pipeline, from its names or its networks' configs.

    Raises:
        UserError: neither says it.
    """
    if names := getattr(pipe, "labels", None):
        return len(set(names.values()))
    for component in pipe.components.values():
        config = getattr(component, "config", {})
        for key in ("num_embeds_ada_norm", "num_class_embeds", "n_classes"):
            if isinstance(config, Mapping) and isinstance(config.get(key), int):
                return config[key]
    raise UserError(f"the classes of this {type(pipe).__name__} are not known; give class_labels (--classes)")
