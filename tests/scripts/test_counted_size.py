"""The size in run.json: of what calibration made, which is not known before."""

from __future__ import annotations

import pytest
from ddim_runs import DATA, SCRIPT, W4A8
from run_checks import manifest, succeeded

SAMPLER = ("--timesteps", 4, "--max_images", 1, "--seed", 7)
LINEAR = (*W4A8, *DATA, "--quant_mode", "linear")


@pytest.mark.slow
def test_input_scales_are_counted(call, one_level, tmp_path):
    model = (*one_level.options, *SAMPLER)
    for name, options in {
        "unscaled": LINEAR,
        "run": (*LINEAR, "--scaling", "search"),
        "loaded": (*W4A8, "--cali_ckpt", tmp_path / "run" / "quantized.safetensors"),
    }.items():
        succeeded(call(SCRIPT, *model, *options, "-l", tmp_path / name))
    unscaled, run, loaded = (manifest(tmp_path / name)["cost"]["size_bytes"] for name in ("unscaled", "run", "loaded"))
    assert run == loaded > unscaled
