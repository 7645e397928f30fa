"""What the DDIM command lines do with their options."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.config import load_config
from ddim.models.diffusion import Model
from ddim.pretrained import load_float_weights, pretrained_path
from ddim.sampling import DdimSampler, SamplerOptions
from qdiff.calibration.collect import record_calls
from qdiff.calibration.schedules import evenly_spaced
from qdiff.cli.ptq import resolve_ptq
from qdiff.cli.quantize import Quantization, measure_noise_error
from qdiff.cli.run_folder import RunFolder, start_logging
from qdiff.cli.runtime import Processes, choose_device, peak_memory_bytes
from qdiff.cli.sampling import sample_pending
from qdiff.config import RangeMethod
from qdiff.errors import UserError
from qdiff.images import save_png, to_uint8
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

SEQUENCE_IMAGES = 8
# The ε error against float is measured on this many held-out trajectories at this many steps.
HELD_OUT_IMAGES, HELD_OUT_STEPS = 16, 10


class DdimModel:
    """A float DDIM model and its sampler, as the options name them.

    Construction reads the YAML file and checks numbers; weights, data and device are touched by `load`.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.model_config = load_config(args.config)
        if args.seed < 0:
            raise UserError(f"--seed is {args.seed}; give 0 or more")
        if args.batch_size is not None and args.batch_size < 1:
            raise UserError(f"--batch_size is {args.batch_size}; give at least 1")
        if args.use_pretrained == bool(args.ckpt):
            raise UserError("give the float weights by exactly one of --use_pretrained and --ckpt PATH")
        self.options = SamplerOptions(
            args.sample_type, args.timesteps, args.skip_type, args.eta, args.dpm_order, args.dpm_method
        )
        self.sampler = DdimSampler(self.model_config, self.options, args.seed, torch.device("cpu"))
        self.batch_size = args.batch_size or self.model_config.get("sampling", {}).get("batch_size", 64)

    def load(self, device: str | None) -> None:
        """Load the float weights onto a device (None chooses one)."""
        chosen = choose_device(device)
        self.weights = Path(self.args.ckpt) if self.args.ckpt else pretrained_path(self.model_config)
        self.network = Model(self.model_config)
        load_float_weights(self.network, self.weights)
        self.move_to(chosen)

    def move_to(self, device: torch.device) -> None:
        self.device = device
        self.network.to(device).eval()
        self.sampler = DdimSampler(self.model_config, self.options, self.args.seed, device)

    @torch.no_grad()
    def record(self, steps: int, per_step: int, first: int = 0, show_progress: bool = True) -> dict[str, Tensor]:
        """Record the network's inputs at evenly spaced calls, from image ``first`` of the calibration streams."""
        with tqdm(total=per_step, desc="recording", unit="img", disable=not show_progress) as bar:
            return record_calls(
                lambda eps, rows: self.sampler(eps, [first + i for i in rows], calibration=True),
                self.network,
                per_step,
                self.batch_size,
                evenly_spaced(self.sampler.calls, steps),
                on_batch=bar.update,
            )


