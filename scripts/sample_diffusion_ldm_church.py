"""EDA-DM's script for LSUN-Church: an unconditional latent diffusion model, in float or quantized with --ptq.

    python scripts/sample_diffusion_ldm_church.py -r models/ldm/digits_kl -n 64 --batch_size 32 -c 25 -e 0.0 --ptq \\
        --weight_bit 4 --quant_act --act_bit 8 --a_sym --recon --calib_num_samples 256 --cali_iters 200 -l runs/church

-r (--resume) names the float checkpoint. Options that are not given come from configs/eda-dm/church.yaml. Repeating a
command continues its run folder.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from families import SCRIPTS

from qdiff.cli.script import sampling_script

main = sampling_script(SCRIPTS["sample_diffusion_ldm_church"], __doc__)

if __name__ == "__main__":
    main()
