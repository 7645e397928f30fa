"""The flow of scripts/quantize_pipeline.py: calibrate as the sampling scripts do, then write a pipeline folder."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from pathlib import Path

from qdiff.calibration.input_scales import Scaling
from qdiff.cli.out_of_memory import memory_advice
from qdiff.cli.processes import choose_device
from qdiff.cli.run_folder import RunFolder, start_logging
from qdiff.cli.sample import SampleCommand
from qdiff.deploy.torch_runtimes import SIMULATED
from qdiff.diffusers_backend.card import calibration_note
from qdiff.diffusers_backend.pipeline import DiffusersPipeline
from qdiff.diffusers_backend.refusals import NO_SCALES, refuse_scales
from qdiff.errors import UserError
from qdiff.io.files import check_new_folder, folder_written_whole
from qdiff.methods.registry import find_method

log = logging.getLogger("qdiff")

# Options of sampling, and their defaults.
_OF_SAMPLING = {"runtime": SIMULATED.name, "weight_cache": 0.0, "onnx": None, "save-npz": False, "fused_kernels": False}


class QuantizePipelineCommand(SampleCommand):
    """Quantizes a pipeline's network and saves the whole pipeline.

    Args:
        pipeline: the pipeline to quantize.
        args: the parsed options; ``--ptq`` is implied.

    Raises:
        UserError: options contradict each other or have no effect, or the folder to write exists and is not empty, or
            could not be written.
    """

    def __init__(self, script: str, pipeline: DiffusersPipeline, args: Namespace) -> None:
        args.ptq = True
        self.out = Path(args.out)
        check_new_folder(self.out)
        _check_shard_size(args.max_shard_size)
        for name, usual in _OF_SAMPLING.items():
            if getattr(args, name.replace("-", "_")) != usual:
                raise UserError(
                    f"--{name} has no meaning here, where no images are sampled; give it to scripts/sample_pipeline.py "
                    "with the folder that this command writes"
                )
        super().__init__(script, pipeline, args)
        if self._folder().resolve().is_relative_to(self.out.resolve()):
            raise UserError(f"run folder {self._folder()} lies in --out {self.out}; choose another --logdir")
        if self.plan.quant.modulate:
            raise UserError("a pipeline's loop opens no trajectory for modulation; leave out --modulate")
        if self.plan.scaling.kind is not Scaling.NONE:
            raise UserError(f"{NO_SCALES}; give --scaling none")

    def run(self) -> None:
        """Calibrate in the run folder, or read what is finished there, and write the pipeline to ``--out``."""
        from qdiff.diffusers_backend.quantize import attach

        args, pipeline = self.args, self.pipeline
        start_logging(args.verbose)
        run = RunFolder(self._folder(), self.config, pipeline.count)
        with memory_advice("loading the model", "free some, or give --device cpu"):
            pipeline.load(choose_device(args.device, args.tf32))
        prepared = self._prepare(run)
        refuse_scales(prepared.qnn)  # of a given checkpoint
        run.open()
        with run.logged():
            for note in pipeline.notes:
                log.warning(note)
            self._told = True
            log.info("run folder %s, method %s, device %s", run.path, self.config["method"], pipeline.device)
            self._complete(prepared, run)
            data = f"{self.plan.per_step} images at {self.plan.steps} of the pipeline's steps"
            notes = {
                "method": find_method(self.plan.method).title,
                "calibration": calibration_note(data, self.plan.refit),
                "seed": args.seed,
                "noise_error": f"{run.manifest.noise_error['mse']:.3g}",
                "base_model": str(pipeline.folder.path),
            }
            attach(pipeline.network.network, prepared.qnn, notes)
            with folder_written_whole(self.out) as folder:
                pipeline.pipe.save_pretrained(folder, max_shard_size=args.max_shard_size)
            log.info("pipeline folder: %s", self.out)


def _check_shard_size(text: str) -> None:
    """Raise a `UserError` for a ``--max_shard_size`` that diffusers would refuse at the end."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", text.strip(), re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise UserError(f"--max_shard_size is {text}; give a size above 0 in KB, MB, GB or TB, such as 500MB")
