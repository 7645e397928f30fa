"""Several processes under torchrun make the images of one, and only the first of them calibrates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "sample_diffusion_ddim.py"
IMAGES = 5
OPTIONS = ("--timesteps", 4, "--max_images", IMAGES, "--batch_size", 2, "--seed", 3)
PTQ = (
    *("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--split", "--cali_st", 2, "--cali_n", 3),
    *("--cali_iters", 3, "--cali_iters_a", 2, "--cali_batch_size", 4),
)

# The processes batch the images differently, so float sums may round differently: that moves a value over the edge
# between two grey levels, not further.
GREY_LEVELS = 1


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / "img" / f"{i:05d}.png")) for i in range(IMAGES)]).astype(int)


def largest_difference(a: Path, b: Path) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


@pytest.fixture(scope="module")
def together(one_level, tmp_path_factory):
    """The run folder and stderr of two processes that calibrate and sample."""
    folder = tmp_path_factory.mktemp("processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    words = [str(o) for o in (*one_level.options, *OPTIONS, *PTQ, "-l", folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launcher + words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


def test_two_processes_make_the_images_of_one(together, call, one_level, tmp_path):
    assert call("sample_diffusion_ddim", *one_level.options, *OPTIONS, *PTQ, "-l", tmp_path / "one").code == 0
    assert largest_difference(together[0], tmp_path / "one") <= GREY_LEVELS
    # Planted: 8-bit weights instead of 4.
    changed = (*PTQ, "--weight_bit", 8)
    assert call("sample_diffusion_ddim", *one_level.options, *OPTIONS, *changed, "-l", tmp_path / "changed").code == 0
    assert largest_difference(together[0], tmp_path / "changed") > GREY_LEVELS


def test_both_processes_took_part(together):
    run = json.loads((together[0] / "run.json").read_text())
    assert run["processes"] == 2
    assert len(run["peak_memory_bytes"]) == 2
    assert run["status"] == "finished"
    assert run["activation_quantizers"]["silent"] == []


def test_only_the_first_process_calibrates(together):
    folder, errors = together
    assert errors.count("calibrating with qdiff") == 1  # every process logs to stderr
    assert errors.count("recording 3 samples") == 1
    assert (folder / "run.log").read_text().count("calibrating with qdiff") == 1
    assert sorted(p.name for p in folder.iterdir()) == [
        *("calibration_data.pt", "grid.png", "img", "quantized.safetensors", "run.json", "run.log")
    ]
    assert sorted(p.name for p in (folder / "img").iterdir()) == [f"{i:05d}.png" for i in range(IMAGES)]
