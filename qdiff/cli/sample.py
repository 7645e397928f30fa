"""The flow of every sampling command: quantize as planned, then sample what is missing in the run folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.calibration.samples import network_calls, save_recording, select_samples
from qdiff.calibration.timesteps import evenly_spaced
from qdiff.checkpoint import load_packed
from qdiff.cli.options.eda_dm import of_width
from qdiff.cli.options.parser import ONNX_RUNTIMES, SIMULATED
from qdiff.cli.options.ptq import ignored_options, resolve_ptq
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.cli.pending import sample_pending
from qdiff.cli.processes import Processes, choose_device, describe_gpu, peak_memory_bytes
from qdiff.cli.quantize import Quantization, add_checkpoint
from qdiff.cli.run_folder import RunFolder, start_logging
from qdiff.cli.runtime import check_runtime, onnx_network, pack, starts_packed, wrapped
from qdiff.config import Ablation
from qdiff.cost.account import account
from qdiff.errors import UserError
from qdiff.evaluation.noise_error import measure_noise_error, measure_trajectory_error
from qdiff.half_weights import halve_weights
from qdiff.io.files import check_writable
from qdiff.io.images import save_png, to_uint8
from qdiff.io.repository import REPOSITORY
from qdiff.io.yaml_files import read_config
from qdiff.kernels.switch import check_available, fused
from qdiff.pipeline import FloatModel, trajectory_of
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

SEQUENCE_IMAGES = 8
# The ε error against float is measured on this many held-out trajectories at this many steps.
HELD_OUT_IMAGES, HELD_OUT_STEPS = 16, 10
# Samples in a network call meanwhile, at most.
ERROR_BATCH = 64
# Beyond every calibration set, and the same for all of them, so that errors can be compared.
HELD_OUT_FROM = 1 << 20
# Images of the calibration streams that belong to --cali_seed 0, and how many each such seed has.
SEEDED_FROM, SEEDED_IMAGES = 1 << 24, 1 << 20


class SampleCommand:
    """A sampling script.

    Args:
        script: its name.
        model: the family's part; ``model.args`` are the options.
        preset: EDA-DM's values for the family, a YAML file of configs/eda-dm; the model's own come before them.

    Attributes:
        config: the resolved configuration, JSON values; there after construction.
    """

    def __init__(self, script: str, model: FloatModel, preset: str | None = None) -> None:
        self.model, self.args, self._told = model, model.args, False
        values = {} if preset is None else dict(read_config(REPOSITORY / preset, "restore it from the repository"))
        bits = self.args.weight_bit
        model.notes += ignored_options(self.args)
        preset_values = {**of_width(values, bits), **of_width(model.eda_dm, bits)}
        self.plan = resolve_ptq(self.args, model.weight_range, model.act_range, preset_values)
        if self.plan is not None:
            model.check_modulation(self.plan.quant)
        records_steps = self.plan is not None and self.plan.draw is None
        if records_steps and self.plan.data is None and self.plan.action != "load":
            model.recorded_calls(self.plan.steps, self.plan.changes is not None)  # checks --cali_st
        self.config = {
            "script": script,
            "method": self.plan.name if self.plan else "float",
            **model.config,
            "seed": self.args.seed,
            "ptq": self.plan.to_dict() if self.plan else None,
        }
        if self.args.generate is not None:
            self.config["generate"] = self._recording_asked_for()
        check_runtime(self.args, None if self.plan is None else self.plan.quant)
        if self.args.runtime != SIMULATED:
            self.config["runtime"] = self.args.runtime
        if self.args.tf32:
            self.config["tf32"] = True

    @contextlib.contextmanager
    def notes_told(self) -> Iterator[None]:
        """Tell on stderr what the user should know of the model, where nothing in the block logged it, or failed first.

        An error may well come of it, e.g. of a bundled model in the place of the one that was meant.
        """
        try:
            yield
        finally:
            if not self._told:
                for note in self.model.notes:
                    print(note, file=sys.stderr)

    def _folder(self) -> Path:
        if self.args.logdir not in (None, "none"):
            return Path(self.args.logdir)
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return self.model.runs / f"{self.model.name}-{self.config['method']}-{digest}"

    def _recording_asked_for(self) -> dict[str, Any]:
        """Return what ``--generate`` records, checked."""
        args, pairs = self.args, self.args.generate == "residual"
        if args.cali_data_path is None:
            raise UserError(f"--generate {args.generate} writes a calibration set; give --cali_data_path PATH")
        if args.cali_n < 1:
            raise UserError(f"--cali_n is {args.cali_n}; give at least 1")
        calls = self.model.recorded_calls(args.cali_st, pairs)
        return {"out": args.cali_data_path, "pairs": pairs, "calls": calls, "per_step": args.cali_n}

    def _generate(self) -> None:
        args, wanted = self.args, self.config["generate"]
        check_writable(wanted["out"])
        processes = Processes(choose_device(args.device, args.tf32))
        if not processes.is_first:
            return
        batch_size = min(self.model.batch_size, wanted["per_step"])
        with memory_advice("recording", smaller_batch(batch_size, to_continue=False)):
            self.model.load(processes.device)
            recording = self.model.record(args.cali_st, wanted["per_step"], pairs=wanted["pairs"])
        save_recording(recording, wanted["out"])
        log.info("%s: %d steps of %d samples", wanted["out"], args.cali_st, wanted["per_step"])

    def run(self) -> None:
        """Quantize as planned, then sample what is missing in the run folder; with ``--generate``, record."""
        args, model = self.args, self.model
        start_logging(args.verbose)
        if args.generate is not None:
            self._generate()
            return
        run = RunFolder(self._folder(), self.config, model.count)
        if run.is_complete and getattr(args, "skip_save", False):
            log.info("%s is finished already", run.path)
            run.discard_images()  # a kill may have come before all were deleted
            return
        packs = starts_packed(args, self.plan)
        device = choose_device(args.device, args.tf32)
        if args.fused_kernels:
            check_available(device)
        if args.tf32 and device.type != "cuda":
            model.notes.append("--tf32 has no effect on the CPU")
        with memory_advice("loading the model", "free some, or give --device cpu"):
            model.load(device, network=not packs)
        packed = load_packed(model.network, self.plan.checkpoint, self.plan.quant) if packs else None
        if args.cond and not model.conditional:
            model.notes.append("--cond is ignored: this network is unconditional")
        processes = Processes(model.device)
        model.move_to(processes.device)
        # Only the first process calibrates; the others read what it wrote.
        prepared = self._prepare(run) if processes.is_first and packed is None else None
        self._told = not processes.is_first  # which says nothing
        with contextlib.ExitStack() as stack:
            if args.fused_kernels:
                stack.enter_context(fused())
            if processes.is_first:
                run.open()
                stack.enter_context(run.logged())
                for note in model.notes:
                    log.warning(note)
                self._told = True
                if model.weights is not None:
                    run.add_file("float weights", model.weights)
                if packed is not None:
                    add_checkpoint(run, "quantized checkpoint", self.plan.checkpoint)
                run.manifest["fused_kernels"] = args.fused_kernels
                run.manifest["network_calls"] = model.calls  # of one image
                run.manifest["network_bytes"] = sum(p.numel() * 4 for p in model.network.parameters())
                if model.labels is not None:
                    run.manifest["labels"] = model.labels
                log.info("run folder %s, method %s, device %s", run.path, self.config["method"], model.device)
                counted = packed or (model.network if prepared is None else prepared.qnn)
                run.manifest["cost"] = account(counted, model.input_shape, model.context_shape).summary(model.calls)
                self._complete(prepared, run)
            processes.wait()
            if packed is None and prepared is None and (prepared := self._prepare(run)) is not None:
                prepared.qnn.release_float_weights()
            self._sample(run, packed if prepared is None else prepared.qnn, processes)

    def _sample(self, run: RunFolder, qnn: QuantModel | None, processes: Processes) -> None:
        model = self.model
        denoiser = model.network if qnn is None else qnn
        if qnn is not None:
            pack(self.args, qnn)
        if self.args.runtime in ONNX_RUNTIMES:
            denoiser = onnx_network(self.args, model, wrapped(denoiser) if qnn is None else qnn, run.path, processes)
            # What is simulated in torch does not run.
            qnn = None
        else:
            with model.precision():
                if torch.is_autocast_enabled(model.device.type):
                    halve_weights(denoiser, torch.get_autocast_dtype(model.device.type))
        started = time.perf_counter()

        def images(rows: Sequence[int]) -> Tensor:
            with trajectory_of(denoiser):
                x_0 = model.trajectory(denoiser, rows)
                found = model.to_images(x_0)
            # A first stage with a codebook makes a finite image of anything.
            finite = x_0.isfinite().flatten(1).all(dim=1)
            return found.where(finite.view(-1, 1, 1, 1), math.nan)

        advice = smaller_batch(min(model.batch_size, run.count), kept=": the images that are there are kept")
        with memory_advice("sampling", advice), contextlib.nullcontext() if qnn is None else qnn.quantized():
            if getattr(self.args, "sequence", False) and processes.is_first:
                with trajectory_of(denoiser):
                    self._write_sequence(run, denoiser)
            made = sample_pending(run, images, model.batch_size, processes)
        self._finish(run, qnn, processes, made, time.perf_counter() - started)

    def _prepare(self, run: RunFolder) -> Quantization | None:
        if self.plan is None:
            return None
        model = self.model
        shapes = model.input_shape, model.context_shape
        return Quantization(model.network, self.plan, run, *shapes, model.training_steps, model.probe)

    @property
    def _calibration_seed(self) -> int:
        return self.args.seed if self.plan.seed is None else self.plan.seed

    @property
    def _first_image(self) -> int:
        """Where the recording begins in the calibration streams: another calibration seed sees other images."""
        return 0 if self.plan.seed is None else SEEDED_FROM + self.plan.seed * SEEDED_IMAGES

    def _record(self, run: RunFolder) -> dict[str, Tensor]:
        """Record the calibration set of the plan, and keep how its samples fell on the steps."""
        plan, model = self.plan, self.model
        if plan.draw is None:
            log.info("recording %d samples at %d steps from the float model", plan.per_step, plan.steps)
            with memory_advice("recording", smaller_batch(model.batch_size)):
                return model.record(plan.steps, plan.per_step, first=self._first_image, pairs=plan.changes is not None)
        log.info("recording %d samples, one per image, by schedule %s", plan.draw.count, plan.draw.schedule.value)
        fewer = max(1, plan.draw.batch_size // 2)
        with memory_advice("recording", f"begin anew with --batch_samples {fewer} in another --logdir"):
            recording, allocation, timesteps = model.record_draw(plan.draw, self._calibration_seed, self._first_image)
        if allocation is not None:
            from qdiff.report.allocation_plot import allocation_picture  # matplotlib, which sampling does not need

            values = {f.name: getattr(allocation, f.name).tolist() for f in fields(allocation)}
            run.manifest["allocation"] = {"timesteps": timesteps, **values}
            allocation_picture(allocation, run.path / "allocation.png", timesteps)
            run.save_manifest()  # whoever continues a killed calibration does not record again
        return recording

    def _complete(self, prepared: Quantization | None, run: RunFolder) -> None:
        """Calibrate if need be, and measure once how far ε is from float on inputs that calibration never saw."""
        if prepared is None:
            return
        qnn = prepared.complete(self._calibration_seed, lambda: self._record(run))
        if "noise_error" not in run.manifest:
            with memory_advice("measuring the error of ε", smaller_batch(min(self.model.batch_size, ERROR_BATCH))):
                run.manifest["noise_error"] = self._checked_noise_error(qnn)
            log.info("mean squared error of ε against float: %.3e", run.manifest["noise_error"]["mse"])
            run.save_manifest()
        qnn.release_float_weights()  # sampling needs one copy of the weights, not two
        qnn.reset_fired()

    def _checked_noise_error(self, qnn: QuantModel) -> dict[str, Any]:
        """Return `_noise_error`.

        Raises:
            UserError: it is not finite: every image would be black.
        """
        found = self._noise_error(qnn)
        if not math.isfinite(found["mse"]):
            advice = "look for layers whose values leave the range of float32"
            if getattr(self.args, "precision", "full") != "full":
                advice = "half precision overflows; give --precision full"
            raise UserError(
                f"the ε of the quantized network is {found['mse']}, and images of it would be black; {advice}"
            )
        return found

    def _noise_error(self, qnn: QuantModel) -> dict[str, Any]:
        model, steps = self.model, min(HELD_OUT_STEPS, self.model.calls)
        # Modulation is of trajectories: their steps cannot be picked out.
        recorded = model.calls if qnn.config.modulate else steps
        recording = model.record(recorded, HELD_OUT_IMAGES, first=HELD_OUT_FROM, show_progress=False)
        if qnn.config.modulate:
            compared = evenly_spaced(model.calls, steps)
            return measure_trajectory_error(
                qnn, network_calls(recording), compared, release=True, precision=model.precision
            )
        held_out = select_samples(recording, steps, HELD_OUT_IMAGES, model.input_shape, model.conditional)
        batch_size = min(ERROR_BATCH, model.batch_size)
        return measure_noise_error(qnn, held_out, batch_size, release=True, precision=model.precision)

    @torch.no_grad()
    def _write_sequence(self, run: RunFolder, denoiser: Any) -> None:
        def on_step(i: int, t: float, x: Tensor, x0: Tensor) -> None:
            for number, image in enumerate(to_uint8(self.model.to_images(x0))):
                save_png(image, run.path / "sequence" / f"{number}_{i:04d}.png")

        if not (run.path / "sequence").is_dir():
            self.model.trajectory(denoiser, range(SEQUENCE_IMAGES), on_step=on_step)

    def _finish(self, run: RunFolder, qnn: QuantModel | None, processes: Processes, made: int, seconds: float) -> None:
        device = self.model.device
        silent: Sequence[str] = qnn.silent_quantizers() if qnn is not None and made else []
        results = processes.gather({"made": made, "silent": list(silent), "peak": peak_memory_bytes(device)})
        processes.wait()
        if not processes.is_first:
            return
        manifest = run.manifest
        if any(r["made"] for r in results):
            manifest["device"] = str(device)
            manifest["gpu"] = describe_gpu(device, getattr(self.args, "precision", None))
            manifest["processes"] = processes.count
            manifest["torch_threads"] = torch.get_num_threads()
            manifest["peak_memory_bytes"] = [r["peak"] for r in results]
            manifest["seconds"]["sampling"] = round(manifest["seconds"].get("sampling", 0.0) + seconds, 3)
            if qnn is not None:
                manifest["activation_quantizers"] = {
                    "total": len(qnn.act_quantizers()),
                    "silent": sorted({name for r in results for name in r["silent"]}),
                }
        if silent and qnn.config.ablation is Ablation.CLEARED_STATE:
            log.warning("%d activation quantizers never fired: the state was cleared before every step", len(silent))
        elif silent:
            raise RuntimeError(f"{len(silent)} activation quantizers never fired while sampling, e.g. {silent[0]}")
        args = self.args
        run.finish(
            args.save_npz,
            columns=getattr(args, "n_rows", 0) or None,
            write_grid=not getattr(args, "skip_grid", False),
            keep_images=not getattr(args, "skip_save", False),
        )
        log.info("%d images in %s (%.1f s)", run.count, run.images, seconds)
