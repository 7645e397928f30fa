"""Sample a DDIM model: in float, or quantized with --ptq (calibrating first, or from a checkpoint).

    python scripts/sample_diffusion_ddim.py --config configs/digits.yml --use_pretrained --timesteps 50 \\
        --max_images 64 --ptq --weight_bit 4 --quant_act --act_bit 8 --split --cali_st 20 --cali_n 32 \\
        --cali_iters 500 --cali_iters_a 200 -l runs/w4a8

--method eda-dm, or any option of EDA-DM, calibrates with that method. Repeating a command continues its run folder.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from families import SCRIPTS

from qdiff.cli.script import sampling_script

main = sampling_script(SCRIPTS["sample_diffusion_ddim"], __doc__)

if __name__ == "__main__":
    main()
