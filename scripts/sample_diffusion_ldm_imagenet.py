"""Sample a class-conditional latent diffusion model, classes in turn: in float, or quantized with --ptq.

    python scripts/sample_diffusion_ldm_imagenet.py --n_samples 100 --n_batch 50 --ddim_steps 20 --cond --ptq \\
        --weight_bit 4 --quant_act --act_bit 8 --split --cali_st 20 --cali_n 32 --cali_iters 500 \\
        --cali_iters_a 200 -l runs/class-w4a8

samples ImageNet's cin256-v2 if its checkpoint is in place, otherwise the bundled digits model. Repeating a command
continues its run folder.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from families import SCRIPTS

from qdiff.cli.script import sampling_script

main = sampling_script(SCRIPTS["sample_diffusion_ldm_imagenet"], __doc__)

if __name__ == "__main__":
    main()
