"""The flow of every sampling command: quantize as planned, then sample what the run folder lacks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qdiff.accounting import account
from qdiff.calibration.collect import OnCall, record_calls
from qdiff.calibration.samples import select_samples
from qdiff.calibration.schedules import evenly_spaced
from qdiff.cli.ptq import resolve_ptq
from qdiff.cli.quantize import Quantization, measure_noise_error
from qdiff.cli.run_folder import RunFolder, start_logging
from qdiff.cli.runtime import Processes, choose_device, peak_memory_bytes
from qdiff.cli.sampling import sample_pending
from qdiff.config import RangeMethod
from qdiff.errors import UserError
from qdiff.images import save_png, to_uint8
from qdiff.interface import SteppedNetwork
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

SEQUENCE_IMAGES = 8
# The ε error against float is measured on this many held-out trajectories at this many steps.
HELD_OUT_IMAGES, HELD_OUT_STEPS = 16, 10

Network = Callable[..., Tensor]
OnStep = Callable[[int, float, Tensor, Tensor], None]


class FloatModel:
    """A float diffusion model and its sampler, as a command's options name them: what a family offers the commands.

    Construction reads configs and checks numbers; weights, data and device are touched by `load`.

    Attributes:
        args: the options.
        name: of the default run folder.
        config: what decides the images besides quantization, JSON values.
        count: how many images the command makes.
        batch_size: images at a time.
        weight_range, act_range: what the family's scripts take by default.
        conditional: the network takes a context.
        labels: the class that each image was asked for, where that is known.
        runs: folder of the default run folders.
        notes: sentences that the user should read; `load` may add some.
        network, weights, device: after `load`.
    """

    name: str
    config: dict[str, Any]
    count: int
    batch_size: int
    weight_range = RangeMethod.MSE
    act_range = RangeMethod.MSE
    conditional = False
    labels: list[int] | None = None
    runs = Path("runs")
    network: SteppedNetwork
    weights: Path
    device: torch.device

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.notes: list[str] = []
        if args.seed < 0:
            raise UserError(f"--seed is {args.seed}; give 0 or more")
        if getattr(args, "batch_size", None) is not None and args.batch_size < 1:
            raise UserError(f"--batch_size is {args.batch_size}; give at least 1")

    @property
    def calls(self) -> int:
        """How often one image's sampling calls the network."""
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""
        raise NotImplementedError

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """[L, D] of the context that the network is fed, after `load`; None where it takes none."""
        return None

    def build_network(self) -> tuple[SteppedNetwork, tuple[int, ...] | None]:
        """Return the network on the meta device, and the [L, D] of its context: shapes without files."""
        raise NotImplementedError

    def load(self, device: torch.device) -> None:
        """Load the float weights onto a device."""
        raise NotImplementedError

    def move_to(self, device: torch.device) -> None:
        """Move what was loaded to another device."""
        raise NotImplementedError

    def trajectory(
        self,
        network: Network,
        indices: Sequence[int],
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run the sampler for the images numbered ``indices`` and return x_0 as the network knows it, [N, C, H, W].

        Args:
            network: ε(x, t[, context]), float or quantized.
            calibration: draw from the calibration streams instead of the run's.
            on_call: told of every network call.
            on_step: told of every sampler step: (i, t, x, predicted x_0).
        """
        raise NotImplementedError

    def to_images(self, x_0: Tensor) -> Tensor:
        """Turn what `trajectory` returns into images [N, C, H, W] in [−1, 1]."""
        return x_0

    @torch.no_grad()
    def record(self, steps: int, per_step: int, first: int = 0, show_progress: bool = True) -> dict[str, Tensor]:
        """Record the network's inputs at evenly spaced calls, from image ``first`` of the calibration streams."""
        with tqdm(total=per_step, desc="recording", unit="img", disable=not show_progress) as bar:
            return record_calls(
                lambda on_call, rows: self.trajectory(
                    self.network, [first + i for i in rows], calibration=True, on_call=on_call
                ),
                per_step,
                self.batch_size,
                evenly_spaced(self.calls, steps),
                on_batch=bar.update,
            )


class SampleCommand:
    """A sampling script.

    Args:
        script: its name.
        model: the family's part; ``model.args`` are the options.

    Attributes:
        config: the resolved configuration, JSON values; there after construction.
    """

    def __init__(self, script: str, model: FloatModel) -> None:
        self.model, self.args = model, model.args
        self.plan = resolve_ptq(self.args, model.weight_range, model.act_range)
        if self.plan is not None and self.plan.data is None and self.plan.action != "load":
            evenly_spaced(model.calls, self.plan.steps)  # checks --cali_st
        self.config = {
            "script": script,
            "method": self.plan.method if self.plan else "float",
            **model.config,
            "seed": self.args.seed,
            "ptq": self.plan.to_dict() if self.plan else None,
        }

    def _folder(self) -> Path:
        if self.args.logdir not in (None, "none"):
            return Path(self.args.logdir)
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return self.model.runs / f"{self.model.name}-{self.config['method']}-{digest}"

    def run(self) -> None:
        """Quantize as planned, then sample what the run folder lacks."""
        args, model = self.args, self.model
        start_logging(args.verbose)
        run = RunFolder(self._folder(), self.config, model.count)
        if run.is_complete and getattr(args, "skip_save", False):
            log.info("%s is finished already", run.path)
            run.discard_images()  # a kill may have come before all were deleted
            return
        model.load(choose_device(args.device))
        if args.cond and not model.conditional:
            model.notes.append("--cond is ignored: this network is unconditional")
        processes = Processes(model.device)
        model.move_to(processes.device)
        # Only the first process calibrates; the others read what it wrote.
        prepared = self._prepare(run) if processes.is_first else None
        with contextlib.ExitStack() as stack:
            if processes.is_first:
                run.open()
                stack.enter_context(run.logged())
                for note in model.notes:
                    log.warning(note)
                run.add_file("float weights", model.weights)
                run.manifest["network_bytes"] = sum(p.numel() * 4 for p in model.network.parameters())
                if model.labels is not None:
                    run.manifest["labels"] = model.labels
                log.info("run folder %s, method %s, device %s", run.path, self.config["method"], model.device)
                counted = model.network if prepared is None else prepared.qnn
                run.manifest["cost"] = account(counted, model.input_shape, model.context_shape).summary()
                self._complete(prepared, run)
            processes.wait()
            if prepared is None and (prepared := self._prepare(run)) is not None:
                prepared.qnn.release_float_weights()
            self._sample(run, None if prepared is None else prepared.qnn, processes)

    def _sample(self, run: RunFolder, qnn: QuantModel | None, processes: Processes) -> None:
        model = self.model
        denoiser = model.network if qnn is None else qnn
        started = time.perf_counter()

        def images(rows: Sequence[int]) -> Tensor:
            return model.to_images(model.trajectory(denoiser, rows))

        with contextlib.nullcontext() if qnn is None else qnn.quantized():
            if getattr(self.args, "sequence", False) and processes.is_first:
                self._write_sequence(run, denoiser)
            made = sample_pending(run, images, model.batch_size, processes)
        self._finish(run, qnn, processes, made, time.perf_counter() - started)

    def _prepare(self, run: RunFolder) -> Quantization | None:
        if self.plan is None:
            return None
        model = self.model
        return Quantization(model.network, self.plan, run, model.input_shape, model.context_shape)

    def _complete(self, prepared: Quantization | None, run: RunFolder) -> None:
        """Calibrate if need be, and measure once how far ε is from float on inputs that calibration never saw."""
        if prepared is None:
            return
        model, qnn = self.model, prepared.complete(self.args.seed, self.model.record)
        if "noise_error" not in run.manifest:
            steps = min(HELD_OUT_STEPS, model.calls)
            held_out = select_samples(
                model.record(steps, HELD_OUT_IMAGES, first=self.plan.per_step, show_progress=False),
                steps,
                HELD_OUT_IMAGES,
                model.input_shape,
                model.conditional,
            )
            run.manifest["noise_error"] = measure_noise_error(qnn, held_out, release=True)
            log.info("mean squared error of ε against float: %.3e", run.manifest["noise_error"]["mse"])
            run.save_manifest()
        qnn.release_float_weights()  # sampling needs one copy of the weights, not two
        qnn.reset_fired()

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
        args = self.args
        run.finish(
            args.save_npz,
            columns=getattr(args, "n_rows", 0) or None,
            write_grid=not getattr(args, "skip_grid", False),
            keep_images=not getattr(args, "skip_save", False),
        )
        log.info("%d images in %s (%.1f s)", run.count, run.images, seconds)
