"""Quantize the bundled digits model to W4A8 in Python, save it, and sample from it."""

import sys
from functools import partial

import torch

import qdiff
from ddim.pipeline import DdimPipeline
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.sampling import SamplerOptions


def main(path: str = "quantized.safetensors", iterations: int = 300) -> torch.Tensor:
    pipeline = DdimPipeline("configs/digits.yml", options=SamplerOptions("ddim", steps=20))
    pipeline.load(torch.device("cpu"))

    qnn = qdiff.QuantModel(pipeline.network, qdiff.QuantConfig(weight_bits=4, act_bits=8, split_shortcut=True))
    data = qdiff.record(partial(pipeline.sample, calibration=True), qnn, count=32, steps=20)
    qdiff.calibrate(qnn, data, "qdiff", QDiffusionConfig(iterations=iterations, act_iterations=iterations))
    qdiff.save_checkpoint(qnn, path)

    held_out = qdiff.record(pipeline.sample, qnn, count=8, steps=20)
    error = qdiff.measure_noise_error(qnn, held_out)
    print(f"{path}: ε error {error['mse']:.2e} of {error['float_mean_square']:.2f}")
    return qdiff.sample(pipeline.sample, qnn, range(8))


if __name__ == "__main__":
    main(*sys.argv[1:2])
