"""The DDIM command lines that several test files share."""

from __future__ import annotations

SCRIPT = "sample_diffusion_ddim"
IMAGES = 5
SAMPLER = ("--timesteps", 4, "--max_images", IMAGES, "--batch_size", 2, "--seed", 7)
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--split")
DATA = ("--cali_st", 2, "--cali_n", 3)
FEW = (*DATA, "--cali_iters", 3, "--cali_iters_a", 2, "--cali_batch_size", 4)
