"""Calibrations that learn, on the virtual GPU: where a C++ compiler is there, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from virtual_cuda.preload import build_preload, compiler

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CASES = HERE / "backward_on_cuda.py"


@pytest.mark.skipif(compiler() is None, reason="backward passes on the virtual GPU need a C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux")
def test_learning_on_the_virtual_gpu(request, tmp_path):
    """What is chosen of backward_on_cuda.py, with the autograd engine told that there is no accelerator."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", str(CASES)]
    command += ["-m", request.config.getoption("markexpr")]  # leaves out the same there
    environment = build_preload(tmp_path)
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
