"""Where the script tests run: ``QDIFF_TEST_DEVICE``, by default the CPU.

``cuda`` (or ``cuda:1``) is a GPU; ``virtual`` is the virtual one (`virtual_cuda`), on which what calibrates needs the
preload of `virtual_cuda.preload`.
"""

from __future__ import annotations

import os

_ASKED = os.environ.get("QDIFF_TEST_DEVICE", "cpu")
IS_VIRTUAL = _ASKED == "virtual"
DEVICE = "cuda" if IS_VIRTUAL else _ASKED
ON_DEVICE = ("--device", DEVICE)
"""The option of every script."""
