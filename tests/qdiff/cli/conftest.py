"""Shared by the tests of tables."""

from __future__ import annotations

import numpy as np
import pytest
from digit_runs import COUNT, DigitTable
from threadpoolctl import threadpool_limits

from ddim.datasets.digits import load_digit_images
from qdiff.cli import table as module


@pytest.fixture(autouse=True)
def one_blas_thread():
    """SciPy's BLAS does not heed OMP_NUM_THREADS set after its import."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def digits():
    """Real digits uint8 [20, 32, 32, 3] and their classes."""
    images, labels = load_digit_images(32)
    return np.repeat(images[:COUNT, :, :, None], 3, axis=3), [int(label) for label in labels[:COUNT]]


@pytest.fixture
def table(tmp_path, monkeypatch, without_plots, digits):
    made = DigitTable(tmp_path, digits[0])
    monkeypatch.setattr(module, "_call", made.call)
    return made
