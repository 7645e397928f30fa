"""The calibration set: the inputs of the denoising network while the float model samples.

Files have the published format: ``torch.save`` of a dict with ``xs`` [steps][n, C, H, W] and ``ts`` [steps][n], and
``cs``, ``ucs`` [steps][n, L, D] for conditional models; steps are in sampling order, noisiest first. Steps may hold
different numbers of samples. ``xs_prev`` and ``ts_prev``, if present, hold the sampling step before each (MoDiff).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdiff.calibration.timesteps import Spacing, spaced
from qdiff.errors import UserError
from qdiff.io.torch_files import read_torch_file, write_torch_file

FIX = "make one with scripts/collect_calibration.py"
MAPPED_FROM = 1 << 30  # bytes
TIMES = ("ts", "ts_prev")
KEYS = ("xs", "cs", "ucs", "xs_prev", *TIMES)


@dataclass(frozen=True)
class CalibrationSet:
    """Network inputs, one entry per sample: x [N, C, H, W], t [N] and, if conditional, the context [N, L, D].

    For pairs (`select_pairs`): [N, 2, C, H, W], [N, 2] and [N, 2, L, D], the earlier step first.
    """

    inputs: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])


def save_recording(recording: Mapping[str, Sequence[Tensor]], path: str | Path) -> None:
    """Write a recording ({"xs": …, "ts": …}) in the published format with an atomic write."""
    write_torch_file(recording, path)


def load_recording(path: str | Path, training_steps: int | None = None) -> dict[str, Sequence[Tensor]]:
    """Read a published calibration file without running code from it.

    Args:
        training_steps: T; timesteps of T or more are refused, because no sampler uses them. None skips this check.

    Raises:
        UserError: the file is missing, damaged, empty, or not in the published format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"calibration file {path} does not exist; {FIX}, or leave --cali_data_path out")
    recording = read_torch_file(path, "calibration file", FIX, MAPPED_FROM)
    if not isinstance(recording, dict) or not {"xs", "ts"} <= set(recording):
        raise UserError(f"calibration file {path} is malformed: it is not a dict with xs and ts; {FIX}")
    unknown = sorted(set(map(str, recording)) - {*KEYS})
    if unknown:
        raise UserError(
            f"calibration file {path} holds unknown entries ({', '.join(unknown)}); rename them to one of "
            f"{', '.join(KEYS)}, or remove them"
        )
    for key, rows in recording.items():
        listed = isinstance(rows, list | tuple) and all(isinstance(r, Tensor) for r in rows)
        if not (listed or isinstance(rows, Tensor)):
            raise UserError(f"calibration file {path} is malformed: {key} does not hold tensors; {FIX}")
        if (rows.dim() if isinstance(rows, Tensor) else 1) == 0 or any(r.dim() == 0 for r in rows):
            raise UserError(f"calibration file {path} is malformed: {key} holds single numbers, not samples; {FIX}")
        if len(rows) != len(recording["xs"]):
            raise UserError(
                f"calibration file {path} is malformed: {len(recording['xs'])} steps of xs, {len(rows)} of {key}; {FIX}"
            )
        for step, samples in enumerate(rows):
            _check_samples(samples, key, step, path, training_steps)
    if len(recording["xs"]) == 0 or any(len(x) == 0 for x in recording["xs"]):
        raise UserError(f"calibration file {path} is empty; {FIX}")
    return recording


def _check_samples(samples: Tensor, key: str, step: int, path: Path, training_steps: int | None) -> None:
    """Raise a `UserError` if the samples of a step are not numbers that a network can take as input."""
    if key in TIMES:
        if samples.is_complex() or samples.dtype == torch.bool:
            raise UserError(f"calibration file {path} is malformed: {key} holds {samples.dtype}, not timesteps; {FIX}")
        wrong = (samples.double() < 0) | ~torch.isfinite(samples.double())
        if wrong.any():
            raise UserError(
                f"calibration file {path} is malformed: {key} holds the timestep {float(samples[wrong][0])} at step "
                f"{step}; {FIX}"
            )
        if training_steps is not None and len(samples) and (latest := float(samples.max())) >= training_steps:
            raise UserError(
                f"calibration file {path} holds the timestep {latest:g} in {key} at step {step}, but this model has "
                f"0 to {training_steps - 1}; give a file recorded with this model, or {FIX}"
            )
        return
    if not samples.is_floating_point():
        raise UserError(f"calibration file {path} is malformed: {key} holds {samples.dtype}, not floats; {FIX}")
    if not torch.isfinite(samples).all():
        raise UserError(
            f"calibration file {path} holds NaN or infinite values, the first in {key} at step {step}; {FIX}"
        )


