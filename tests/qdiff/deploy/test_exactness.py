"""Integer kernels that saturate, as on CPUs without VNNI, are noticed before anything is computed with them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from exact_runtimes import SPLIT, left_out, refusal, require_packages

from qdiff.deploy import exactness, for_onnxruntime
from qdiff.deploy.exactness import check_exact
from qdiff.deploy.onnx_lowering import ProductLimits
from qdiff.deploy.runtimes import RUNTIMES, onnx_runtimes
from qdiff.errors import UserError

require_packages()

AS_WITHOUT_VNNI = """
from qdiff.deploy.exactness import check_exact
from qdiff.deploy.runtimes import RUNTIMES
print(check_exact(RUNTIMES["openvino"]).weight)
"""
PAIR_LIMIT = 2**15 - 1


@pytest.mark.parametrize("runtime", onnx_runtimes())
def test_saturating_products_are_refused(runtime):
    sentence = f"the integer products of {runtime} saturate on this CPU, "
    refused = refusal(runtime) or sentence  # then its other tests are skipped
    if refused == left_out(runtime):
        pytest.skip(refused)
    assert refused.startswith(sentence)

    def saturating(model, threads):
        run = RUNTIMES[runtime].open(model, threads)
        return lambda feed: [np.minimum(out, 64 // 2 * PAIR_LIMIT) for out in run(feed)]

    with pytest.raises(UserError, match=f"^{sentence}"):
        check_exact(replace(RUNTIMES[runtime], open=saturating))


@pytest.mark.parametrize("wrong", range(4))
def test_each_product_counts(wrong):
    """Of two activations alone it is said apart; a product of weights that is wrong in any kernel is not exact."""

    def opened(model, threads):
        run = RUNTIMES["onnxruntime"].open(model, threads)
        return lambda feed: [out * (1 + 1e-4 * (i == wrong)) for i, out in enumerate(run(feed))]

    found = exactness.limits_of(RUNTIMES["onnxruntime"].changes, opened)
    assert found == (ProductLimits(activations=False) if wrong == 3 else None)
    with pytest.raises(UserError):  # nothing keeps them in float for this runtime
        check_exact(replace(RUNTIMES["onnxruntime"], open=opened))


# What each size of weights gives, and what was lowered for it; and the limits that follow.
MACHINES = {
    "with VNNI": ({128: [True] * 4}, None, ProductLimits()),
    "without": ({128: [False, True, False, False], 64: [True, True, True, False]}, [True] * 4, SPLIT),
    "activations saturate": ({128: [True, True, True, False]}, [True] * 4, ProductLimits(activations=False)),
    "lowered in vain": ({128: [False] * 4, 64: [True, True, True, False]}, [True, True, True, False], None),
    "nothing is exact": ({128: [False] * 4, 64: [True, False, True, True]}, None, None),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_lowering_is_the_first_that_is_exact(name, monkeypatch):
    plain, lowered, expected = MACHINES[name]
    asked = []

    def products(runtime, open_runtime, largest, limits):
        asked.append((largest, limits))
        return plain[largest] if limits == ProductLimits() else lowered

    monkeypatch.setattr(exactness, "_exact_products", products)

    def opened(model, threads):
        raise AssertionError

    runtime = replace(RUNTIMES["openvino"], open=opened)
    if expected is None:
        with pytest.raises(UserError, match="saturate on this CPU"):
            check_exact(runtime)
    else:
        assert check_exact(runtime) == expected
    # The largest integers are tried first and, where they must be lowered, once more with what was chosen.
    wanted = [(largest, ProductLimits()) for largest in plain]
    assert [(size, limits) for size, limits in asked if limits == ProductLimits()] == wanted
    assert [size for size, limits in asked if limits != ProductLimits()] == ([] if lowered is None else [128])


@pytest.mark.parametrize(
    ("limits", "weight", "fast"),
    [
        (ProductLimits(), 128, True),
        (ProductLimits(64), 64, True),
        (ProductLimits(64), 65, False),
        (SPLIT, 15, False),  # of two activations they saturate
        (None, 15, False),
    ],
)
def test_onnx_runtime_takes_slower_kernels_where_the_fast_ones_saturate(limits, weight, fast, monkeypatch):
    taken = []
    monkeypatch.setattr(for_onnxruntime, "_session", lambda model, threads, fast: taken.append(fast))
    monkeypatch.setattr(for_onnxruntime, "limits_of", lambda runtime, opened: limits)
    monkeypatch.setattr(for_onnxruntime, "largest_weight", lambda model: weight)
    RUNTIMES["onnxruntime"].open(None, 1)
    assert taken == [fast]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what oneDNN limits is x86's")
def test_openvino_without_vnni():
    """Only weights of half the range are exact as they are, and all are once they were split."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", AS_WITHOUT_VNNI], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "64\n", run.stderr
