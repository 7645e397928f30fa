"""Integer kernels that saturate, as on CPUs without VNNI, are noticed before anything is computed with them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from qdiff.deploy import runtimes
from qdiff.deploy.exactness import check_exact
from qdiff.deploy.runtimes import RUNTIMES
from qdiff.errors import UserError

for package in ("onnx", "onnxruntime", "openvino"):
    pytest.importorskip(package)

AS_WITHOUT_VNNI = """
from qdiff.deploy.exactness import check_exact
from qdiff.deploy.runtimes import RUNTIMES
check_exact("openvino", RUNTIMES["openvino"])
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_saturating_products_are_refused(runtime):
    check_exact(runtime, RUNTIMES[runtime])  # or every other test of this runtime would fail

    def saturating(model, threads):
        run = RUNTIMES[runtime](model, threads)
        return lambda feed: [np.minimum(out, 64 // 2 * (2**15 - 1)) for out in run(feed)]

    with pytest.raises(UserError, match=f"^the integer products of {runtime} saturate on this CPU, "):
        check_exact(runtime, saturating)


def test_onnx_runtime_takes_slower_kernels_where_the_fast_ones_saturate(monkeypatch):
    taken = []

    def session(model, threads, fast):
        taken.append(fast)
        return lambda feed: []

    monkeypatch.setattr(runtimes, "_session", session)
    for exact in (True, False):
        monkeypatch.setattr(runtimes, "is_exact", lambda runtime, opened, exact=exact: exact)
        RUNTIMES["onnxruntime"](None, 1)
    assert taken == [True, False]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what oneDNN limits is x86's")
def test_openvino_without_vnni():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", AS_WITHOUT_VNNI], env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "UserError: the integer products of openvino saturate" in run.stderr
