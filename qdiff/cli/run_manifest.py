"""``run.json``: a run's configuration, circumstances and results, read and written only through `Manifest`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qdiff.errors import UserError
from qdiff.io.files import written_whole

VERSION = 1
FLOAT_WEIGHTS = "float weights"  # a role in `Manifest.files`
# Phases of `Manifest.seconds`: of all fits of a calibration, of the recordings between them, and of measuring how
# sensitive layers are, before their widths are chosen.
CALIBRATION, OF_REFITS, OF_WIDTHS = "calibration", "refit recording", "sensitivities"


@dataclass
class Manifest:
    """The entries of ``run.json``, with the names that they have there. None means that the entry is absent.

    Attributes:
        config: the resolved configuration: everything that decides the images.
        command: the command that started or last continued the run.
        num_images: number of images that the run makes.
        status: ``running`` or ``finished``.
        packages: versions by name.
        machine: ``platform``, ``python``, ``cpus``, and ``cpu``, its name and the instruction set of PyTorch's kernels.
        files: ``path`` and ``sha256`` of every file that was read, by role.
        seconds, cpu_seconds: wall time and CPU time of the process by phase, over all continuations of the run.
        image_shape: [H, W, C] of the images.
        images_kept: False if the images were deleted as asked.
        labels: the requested class of each image.
        fused_kernels: whether fake quantization ran in the project's own kernels.
        network_calls: network calls to sample one image.
        network_bytes: bytes of the float network in float32.
        cost: cost per image; see `qdiff.cost.account`.
        allocation: how TDAC distributed the calibration samples over the timesteps.
        estimated_peak_bytes, estimated_gpu_peak_bytes: the calibration's planned peak use of RAM and of GPU memory.
        stored_activations_peak_bytes: peak size of the calibration's stored activations.
        reconstruction_errors: the final error of every unit, by phase and name.
        checkpoint_notes: notes on its calibration that a loaded checkpoint carries.
        noise_error: error of ε against float on held-out inputs; see `qdiff.evaluation.noise_error`. Files of older
            versions lack ``last_step``, ``last_timestep`` and ``median_step``.
        noise_correction: kind, origin and measured benefit of the sampler's noise correction, as its file has them.
        device: the device that sampled.
        gpu: its name, TF32 and precision; null on the CPU.
        processes, torch_threads: number of processes that sampled, and of CPU threads per process.
        peak_memory_bytes: peak memory per process.
        activation_quantizers: their number (``total``), and the names of those that never fired (``silent``).
        version: version of this format; files without this entry have version 1.
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
    cpu_seconds: dict[str, float] | None = None
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
    noise_correction: dict[str, Any] | None = None
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
        """Return the manifest in a file.

        Raises:
            ValueError: the file is damaged or has a later version, or an entry has a value of a wrong kind; the message
                says which.
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
        """Write the entries that are not None, as an atomic write."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "others"}
        # Once something was sampled, null says that there was no GPU.
        held = {name: v for name, v in values.items() if v is not None or (name == "gpu" and self.device is not None)}
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps({**held, **self.others}, indent=1) + "\n")

    @property
    def weights_hash(self) -> str | None:
        """SHA-256 of the float weights; None if they are in no file of their own."""
        return self.files.get(FLOAT_WEIGHTS, {}).get("sha256")

    def calibration_seconds(self) -> tuple[float, float | None]:
        """Return the wall time and, if known, the CPU time of calibrating.

        A refit's recordings and the choice of widths count, the first recording does not: other runs may share that.
        """
        phases, cpu = (CALIBRATION, OF_REFITS, OF_WIDTHS), self.cpu_seconds or {}
        wall = sum(self.seconds.get(phase, 0.0) for phase in phases)
        return wall, sum(cpu.get(phase, 0.0) for phase in phases) if CALIBRATION in cpu else None

    def add_seconds(self, phase: str, seconds: float, cpu_seconds: float | None = None) -> None:
        """Add wall time, and CPU time if it is known, to a phase."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 3)
        if cpu_seconds is not None:
            before = (self.cpu_seconds or {}).get(phase, 0.0)
            self.cpu_seconds = {**(self.cpu_seconds or {}), phase: round(before + cpu_seconds, 3)}


def read_manifest(file: Path, fix: str) -> Manifest:
    """Return what a user's file holds.

    Args:
        fix: what to do about a damaged one, the rest of the sentence.

    Raises:
        UserError: as `Manifest.read`.
    """
    try:
        return Manifest.read(file)
    except ValueError as error:
        raise UserError(f"{file} is not a run's manifest ({error}); {fix}") from error


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
    "cpu_seconds": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "noise_error": lambda value: isinstance(value, dict) and _is_number(value.get("mse")),
    "labels": lambda value: value is None or _is_list(value, int),
}
