"""Sample a text-conditional latent diffusion model: in float, or quantized with --ptq.

    python scripts/txt2img.py --prompt "a handwritten three" --plms --n_samples 5 --cond --ptq --weight_bit 4 \\
        --quant_mode qdiff --no_grad_ckpt --split --quant_act --act_bit 8 --sm_abit 16 --cali_st 25 --cali_n 16 \\
        --cali_iters 500 --cali_iters_a 200 --outdir runs/txt2img-w4a8

samples Stable Diffusion v1 if its checkpoint is in place, otherwise the bundled digits model. Repeating a command
continues its run folder.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from families import SCRIPTS

from qdiff.cli.script import sampling_script

main = sampling_script(SCRIPTS["txt2img"], __doc__)

if __name__ == "__main__":
    main()
