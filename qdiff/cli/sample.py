"""The flow of every sampling command: quantize as planned, then sample what is missing in the run folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.calibration.collect import record_evenly, recorded_calls
from qdiff.calibration.samples import save_recording
from qdiff.checkpoint import load_packed
from qdiff.cli.first_token import check_has_text
from qdiff.cli.held_out import held_out_error
from qdiff.cli.mixed_precision import with_chosen_widths
from qdiff.cli.network_checks import check_network
from qdiff.cli.noise_correction import run_correction
from qdiff.cli.options.eda_dm import of_width
from qdiff.cli.options.ptq import ignored_options, resolve_ptq
from qdiff.cli.options.spacing import resolve_spacing
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.cli.pending import sample_pending
from qdiff.cli.planned_recording import check_to_be_recorded, record_planned
from qdiff.cli.processes import Processes, choose_device, describe_gpu, peak_memory_bytes
from qdiff.cli.quantize import Quantization, add_checkpoint
from qdiff.cli.run_folder import RunFolder, start_logging
from qdiff.cli.runtime import check_runtime, onnx_network, pack, starts_packed, wrapped
from qdiff.cli.temporal_cache import cached_timesteps, temporal_cache, with_temporal_cache
from qdiff.config import Ablation
from qdiff.cost.account import account
from qdiff.deploy.runtimes import onnx_runtimes
from qdiff.deploy.torch_runtimes import SIMULATED
from qdiff.errors import UserError, require_at_least
from qdiff.interface import SteppedNetwork
from qdiff.io.files import check_writable
from qdiff.io.images import save_png, to_uint8
from qdiff.io.repository import REPOSITORY
from qdiff.io.yaml_files import read_config
from qdiff.kernels.switch import check_available, fused
from qdiff.modes import halve_weights
from qdiff.pipeline import Pipeline, trajectory_of
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

SEQUENCE_IMAGES = 8


class SampleCommand:
    """A sampling script.

    Args:
        script: name of the script.
        pipeline: pipeline of the script's model.
        args: the parsed options.
        preset: EDA-DM's values for the family, a YAML file of configs/eda-dm; the model's own values override them.

    Attributes:
        config: the resolved configuration, JSON values.
    """

    def __init__(self, script: str, pipeline: Pipeline, args: Namespace, preset: str | None = None) -> None:
        self.pipeline, self.args, self._told = pipeline, args, False
        values = {} if preset is None else dict(read_config(REPOSITORY / preset, "restore it from the repository"))
        pipeline.notes += ignored_options(self.args)
        preset_values = {**of_width(values, args.weight_bit), **of_width(pipeline.eda_dm, args.weight_bit)}
        plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range, preset_values, samples=True)
        self.plan = with_temporal_cache(args, plan, pipeline)
        check_has_text(plan, pipeline)
        self._calibration_seed = args.seed if self.plan is None or self.plan.seed is None else self.plan.seed
        if self.plan is not None:
            pipeline.check_modulation(self.plan.quant)
            check_to_be_recorded(self.plan, pipeline)
        self.config = {
            "script": script,
            "method": self.plan.name if self.plan else "float",
            **pipeline.config,
            "seed": self.args.seed,
            "ptq": self.plan.to_dict() if self.plan else None,
        }
        if self.args.generate is not None:
            self.config["generate"] = self._recording_asked_for()
        check_runtime(self.args, None if self.plan is None else self.plan.quant)
        if self.args.runtime != SIMULATED.name:
            self.config["runtime"] = self.args.runtime
        if self.args.tf32:
            self.config["tf32"] = True
        self.correction = run_correction(self.args, self.plan, pipeline)
        if self.correction is not None:
            self.config["noise_correction"] = self.correction.wanted.to_dict()

    @contextlib.contextmanager
    def notes_told(self) -> Iterator[None]:
        """Print the pipeline's notes to stderr at the end of the block, also after an error, unless they were logged.

        A note may explain the error, e.g. that a bundled model is used instead of the intended one.
        """
        try:
            yield
        finally:
            if not self._told:
                for note in self.pipeline.notes:
                    print(note, file=sys.stderr)

    def _folder(self) -> Path:
        if self.args.logdir not in (None, "none"):
            return Path(self.args.logdir)
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return self.pipeline.runs / f"{self.pipeline.name}-{self.config['method']}-{digest}"

    def _recording_asked_for(self) -> dict[str, Any]:
        """Check what ``--generate`` is to record, and return it."""
        args, pairs = self.args, self.args.generate == "residual"
        if args.cali_data_path is None:
            raise UserError(f"--generate {args.generate} writes a calibration set; give --cali_data_path PATH")
        require_at_least(1, {"--cali_n": args.cali_n})
        calls = recorded_calls(self.pipeline, args.cali_st, pairs, resolve_spacing(args))
        return {"out": args.cali_data_path, "pairs": pairs, "calls": calls, "per_step": args.cali_n}

    def _generate(self) -> None:
        args, wanted, pipeline = self.args, self.config["generate"], self.pipeline
        chosen = args.cali_st, args.cali_n
        check_writable(wanted["out"])
        processes = Processes(choose_device(args.device, args.tf32))
        if not processes.is_first:
            return
        with memory_advice("recording", smaller_batch(min(pipeline.batch_size, chosen[1]), to_continue=False)):
            pipeline.load(processes.device)
            recording = record_evenly(pipeline, *chosen, pairs=wanted["pairs"], spacing=resolve_spacing(args))
        save_recording(recording, wanted["out"])
        log.info("%s: %d steps of %d samples", wanted["out"], *chosen)

    def run(self) -> None:
        """Quantize as planned, then sample what is missing in the run folder; with ``--generate``, record."""
        args, pipeline = self.args, self.pipeline
        start_logging(args.verbose)
        if args.generate is not None:
            self._generate()
            return
        run = RunFolder(self._folder(), self.config, pipeline.count)
        if run.images_discarded and args.skip_save:
            log.info("%s is finished already", run.path)
            run.discard_images()  # the run may have been killed before all were deleted
            return
        packs = starts_packed(args, self.plan) and not (self.correction is not None and self.correction.is_missing(run))
        device = choose_device(args.device, args.tf32)
        if args.fused_kernels:
            check_available(device)
        if args.tf32 and device.type != "cuda":
            pipeline.notes.append("--tf32 has no effect on the CPU")
        with memory_advice("loading the model", "free some, or give --device cpu"):
            pipeline.load(device, network=not packs)
        packed = load_packed(pipeline.network, self.plan.checkpoint, self.plan.quant) if packs else None
        if args.cond and not pipeline.conditional:
            pipeline.notes.append("--cond is ignored: this network is unconditional")
        processes = Processes(pipeline.device)
        pipeline.move_to(processes.device)
        # Only the first process calibrates; the others read what it wrote.
        prepared = self._prepare(run) if processes.is_first and packed is None else None
        self._told = not processes.is_first  # only the first process prints notes
        with contextlib.ExitStack() as stack:
            if args.fused_kernels:
                stack.enter_context(fused())
            if processes.is_first:
                run.open()
                stack.enter_context(run.logged(shared=processes.count > 1))
                for note in pipeline.notes:
                    log.warning(note)
                self._told = True
                if pipeline.weights is not None:
                    run.add_file("float weights", pipeline.weights)
                if packed is not None:
                    add_checkpoint(run, "quantized checkpoint", self.plan.checkpoint)
                run.manifest.fused_kernels = args.fused_kernels
                run.manifest.network_calls = pipeline.calls  # of one image
                run.manifest.network_bytes = sum(p.numel() * 4 for p in pipeline.network.parameters())
                if pipeline.labels is not None:
                    run.manifest.labels = pipeline.labels
                log.info("run folder %s, method %s, device %s", run.path, self.config["method"], pipeline.device)
                self._complete(prepared, run)
                # Only now it is known how many ranges and input scales there are.
                self._count_cost(run, packed or (pipeline.network if prepared is None else prepared.qnn))
            processes.wait()
            if packed is None and prepared is None and (prepared := self._prepare(run)) is not None:
                prepared.qnn.release_float_weights()
            self._sample(run, packed if prepared is None else prepared.qnn, processes)

    def _sample(self, run: RunFolder, qnn: QuantModel | None, processes: Processes) -> None:
        pipeline, sample = self.pipeline, self.pipeline.sample
        if self.correction is not None:
            sample = functools.partial(sample, correction=self.correction.load(run, qnn, processes.is_first))
        denoiser = pipeline.network if qnn is None else qnn
        if qnn is not None:
            pack(self.args, qnn)
        if self.args.runtime in onnx_runtimes():
            denoiser = onnx_network(self.args, pipeline, wrapped(denoiser) if qnn is None else qnn, run.path, processes)
            # The simulated network does not run, so its quantizers need not be checked.
            qnn = None
        else:
            with pipeline.precision():
                if torch.is_autocast_enabled(pipeline.device.type):
                    halve_weights(denoiser, torch.get_autocast_dtype(pipeline.device.type))
        started = time.perf_counter()

        def images(rows: Sequence[int]) -> Tensor:
            with trajectory_of(denoiser):
                x_0 = sample(denoiser, rows)
                found = pipeline.to_images(x_0)
            # A first stage with a codebook returns finite images even for latents that are not finite.
            finite = x_0.isfinite().flatten(1).all(dim=1)
            return found.where(finite.view(-1, 1, 1, 1), math.nan)

        advice = smaller_batch(min(pipeline.batch_size, run.count), kept=": finished images are kept")
        quantized = contextlib.nullcontext() if qnn is None else qnn.quantized()
        with memory_advice("sampling", advice), quantized, temporal_cache(self.args, pipeline, denoiser):
            if self.args.sequence and processes.is_first:
                with trajectory_of(denoiser):
                    self._write_sequence(run, functools.partial(sample, denoiser))
            made = sample_pending(run, images, pipeline.batch_size, processes)
        self._finish(run, qnn, processes, made, time.perf_counter() - started)

    def _count_cost(self, run: RunFolder, network: SteppedNetwork | QuantModel) -> None:
        pipeline, kept = self.pipeline, len(cached_timesteps(self.args, self.pipeline))
        cost = account(network, pipeline.input_shape, pipeline.context_shape, kept)
        run.manifest.cost = cost.summary(pipeline.calls) | ({"cached_timesteps": kept} if kept else {})
        run.save_manifest()

    def _prepare(self, run: RunFolder) -> Quantization | None:
        if self.plan is None:
            return None
        pipeline = self.pipeline
        check_network(self.plan, pipeline)
        plan = with_chosen_widths(self.plan, pipeline, run, self._calibration_seed, self.args.sensitivities)
        shapes = pipeline.input_shape, pipeline.context_shape, pipeline.training_steps
        return Quantization(pipeline.network, plan, run, *shapes, pipeline.sampler.visited, pipeline.probe)

    def _complete(self, prepared: Quantization | None, run: RunFolder) -> None:
        """Calibrate if needed, and measure once the error of ε against float on inputs outside the calibration set."""
        if prepared is None:
            return
        seed = self._calibration_seed
        qnn = prepared.complete(seed, functools.partial(record_planned, self.pipeline, self.plan, run, seed))
        if self.correction is not None:
            self.correction.collect(run, qnn)
        if run.manifest.noise_error is None:
            halves = self.pipeline.precision_name not in (None, "full")
            run.manifest.noise_error = held_out_error(self.pipeline, qnn, halves)
            log.info("mean squared error of ε against float: %.3e", run.manifest.noise_error["mse"])
            run.save_manifest()
        qnn.release_float_weights()  # sampling needs one copy of the weights, not two
        qnn.reset_fired()

    @torch.no_grad()
    def _write_sequence(self, run: RunFolder, sample: Callable[..., Tensor]) -> None:
        def on_step(i: int, t: float, x: Tensor, x0: Tensor) -> None:
            for number, image in enumerate(to_uint8(self.pipeline.to_images(x0))):
                save_png(image, run.path / "sequence" / f"{number}_{i:04d}.png")

        if not (run.path / "sequence").is_dir():
            sample(range(SEQUENCE_IMAGES), on_step=on_step)

    def _finish(self, run: RunFolder, qnn: QuantModel | None, processes: Processes, made: int, seconds: float) -> None:
        device = self.pipeline.device
        silent: Sequence[str] = qnn.silent_quantizers() if qnn is not None and made else []
        results = processes.gather({"made": made, "silent": list(silent), "peak": peak_memory_bytes(device)})
        processes.wait()
        if not processes.is_first:
            return
        manifest = run.manifest
        if any(r["made"] for r in results):
            manifest.device = str(device)
            manifest.gpu = describe_gpu(device, self.pipeline.precision_name)
            manifest.processes = processes.count
            manifest.torch_threads = torch.get_num_threads()
            manifest.peak_memory_bytes = [r["peak"] for r in results]
            manifest.add_seconds("sampling", seconds)
            if qnn is not None:
                manifest.activation_quantizers = {
                    "total": len(qnn.act_quantizers()),
                    "silent": sorted({name for r in results for name in r["silent"]}),
                }
        if silent and qnn.config.ablation is Ablation.CLEARED_STATE:
            log.warning("%d activation quantizers never fired: the state was cleared before every step", len(silent))
        elif silent:
            raise RuntimeError(f"{len(silent)} activation quantizers never fired while sampling, e.g. {silent[0]}")
        keep = {"write_grid": not self.args.skip_grid, "keep_images": not self.args.skip_save}
        run.finish(self.args.save_npz, columns=self.args.n_rows or None, **keep)
        log.info("%d images in %s (%.1f s)", run.count, run.images, seconds)