def select_samples(
    recording: Mapping[str, Sequence[Tensor]],
    steps: int | None,
    per_step: int | None,
    image_shape: tuple[int, ...],
    conditional: bool = False,
    source: str | Path = "the recording",
    spacing: Spacing = Spacing.EVERY,
) -> CalibrationSet:
    """Take ``per_step`` samples at each of ``steps`` recorded steps; None takes all.

    Args:
        recording: as from `load_recording`.
        steps: ``--cali_st``; None: every recorded step.
        per_step: ``--cali_n``; None: every sample of each step.
        image_shape: (C, H, W) of the network's input.
        conditional: take the conditional and the unconditional half, twice the data; only the conditional half if the
            file has no other (sampled without guidance).
        source: name for error messages.
        spacing: which of the recorded steps are taken.

    Raises:
        UserError: fewer steps or samples are recorded than requested, or samples have another shape.
    """
    xs, ts = recording["xs"], recording["ts"]
    if steps is None:
        steps = len(xs)
    if steps > len(xs):
        raise UserError(
            f"--cali_st {steps} is more than the {len(xs)} steps recorded in {source}; give --cali_st {len(xs)} or less"
        )
    chosen = spaced(len(xs), steps, spacing)
    if per_step is not None and per_step < 1:
        raise UserError(f"--cali_n is {per_step}; give at least 1")
    fewest = min(len(xs[i]) for i in chosen)
    if per_step is not None and per_step > fewest:
        raise UserError(
            f"--cali_n {per_step} is more than the {fewest} samples per step in {source}; give --cali_n {fewest} or "
            "less"
        )
    if any(tuple(xs[i].shape[1:]) != tuple(image_shape) for i in chosen):
        raise UserError(
            f"{source} holds samples of shape {tuple(xs[chosen[0]].shape[1:])} but the network takes "
            f"{tuple(image_shape)}; give a file recorded with this model"
        )
    if any(ts[i].dim() != 1 or len(ts[i]) != len(xs[i]) for i in chosen):
        raise UserError(f"{source} is malformed: ts does not hold one timestep per sample; {FIX}")

    def rows(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([values[i][:per_step] for i in chosen])

    x, t = rows(xs).float(), rows(ts)
    if not conditional:
        if "cs" in recording:
            raise UserError(
                f"{source} holds conditions (cs) but the network takes none; give a file recorded with this model"
            )
        return CalibrationSet((x, t))
    if "cs" not in recording:
        raise UserError(f"{source} holds no conditions (cs, ucs); record it with the conditional model")
    halves = [rows(recording[key]).float() for key in ("cs", "ucs") if key in recording]
    if any(half.dim() != 3 or len(half) != len(x) or half.shape != halves[0].shape for half in halves):
        raise UserError(f"{source} is malformed: cs and ucs do not hold one [L, D] condition per sample; {FIX}")
    return CalibrationSet((x.repeat(len(halves), 1, 1, 1), t.repeat(len(halves)), torch.cat(halves)))


def network_calls(recording: Mapping[str, Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """Return the network's inputs at each recorded call: (x [N, C, H, W], t [N][, context [N, L, D]]).

    With guidance, x and t are doubled and the context holds the unconditional half before the conditional one, as in
    `qdiff.sampling.guidance`.
    """
    halves = [recording[key] for key in ("ucs", "cs") if key in recording]
    if not halves:
        return list(zip(recording["xs"], recording["ts"], strict=True))
    return [
        (x.repeat(len(halves), 1, 1, 1), t.repeat(len(halves)), torch.cat(contexts))
        for x, t, *contexts in zip(recording["xs"], recording["ts"], *halves, strict=True)
    ]


def select_pairs(
    recording: Mapping[str, Sequence[Tensor]],
    steps: int | None,
    per_step: int | None,
    image_shape: tuple[int, ...],
    conditional: bool = False,
    source: str | Path = "the recording",
    spacing: Spacing = Spacing.EVERY,
) -> CalibrationSet:
    """Take samples as `select_samples` does, each together with the sampling step before it.

    Raises:
        UserError: as `select_samples`, or no previous steps are recorded.
    """
    if not {"xs_prev", "ts_prev"} <= set(recording):
        raise UserError(
            f"{source} holds no previous steps (xs_prev, ts_prev), which ranges of changes need; record it with "
            "--generate residual"
        )
    here = {key: values for key, values in recording.items() if not key.endswith("_prev")}
    before = {**here, "xs": recording["xs_prev"], "ts": recording["ts_prev"]}
    chosen = steps, per_step, image_shape, conditional, source, spacing
    pair = [select_samples(recorded, *chosen).inputs for recorded in (before, here)]
    if any(a.shape != b.shape for a, b in zip(*pair, strict=True)):
        raise UserError(f"{source} is malformed: xs_prev and ts_prev do not hold one previous step per sample; {FIX}")
    return CalibrationSet(tuple(torch.stack(both, dim=1) for both in zip(*pair, strict=True)))


def check_context(data: CalibrationSet, expected: tuple[int, ...] | None, source: str | Path) -> None:
    """Raise a `UserError` if the samples' contexts do not have the shape [L, D] that the network takes."""
    if expected is not None and (found := tuple(data.inputs[2].shape[-2:])) != tuple(expected):
        raise UserError(
            f"{source} holds conditions of shape {found} but the network takes {tuple(expected)}; give a file "
            "recorded with this model"
        )
