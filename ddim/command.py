"""What scripts/sample_diffusion_ddim.py does with its options."""

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
from qdiff.cli.images import save_png, to_uint8
from qdiff.cli.ptq import resolve_ptq
from qdiff.cli.quantize import quantize
from qdiff.cli.run_folder import RunFolder, start_logging
from qdiff.cli.runtime import Processes, choose_device, peak_memory_bytes
from qdiff.cli.sampling import sample_pending
from qdiff.config import RangeMethod
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

SEQUENCE_IMAGES = 8


class DdimCommand:
    """Resolves options on construction (touching no weights, data or device), samples on `run`.

    Attributes:
        config: the resolved configuration, JSON values.
    """

    def __init__(self, args: Namespace) -> None:
        from omegaconf import OmegaConf

        self.args = args
        self.model_config = load_config(args.config)
        # The papers' DDIM scripts take min-max ranges on both sides.
        self.plan = resolve_ptq(args, RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)
        self.options = SamplerOptions(
            args.sample_type, args.timesteps, args.skip_type, args.eta, args.dpm_order, args.dpm_method
        )
        DdimSampler(self.model_config, self.options, args.seed, torch.device("cpu"))  # checks the numbers
        if args.max_images < 1:
            raise UserError(f"--max_images is {args.max_images}; give at least 1")
        if args.batch_size is not None and args.batch_size < 1:
            raise UserError(f"--batch_size is {args.batch_size}; give at least 1")
        if args.seed < 0:
            raise UserError(f"--seed is {args.seed}; give 0 or more")
        if args.use_pretrained == bool(args.ckpt):
            raise UserError("give the float weights by exactly one of --use_pretrained and --ckpt PATH")
        self.batch_size = args.batch_size or self.model_config.get("sampling", {}).get("batch_size", 64)
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
        device = choose_device(args.device)
        start_logging(args.verbose)
        run = RunFolder(self._folder(), self.config, args.max_images)
        weights = Path(args.ckpt) if args.ckpt else pretrained_path(self.model_config)
        network = Model(self.model_config)
        load_float_weights(network, weights)
        if args.cond:
            log.warning("--cond is ignored: the DDIM networks are unconditional")

        processes = Processes(device)
        device = processes.device
        network.to(device).eval()
        sampler = DdimSampler(self.model_config, self.options, args.seed, device)
        if processes.is_first:
            run.open()
            run.log_to_file(args.verbose)
            run.add_file("float weights", weights)
            log.info("run folder %s, method %s, device %s", run.path, self.config["method"], device)
        qnn = self._quantized(network, run, sampler, processes)
        denoiser = network if qnn is None else qnn
        mode = contextlib.nullcontext() if qnn is None else qnn.quantized()
        started = time.perf_counter()
        with mode:
            if args.sequence and processes.is_first:
                self._write_sequence(run, sampler, denoiser)
            made = sample_pending(run, lambda rows: sampler(denoiser, rows), self.batch_size, processes)
        self._finish(run, qnn, processes, made, time.perf_counter() - started)

    def _quantized(
        self, network: Model, run: RunFolder, sampler: DdimSampler, processes: Processes
    ) -> QuantModel | None:
        if self.plan is None:
            return None

        def record(steps: int, per_step: int) -> dict[str, Tensor]:
            keep = evenly_spaced(sampler.calls, steps)
            with tqdm(total=per_step, desc="recording", unit="img") as bar:
                return record_calls(
                    lambda eps, rows: sampler(eps, rows, calibration=True),
                    network,
                    per_step,
                    self.batch_size,
                    keep,
                    on_batch=bar.update,
                )

        def make() -> QuantModel:
            return quantize(network, self.plan, run, self.args.seed, sampler.shape, record)

        # One process calibrates; the others read what it wrote.
        qnn = make() if processes.is_first else None
        processes.wait()
        qnn = qnn or make()
        qnn.reset_fired()
        return qnn

    def _write_sequence(self, run: RunFolder, sampler: DdimSampler, denoiser: Any) -> None:
        def on_step(i: int, t: float, x: Tensor, x0: Tensor) -> None:
            for number, image in enumerate(to_uint8(x0)):
                save_png(image, run.path / "sequence" / f"{number}_{i:04d}.png")

        with torch.no_grad():
            sampler(denoiser, range(SEQUENCE_IMAGES), on_step=on_step)

    def _finish(
        self, run: RunFolder, qnn: QuantModel | None, processes: Processes, made: int, seconds: float
    ) -> None:
        silent: Sequence[str] = qnn.silent_quantizers() if qnn is not None and made else []
        results = processes.gather({"made": made, "silent": list(silent), "peak": peak_memory_bytes(processes.device)})
        processes.wait()
        if not processes.is_first:
            return
        manifest = run.manifest
        manifest["device"] = str(processes.device)
        manifest["processes"] = processes.count
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
