"""EDA-DM's script for Stable Diffusion: a text-conditional latent diffusion model, in float or quantized with --ptq.

    python scripts/sample_txt2img.py --prompt "a handwritten three" --plms --n_samples 8 --n_batch 4 --cond --ptq \\
        --split --weight_bit 4 --quant_act --act_bit 8 --recon --calib_num_samples 64 --cali_iters 200 -l runs/captions

samples --n_samples images, --n_batch per batch, of the prompt or of the first captions of --from-file. Options that are
not given come from configs/eda-dm/stable-diffusion.yaml. Repeating a command continues its run folder.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from families import SCRIPTS

from qdiff.cli.script import sampling_script

main = sampling_script(SCRIPTS["sample_txt2img"], __doc__)

if __name__ == "__main__":
    main()
