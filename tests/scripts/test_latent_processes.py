"""Two processes under torchrun make the images of a latent model that one makes, and warn once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from latent_models import FEW, W4A8
from run_checks import image_bytes, manifest, succeeded

SCRIPT = Path(__file__).parents[2] / "scripts" / "txt2img.py"
PROMPTS = ["zero", "the digit seven", "a handwritten three " + "three " * 12]  # the last one is cut
# A batch of one in both: whatever the processes share out, the sums are the same.
SAMPLER = ("--ddim_steps", 4, "--seed", 7, "--ddim_eta", 1.0, "--batch_size", 1, "--max_images", 5)


pytestmark = pytest.mark.thorough  # test_processes: of the DDIM family


@pytest.fixture(scope="module")
def options(latent, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return *latent("text").options, *SAMPLER, "--from-file", path, *W4A8, *FEW, "--quant_mode", "linear"


@pytest.fixture(scope="module")
def together(options, tmp_path_factory):
    """The run folder and stderr of two processes that calibrate and sample."""
    folder = tmp_path_factory.mktemp("processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    words = [str(o) for o in (*options, "--outdir", folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launcher + words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


def test_two_processes_make_the_images_of_one(together, call, options, tmp_path):
    succeeded(call("txt2img", *options, "--outdir", tmp_path / "one"))
    assert image_bytes(together[0]) == image_bytes(tmp_path / "one")
    assert len(set(image_bytes(tmp_path / "one").values())) == 5
    run, alone = manifest(together[0]), manifest(tmp_path / "one")
    assert run["labels"] == alone["labels"] == [0, 7, 3, 0, 7]
    assert run["processes"] == 2 and run["activation_quantizers"]["silent"] == []


def test_the_first_process_speaks_for_both(together):
    folder, errors = together
    assert errors.count("was cut off") == 1 and errors.count("calibrating with linear") == 1
    assert (folder / "run.log").read_text().count("was cut off") == 1