class SampleCommand(DdimModel):
    """scripts/sample_diffusion_ddim.py.

    Attributes:
        config: the resolved configuration, JSON values; there after construction.
    """

    def __init__(self, args: Namespace) -> None:
        from omegaconf import OmegaConf

        super().__init__(args)
        # The papers' DDIM scripts take min-max ranges on both sides.
        self.plan = resolve_ptq(args, RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)
        if args.max_images < 1:
            raise UserError(f"--max_images is {args.max_images}; give at least 1")
        if self.plan is not None and self.plan.data is None and self.plan.action != "load":
            evenly_spaced(self.sampler.calls, self.plan.steps)  # checks --cali_st
        self.config = {
            "script": "sample_diffusion_ddim",
            "method": self.plan.method if self.plan else "float",
            "model": OmegaConf.to_container(self.model_config, resolve=True),
            "weights": args.ckpt or "pretrained",
            "seed": args.seed,
            "sampler": vars(self.options),
            "max_images": args.max_images,
            "sequence": args.sequence,
            "ptq": self.plan.to_dict() if self.plan else None,
        }

    def _folder(self) -> Path:
        if self.args.logdir not in (None, "none"):
            return Path(self.args.logdir)
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs") / f"{Path(self.args.config).stem}-{self.config['method']}-{digest}"

    def run(self) -> None:
        """Quantize as planned, then sample what the run folder lacks."""
        args = self.args
        start_logging(args.verbose)
        run = RunFolder(self._folder(), self.config, args.max_images)
        self.load(args.device)
        if args.cond:
            log.warning("--cond is ignored: the DDIM networks are unconditional")
        processes = Processes(self.device)
        self.move_to(processes.device)
        # Only the first process calibrates; the others read what it wrote.
        prepared = self._prepare(run) if processes.is_first else None
        with contextlib.ExitStack() as stack:
            if processes.is_first:
                run.open()
                stack.enter_context(run.logged())
                run.add_file("float weights", self.weights)
                log.info("run folder %s, method %s, device %s", run.path, self.config["method"], self.device)
                self._complete(prepared, run)
            processes.wait()
            prepared = prepared or self._prepare(run)
            self._sample(run, None if prepared is None else prepared.qnn, processes)

    def _sample(self, run: RunFolder, qnn: QuantModel | None, processes: Processes) -> None:
        denoiser = self.network if qnn is None else qnn
        started = time.perf_counter()
        with contextlib.nullcontext() if qnn is None else qnn.quantized():
            if self.args.sequence and processes.is_first:
                self._write_sequence(run, denoiser)
            made = sample_pending(run, lambda rows: self.sampler(denoiser, rows), self.batch_size, processes)
        self._finish(run, qnn, processes, made, time.perf_counter() - started)

    def _prepare(self, run: RunFolder) -> Quantization | None:
        return None if self.plan is None else Quantization(self.network, self.plan, run, self.sampler.shape)

    def _complete(self, prepared: Quantization | None, run: RunFolder) -> None:
        """Calibrate if need be, and measure once how far ε is from float on inputs that calibration never saw."""
        if prepared is None:
            return
        qnn = prepared.complete(self.args.seed, self.record)
        if "noise_error" not in run.manifest:
            steps = min(HELD_OUT_STEPS, self.sampler.calls)
            held_out = self.record(steps, HELD_OUT_IMAGES, first=self.plan.per_step, show_progress=False)
            run.manifest["noise_error"] = measure_noise_error(qnn, held_out)
            log.info("mean squared error of ε against float: %.3e", run.manifest["noise_error"]["mse"])
            run.save_manifest()
        qnn.reset_fired()

    @torch.no_grad()
    def _write_sequence(self, run: RunFolder, denoiser: Any) -> None:
        def on_step(i: int, t: float, x: Tensor, x0: Tensor) -> None:
            for number, image in enumerate(to_uint8(x0)):
                save_png(image, run.path / "sequence" / f"{number}_{i:04d}.png")

        if not (run.path / "sequence").is_dir():
            self.sampler(denoiser, range(SEQUENCE_IMAGES), on_step=on_step)

    def _finish(self, run: RunFolder, qnn: QuantModel | None, processes: Processes, made: int, seconds: float) -> None:
        silent: Sequence[str] = qnn.silent_quantizers() if qnn is not None and made else []
        results = processes.gather({"made": made, "silent": list(silent), "peak": peak_memory_bytes(self.device)})
        processes.wait()
        if not processes.is_first:
            return
        manifest = run.manifest
        if any(r["made"] for r in results):
            manifest["device"] = str(self.device)
            manifest["processes"] = processes.count
            manifest["torch_threads"] = torch.get_num_threads()
            manifest["peak_memory_bytes"] = [r["peak"] for r in results]
            manifest["seconds"]["sampling"] = round(manifest["seconds"].get("sampling", 0.0) + seconds, 3)
            if qnn is not None:
                manifest["activation_quantizers"] = {
                    "total": len(qnn.act_quantizers()),
                    "silent": sorted({name for r in results for name in r["silent"]}),
                }
        if silent:
            raise RuntimeError(f"{len(silent)} activation quantizers never fired while sampling, e.g. {silent[0]}")
        run.finish(self.args.save_npz)
        log.info("%d images in %s (%.1f s)", run.count, run.images, seconds)
