"""Quantize the bundled digits model to W4A8 in Python, save it, and sample from it."""

import sys
from functools import partial

import torch

import qdiff
from ddim.config import load_config
from ddim.models.diffusion import Model
from ddim.pretrained import load_float_weights, pretrained_path
from ddim.sampling import DdimSampler, SamplerOptions
from qdiff.methods.qdiffusion import QDiffusionConfig


def main(path: str = "quantized.safetensors", iterations: int = 300) -> torch.Tensor:
    config = load_config("configs/digits.yml")
    network = Model(config).eval()
    load_float_weights(network, pretrained_path(config))
    sampler = DdimSampler(config, SamplerOptions(timesteps=20), seed=1234, device=torch.device("cpu"))

    qnn = qdiff.QuantModel(network, qdiff.QuantConfig(weight_bits=4, act_bits=8, split_shortcut=True))
    data = qdiff.record(partial(sampler, calibration=True), network, count=32, steps=20)
    qdiff.calibrate(qnn, data, "qdiff", QDiffusionConfig(iterations=iterations, act_iterations=iterations))
    qdiff.save_checkpoint(qnn, path)

    held_out = qdiff.record(sampler, network, count=8, steps=20)
    error = qdiff.measure_noise_error(qnn, held_out)
    print(f"{path}: ε error {error['mse']:.2e} of {error['float_mean_square']:.2f}")
    return qdiff.sample(sampler, qnn, range(8))


if __name__ == "__main__":
    main(*sys.argv[1:2])
