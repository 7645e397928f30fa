"""Import this before torch to make idle OpenMP threads sleep instead of spin.

By default, a thread that has finished its share of a parallel region spins until the next one. It then occupies a core
that a thread of another process needs, and all threads of that process wait: two calibrations side by side take many
times as long as one. OpenMP libraries read the environment when they are loaded, so this must be imported before torch;
child processes inherit the variables. If any of the variables is set already, nothing is changed.
"""

from __future__ import annotations

import os

# The standard variable, and the additional ones of GNU's libgomp and of LLVM's and Intel's libomp.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}

if not any(name in os.environ for name in PASSIVE):
    os.environ.update(PASSIVE)
