"""Sample any diffusers pipeline: in float, as quantized in its folder, or quantized with --ptq.

    python scripts/sample_pipeline.py FOLDER --prompt "a photo of a cat" -n 8 --steps 50 --ptq --weight_bit 4 \\
        --quant_act --act_bit 8 --cali_st 20 --cali_n 16 -l runs/w4a8

The pipeline's own loop runs; calibration data is recorded from it. Repeating a command continues its run folder.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from families import SCRIPTS

from qdiff.cli.script import sampling_script

main = sampling_script(SCRIPTS["sample_pipeline"], __doc__)

if __name__ == "__main__":
    main()
