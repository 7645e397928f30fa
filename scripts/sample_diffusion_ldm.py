"""Sample an unconditional latent diffusion model: in float, or quantized with --ptq.

    python scripts/sample_diffusion_ldm.py -r models/ldm/digits_vq -n 64 --batch_size 32 -c 20 -e 0.0 --seed 41 \\
        --ptq --weight_bit 4 --quant_act --act_bit 8 --a_sym --cali_st 20 --cali_n 32 --cali_iters 500 \\
        --cali_iters_a 200 -l runs/ldm-w4a8

Repeating a command continues its run folder.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from families import SCRIPTS

from qdiff.cli.script import sampling_script

main = sampling_script(SCRIPTS["sample_diffusion_ldm"], __doc__)

if __name__ == "__main__":
    main()
