"""The noise correction of a run: collected once into the run folder, or a file collected before."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from qdiff.calibration.correction_file import FIX, check_use, describe_use, read_correction, write_correction
from qdiff.calibration.noise_pairs import collect_noise_pairs
from qdiff.calibration.noise_regression import Kind, Per, correction_error, fit_correction
from qdiff.calibration.storage import ActivationStorage
from qdiff.checkpoint.metadata import content_hash
from qdiff.cli.options.noise_correction import CorrectionPlan, resolve_correction
from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.cli.processes import choose_device, precision_on
from qdiff.cli.quantize import CHECKPOINT
from qdiff.cli.run_folder import RunFolder
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.machine.memory import available_memory
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.sampling import NoiseCorrection, Sampler

log = logging.getLogger("qdiff")

FILE = "noise_correction.json"
OWN_FIX = "delete it to collect it again"
# First images of the calibration streams for the statistics and for measuring what they bring; calibration sets and the
# held-out inputs of `held_out.py` are others.
FIRST, HELD_OUT_FIRST, HELD_OUT = 1 << 21, 1 << 22, 16


class RunCorrection:
    """The noise correction that a run's options ask for.

    Args:
        wanted: what they ask for.
        plan: how the run quantizes its network.
        pipeline: the run's model and sampler.
        device: that the run will be on, which decides its precision; None for the pipeline's.

    Raises:
        UserError: the run cannot be corrected, or the file that is named does not fit it.
    """

    def __init__(
        self, wanted: CorrectionPlan, plan: PtqPlan | None, pipeline: Pipeline, device: torch.device | None = None
    ) -> None:
        option = "--noise_correction" if wanted.path is None else "--correction_path"
        if plan is None:
            raise UserError(f"{option} has no meaning without --ptq; add --ptq, or leave {option} out")
        if not isinstance(pipeline.sampler, Sampler):
            raise UserError(
                f"{option} needs one of this project's samplers, but the loop of a diffusers pipeline has its own; "
                f"leave {option} out"
            )
        if plan.quant.modulate:
            raise UserError(
                f"{option} and --modulate contradict each other, because the error of a modulated network depends on "
                "the steps before; leave one of them out"
            )
        if wanted.path is not None and plan.action != "load":
            raise UserError(
                "--correction_path is for the checkpoint that it was collected with; give that with --cali_ckpt PATH"
            )
        self.wanted, self.plan, self.pipeline, self._device = wanted, plan, pipeline, device
        if wanted.path is not None:
            self._read(Path(wanted.path), Path(plan.checkpoint), plan.quant, FIX)

    def file(self, run: RunFolder) -> Path:
        """Return where the correction is, or will be."""
        return run.path / FILE if self.wanted.path is None else Path(self.wanted.path)

    def is_missing(self, run: RunFolder) -> bool:
        """Whether it is still to be collected, which needs the float network."""
        return not self.file(run).is_file()

    def collect(self, run: RunFolder, qnn: QuantModel) -> None:
        """Collect the correction in the run folder unless that is done already.

        Args:
            qnn: calibrated, with its float weights.
        """
        if not self.is_missing(run):
            return
        pipeline, wanted = self.pipeline, self.wanted
        budget = self.plan.memory_budget
        storage = ActivationStorage(available_memory() // 2 if budget is None else int(budget * 2**30))
        log.info("collecting the noise correction on %d images", wanted.samples)
        advice = smaller_batch(min(pipeline.batch_size, wanted.samples))
        with memory_advice("collecting the noise correction", advice), run.timed("noise correction"):
            pairs = collect_noise_pairs(pipeline, qnn, range(FIRST, FIRST + wanted.samples), storage)
            correction = fit_correction(Kind(wanted.kind), Per(wanted.per), pairs)
            del pairs
            others = range(HELD_OUT_FIRST, HELD_OUT_FIRST + HELD_OUT)
            held_out = collect_noise_pairs(pipeline, qnn, others, storage, show_progress=False)
        measured = {
            "images": HELD_OUT,
            "mse": correction_error(None, held_out),
            "corrected_mse": correction_error(correction, held_out),
        }
        origin = {**wanted.to_dict(), "seed": pipeline.sampler.seed, "held_out": measured}
        write_correction(self.file(run), correction, self._use(self._checkpoint(run), qnn.config), origin)
        log.info(
            "mean squared error of ε along the float trajectory: %.3e, corrected %.3e",
            measured["mse"],
            measured["corrected_mse"],
        )

    def load(self, run: RunFolder, qnn: QuantModel, is_first: bool) -> NoiseCorrection:
        """Return the correction, after checking that it fits the run.

        Args:
            qnn: the run's network; its widths may have been chosen after the options were read.
            is_first: this process also says in the manifest what is used.
        """
        path = self.file(run)
        fix = OWN_FIX if self.wanted.path is None else FIX
        correction, origin = self._read(path, self._checkpoint(run), qnn.config, fix)
        if is_first:
            run.add_file("noise correction", path)
            run.manifest.noise_correction = {**origin, "network_calls": len(correction.times)}
            run.save_manifest()
            log.info("noise correction %s from %s", origin.get("kind"), path)
        return correction

    def _checkpoint(self, run: RunFolder) -> Path:
        return Path(self.plan.checkpoint) if self.plan.action == "load" else run.path / CHECKPOINT

    def _use(self, checkpoint: Path, quant: QuantConfig) -> dict[str, Any]:
        precision = precision_on(self._device or self.pipeline.device, self.pipeline.precision_name)
        return describe_use(self.pipeline.sampler, quant, content_hash(checkpoint), precision)

    def _read(
        self, path: Path, checkpoint: Path, quant: QuantConfig, fix: str
    ) -> tuple[NoiseCorrection, dict[str, Any]]:
        correction, found, origin = read_correction(path, fix)
        check_use(path, correction, found, self._use(checkpoint, quant), self.pipeline.sampler, fix)
        for name in ("kind", "per"):
            asked = getattr(self.wanted, name)
            if asked not in (None, origin.get(name)):
                option = "--noise_correction" if name == "kind" else "--correction_per"
                raise UserError(f"noise correction {path} has {name} {origin.get(name)}, not {option} {asked}; {fix}")
        return correction, origin


def run_correction(args: Namespace, plan: PtqPlan | None, pipeline: Pipeline) -> RunCorrection | None:
    """Return the noise correction that options ask for; None if they ask for none.

    Raises:
        UserError: see `resolve_correction` and `RunCorrection`.
    """
    wanted = resolve_correction(args)
    if wanted is None:
        return None
    # A file is checked before the pipeline is on its device.
    device = None if wanted.path is None else choose_device(args.device, args.tf32)
    return RunCorrection(wanted, plan, pipeline, device)
