"""Shared by the evaluation tests."""

import pytest
from threadpoolctl import threadpool_limits

from qdiff.evaluation.extractors import create_extractor


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """SciPy's BLAS does not heed OMP_NUM_THREADS set after its import; idle threads spin for tens of seconds."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def extractor():
    return create_extractor("digits-classifier")
