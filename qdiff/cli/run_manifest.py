"""``run.json``: what a run is, how it was made and what came of it. Read and written through `Manifest` alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qdiff.io.files import written_whole

VERSION = 1


@dataclass
class Manifest:
    """The entries of ``run.json``, by the names that they have there. None is an entry that is not there.

    Attributes:
        config: the resolved configuration: what decides the images.
        command: that began or last continued the run.
        num_images: how many images the run makes.
        status: ``running`` or ``finished``.
        packages: versions by name.
        machine: ``platform``, ``python``, ``cpus``.
        files: ``path`` and ``sha256`` of every file that was read, by role.
        seconds: wall time by phase, over all continuations of the run.
        image_shape: [H, W, C] of the images.
        images_kept: False where the images were deleted as asked.
        labels: the class that each image was asked for.
        fused_kernels: fake quantization ran in the project's own kernels.
        network_calls: of the sampling of one image.
        network_bytes: of the float network in float32.
        cost: of one image: see `qdiff.cost.account`.
        allocation: how TDAC distributed the calibration samples over the timesteps.
        estimated_peak_bytes, estimated_gpu_peak_bytes: what the calibration was planned to take of RAM, and of a GPU.
        stored_activations_peak_bytes: what its stored activations took.
        reconstruction_errors: the final error of every unit, by phase and name.
        checkpoint_notes: what a loaded checkpoint says of its calibration.
        noise_error: error of ε against float on held-out inputs: see `qdiff.evaluation.noise_error`.
        device: that sampled.
        gpu: its name, TF32 and precision; null on the CPU.
        processes, torch_threads: that sampled, and CPU threads of each.
        peak_memory_bytes: of each process.
        activation_quantizers: how many there are (``total``), and the names of those that never fired (``silent``).
        version: of this format; files without one are of version 1.
        others: entries that this version does not know; they are kept.
    """

    config: dict[str, Any]
    command: str = ""
    num_images: int | None = None
    status: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    image_shape: list[int] | None = None
    images_kept: bool | None = None
    labels: list[int] | None = None
    fused_kernels: bool | None = None
    network_calls: int | None = None
    network_bytes: int | None = None
    cost: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    estimated_peak_bytes: int | None = None
    estimated_gpu_peak_bytes: int | None = None
    stored_activations_peak_bytes: int | None = None
    reconstruction_errors: dict[str, float] | None = None
    checkpoint_notes: dict[str, Any] | None = None
    noise_error: dict[str, Any] | None = None
    device: str | None = None
    gpu: dict[str, Any] | None = None
    processes: int | None = None
    torch_threads: int | None = None
    peak_memory_bytes: list[int] | None = None
    activation_quantizers: dict[str, Any] | None = None
    version: int = VERSION
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Return what a file holds.

        Raises:
            ValueError: it is damaged, of a later version, or an entry has a value of another kind; the message says
                which.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
            raise ValueError("it has no config")
        for name, fits in _FITS.items():
            if name in found and not fits(found[name]):
                raise ValueError(f"{name} is {_short(found[name])}")
        prompts = found["config"].get("prompts")
        if not (prompts is None or _is_list(prompts, str)):
            raise ValueError(f"the prompts of its config are {_short(prompts)}")
        known = {f.name for f in fields(cls)} - {"others"}
        others = {name: value for name, value in found.items() if name not in known}
        return cls(**{name: value for name, value in found.items() if name in known}, others=others)

    def write(self, file: Path) -> None:
        """Write the entries that are there, whole or not at all."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "others"}
        # Where something was sampled, no GPU is an answer.
        held = {name: v for name, v in values.items() if v is not None or (name == "gpu" and self.device is not None)}
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps({**held, **self.others}, indent=1) + "\n")

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add wall time to a phase."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 3)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in value.values()
    )


_FITS: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: _is_whole(value) and value <= VERSION,
    "status": lambda value: value in ("running", "finished"),
    "num_images": _is_whole,
    "images_kept": lambda value: isinstance(value, bool),
    "image_shape": lambda value: _is_list(value, int) and len(value) == 3,
    "files": _is_files,
    "packages": lambda value: isinstance(value, dict),
    "machine": lambda value: isinstance(value, dict),
    "seconds": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "noise_error": lambda value: isinstance(value, dict) and _is_number(value.get("mse")),
    "labels": lambda value: _is_list(value, int),
}
