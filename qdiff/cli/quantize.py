"""Carry out a quantization plan: load or calibrate, inside a run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qdiff.api import calibrate
from qdiff.calibration.footprint import measure_footprint
from qdiff.calibration.input_scales import Scaling
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.layer_rounding import rounding_bytes
from qdiff.calibration.memory_plan import MemoryUse, plan_memory
from qdiff.calibration.pairs import PairedNetwork
from qdiff.calibration.refit import discard_calibration
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet, save_recording
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.temporal_unit import calibration_steps
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.checkpoint.metadata import read_notes
from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.out_of_memory import memory_advice
from qdiff.cli.planned_recording import read_planned, warn_if_ends_early
from qdiff.cli.processes import arithmetic_of
from qdiff.cli.run_folder import RunFolder
from qdiff.cli.run_manifest import CALIBRATION, OF_REFITS
from qdiff.errors import UserError
from qdiff.interface import SteppedNetwork
from qdiff.io.files import sha256
from qdiff.io.tensor_files import is_pickle
from qdiff.methods import modiff
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

Record = Callable[..., dict[str, Tensor | list[Tensor]]]
"""``record()`` samples with the float network, ``record(qnn)`` with a quantized one; returns what the plan asks for."""

CHECKPOINT = "quantized.safetensors"
RECORDING = "calibration_data.pt"
JOURNAL = "calibration"


class Quantization:
    """Wraps a float network and carries out a plan.

    Construction reads and checks every file that the plan names and writes nothing; `complete` does the work.
    Outside of ``qnn.quantized()`` the wrapped network still computes in float.

    Args:
        network: network with float weights, on its device.
        plan: the plan to carry out.
        run: run folder for the calibrated checkpoint, its recording and unfinished work; may not exist yet.
        image_shape: (C, H, W) of the network's input.
        context_shape: (L, D) of a conditional network's context, else None.
        training_steps: T; a recording with a timestep of T or later is refused. None skips this check.
        visited: returns the timesteps that sampling calls the network at, in order.
        probe: makes inputs of the network (`Pipeline.probe`) to check the activation widths of a published file; None
            skips this check.

    Attributes:
        qnn: the wrapped network.
        fit: which calibration is in work: 0, the first, or the number of a refit. An interrupted run continues with the
            last one whose recording is there, since it depends on nothing but that.

    Raises:
        UserError: a file is missing, damaged, or does not fit.
    """

    def __init__(
        self,
        network: SteppedNetwork,
        plan: PtqPlan,
        run: RunFolder,
        image_shape: tuple[int, ...],
        context_shape: tuple[int, ...] | None = None,
        training_steps: int | None = None,
        visited: Callable[[], Sequence[float]] = tuple,
        probe: Callable[[], tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.plan, self.run, self.image_shape, self.context_shape = plan, run, image_shape, context_shape
        self.training_steps, self.visited = training_steps, visited
        self.finished = run.path / CHECKPOINT
        self.fit = 0
        self.data: CalibrationSet | None = None
        self.pairs: CalibrationSet | None = None
        self.qnn = wrap_network(network, plan)
        self.is_calibrated = plan.action == "load" or self.finished.is_file()
        if self.is_calibrated:
            load_checkpoint(self.qnn, self._source, probe=probe)
            if self.qnn.act_timesteps is not None:
                self.qnn.act_timesteps.check(visited())
            return
        if plan.action == "activations":
            load_checkpoint(self.qnn, plan.checkpoint, activations=False)
        while self.fit < plan.refit and all(self._recording(n).is_file() for n in (self.fit, self.fit + 1)):
            self.fit += 1
        if plan.data is not None or self._recording(0).is_file():
            self._read_recording()

    @property
    def _source(self) -> str | Path:
        return self.plan.checkpoint if self.plan.action == "load" else self.finished

    def _recording(self, fit: int) -> Path:
        if fit > 0:
            return self.run.path / f"{Path(RECORDING).stem}-refit{fit}.pt"
        return Path(self.plan.data) if self.plan.data is not None else self.run.path / RECORDING

    def _read_recording(self) -> None:
        shapes = self.image_shape, self.context_shape, self.training_steps
        self.data, self.pairs = read_planned(self.plan, self._recording(self.fit), *shapes, self.visited())

    def complete(self, seed: int, record: Record, show_progress: bool = True) -> QuantModel:
        """Record and calibrate unless that is done already, and return the quantized network.

        Args:
            seed: seed of the calibration.
            record: see `Record`.
        """
        if self.is_calibrated:
            role = "quantized checkpoint" if self.plan.action == "load" else "calibrated checkpoint"
            add_checkpoint(self.run, role, self._source)
            return self.qnn
        memory = self._memory()
        log.info("calibration needs %s", memory)
        if self.data is None:
            with self.run.timed("recording"):
                save_recording(record(), self._recording(0))
            self._read_recording()
        if self.plan.mixed is None and self.fit == 0:  # else the choice of widths has told it
            warn_if_ends_early(self.plan, self.data, self.visited())
        for fit in range(self.fit + 1):
            self._add_recording(fit)
        weights = None
        if self.plan.action == "activations":
            weights = sha256(self.plan.checkpoint)
            self.run.add_file("quantized checkpoint", self.plan.checkpoint)
        settings = {"plan": self.plan.to_dict(), "seed": seed, "weights": weights, **arithmetic_of(self.qnn.device)}
        journal = CalibrationJournal(self.run.path / JOURNAL, settings)
        self._fit(journal, memory, seed, show_progress)
        while self.fit < self.plan.refit:
            self._start_refit(record)
            self._fit(journal, memory, seed, show_progress)
        self._save(seed)
        journal.discard()
        return self.qnn

    def _add_recording(self, fit: int) -> None:
        role = "calibration data" if fit == 0 else f"calibration data of refit {fit}"
        self.run.add_file(role, self._recording(fit))

    def _fit(self, journal: CalibrationJournal, memory: MemoryUse, seed: int, show_progress: bool) -> None:
        if self.fit > 0:  # in a folder inside, so that all are discarded together
            journal = CalibrationJournal(journal.folder / f"refit{self.fit}", journal.settings)
        with memory_advice("calibrating", self._calibration_advice):
            self._calibrate(journal, memory, seed, show_progress)

    def _start_refit(self, record: Record) -> None:
        """Record the quantized network's own trajectory, and put the network back to its float weights."""
        log.info("refit %d of %d", self.fit + 1, self.plan.refit)
        with self.run.timed(OF_REFITS):
            recording = record(self.qnn)
            if not all(torch.isfinite(x).all() for x in recording["xs"]):
                raise UserError(
                    "the samples of the quantized network are not finite; leave out --refit, or give a larger "
                    "--weight_bit or --act_bit"
                )
            save_recording(recording, self._recording(self.fit + 1))
        self.fit += 1
        self._read_recording()
        self._add_recording(self.fit)
        self.run.save_manifest()
        discard_calibration(self.qnn)

    @property
    def _calibration_advice(self) -> str:
        given, restart = self.plan.memory_budget, "free some memory"
        if hasattr(self.plan.recipe, "batch_size") or self.plan.changes is not None:
            restart = "start again with a smaller --cali_batch_size in another --logdir"
        if given == 0:
            return restart
        budget = "a --memory_budget in GiB" if given is None else f"a --memory_budget of less than {given:g}"
        return (
            f"repeat the command with {budget} to continue: finished units are kept; if that is not enough, {restart}"
        )

    def _memory(self) -> MemoryUse:
        """Plan the memory of the calibration; before the recording exists, for the size that it will have."""
        plan = self.plan
        shapes = [self.image_shape, (), *([] if self.context_shape is None else [self.context_shape])]
        temporal_unit = getattr(plan.recipe, "temporal_unit", False)
        network = calibration_steps(self.qnn, self._zeros(shapes), temporal_unit)
        if plan.changes is not None:
            network, shapes = PairedNetwork(self.qnn.as_steps(self._zeros(shapes))), [(2, *shape) for shape in shapes]
        footprint = measure_footprint(network, self._zeros(shapes))
        halves = 1 if self.context_shape is None else 2  # without guidance it would be 1, but that is not known here
        samples = plan.samples * halves if self.data is None else len(self.data)
        budget = None if plan.memory_budget is None else int(plan.memory_budget * 2**30)
        recipe = plan.recipe or plan.changes
        batch_size = getattr(recipe, "batch_size", 1)
        rounding = 0
        if getattr(recipe, "rounds_columns", False):
            rounding = rounding_bytes(self.qnn)
        if rounding or plan.scaling.kind not in (Scaling.NONE, Scaling.DILATE):
            footprint = footprint.with_layer_inputs
        return plan_memory(self.qnn, footprint, samples, batch_size, budget, rounding)

    def _zeros(self, shapes: list[tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(1, *shape, device=self.qnn.device) for shape in shapes)

    def _calibrate(self, journal: CalibrationJournal, memory: MemoryUse, seed: int, show_progress: bool) -> None:
        plan, run = self.plan, self.run
        weights = plan.action == "calibrate"
        calibration = CalibrationRun(
            seed,
            weights,
            ActivationStorage(memory.for_storage, device=memory.gpu if memory.on_gpu else None),
            journal,
            show_progress,
            footprint=memory.footprint,
            pass_bytes=memory.pass_bytes,
            resident_bytes=memory.resident_bytes,
        )
        log.info("calibrating with %s on %d samples", plan.name, len(self.data))
        with run.timed(CALIBRATION):
            if weights or plan.changes is None:
                calibrate(self.qnn, self.data, plan.method, plan.recipe, run=calibration, scaling=plan.scaling)
            if plan.changes is not None:
                modiff.calibrate_changes(self.qnn, self.pairs, plan.changes, calibration)
        run.manifest.estimated_peak_bytes = memory.peak
        if memory.gpu is not None:
            run.manifest.estimated_gpu_peak_bytes = memory.gpu_peak
        run.manifest.reconstruction_errors = calibration.errors
        before = run.manifest.stored_activations_peak_bytes or 0
        run.manifest.stored_activations_peak_bytes = max(calibration.storage.peak, before)
        run.save_manifest()

    def _save(self, seed: int) -> None:
        plan = self.plan
        notes = {"method": plan.name, "seed": seed, "samples": len(self.data), "plan": plan.to_dict()}
        if plan.refit:
            notes["refit"] = plan.refit
        save_checkpoint(self.qnn, self.finished, notes=notes)
        log.info("calibrated checkpoint: %s (%d bytes)", self.finished, self.finished.stat().st_size)


def wrap_network(network: SteppedNetwork, plan: PtqPlan) -> QuantModel:
    """Return the network with a plan's quantizers; a `UserError` names the checkpoint that widths may come from."""
    try:
        return QuantModel(network, plan.quant)
    except UserError as error:
        if plan.checkpoint is None or not plan.quant.layer_bits:
            raise
        # The widths of single layers may be the file's, which nobody typed.
        raise UserError(f"checkpoint {plan.checkpoint} does not fit this network: {error}") from error


def add_checkpoint(run: RunFolder, role: str, path: str | Path) -> None:
    """Add a quantized checkpoint that was read to the manifest, with the calibration notes that it carries."""
    run.add_file(role, path)
    made_by = {} if is_pickle(Path(path)) else {k: v for k, v in read_notes(Path(path)).items() if k != "plan"}
    if made_by:
        run.manifest.checkpoint_notes = made_by
    log.info("loaded %s%s", path, f", calibrated by {made_by['method']}" if "method" in made_by else "")
