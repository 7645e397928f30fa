"""The least of many errors in chunks: results do not depend on them, memory is bounded, GPUs get few launches."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdiff.ranges import errors as range_errors
from qdiff.ranges import least_error
from qdiff.ranges import search as range_search
from qdiff.ranges.errors import DEVICE_BYTES, first_least
from qdiff.ranges.estimators import ESTIMATORS, RangeMethod, estimate
from qdiff.ranges.search import Side

META = torch.device("meta")  # has the chunks of a GPU, and computes nothing


def use_chunks(patch, values, rows):
    """Let a tensor of a step have this many values, and this many rows be searched at a time."""
    for module in (range_errors, range_search):
        patch.setattr(module, "values_at_a_time", lambda device: values)
    patch.setattr(range_search, "_rows_at_a_time", lambda n, bits, device: rows)


def found_with(values, rows, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, generator=generator) * torch.rand(5, 1, 1, 1, generator=generator)
    batches = [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2)]
    with monkeypatch.context() as patch:
        use_chunks(patch, values, rows)
        found = []
        for method in (RangeMethod.SEARCH, RangeMethod.MSE):
            for x in (weight, weight.abs()):
                for bits, symmetric in ((3, False), (9, False), (4, True)):
                    found += estimate(x, bits, method, symmetric, per_channel=True)
            observer = ESTIMATORS[method]()
            for batch in batches:
                observer.update(batch)
            found += observer.qparams(4, False, False)
    return found


@pytest.mark.slow
def test_results_do_not_depend_on_chunks(monkeypatch):
    """Bit for bit, from one row and one range at a time to all at once."""
    expected = found_with(range_errors.DEVICE_VALUES, 1000, monkeypatch)
    for chunks in ((1, 1), (200, 2)):
        assert all(torch.equal(a, b) for a, b in zip(found_with(*chunks, monkeypatch), expected, strict=True))
    monkeypatch.setattr(least_error, "SHRINK_STEPS", 2)
    planted = found_with(range_errors.DEVICE_VALUES, 1000, monkeypatch)
    assert not all(torch.equal(a, b) for a, b in zip(planted, expected, strict=True))


def test_the_first_of_equals_and_what_is_no_number():
    rows = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [torch.nan, 1.0, 2.0]])
    delta = torch.tensor([[0.7, 1.0, 1.0, 0.5], [0.7, 0.5, 1.0, 0.9], [1.0, 1.0, 1.0, 1.0]])
    assert first_least(rows, delta, torch.zeros(3, 4, dtype=torch.int32), 4).tolist() == [1, 1, 0]
    delta[0, 1] = torch.nan
    assert first_least(rows, delta, torch.zeros(3, 4, dtype=torch.int32), 4).tolist() == [2, 1, 0]


class Launches(TorchDispatchMode):
    """Counts operations that compute, and the bytes of what they made that are held at once."""

    def __init__(self):
        super().__init__()
        self.count, self.held, self.peak, self._known = 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            storage = made.untyped_storage()
            if storage._cdata in given and not func._schema.is_mutable:
                return out  # a view
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                made.kept = storage  # whose finalizer is the Python object's: it lives as long as the tensor
                weakref.finalize(storage, self._freed, storage._cdata)
        self.count += 1
        return out

    def _freed(self, key):
        self.held -= self._known.pop(key)


def launches(channels, n, bits, method):
    rows = torch.empty(channels, n, device=META)
    with Launches() as mode:
        if method == "mse":
            least_error.LeastError.choose(rows, rows.amin(1), rows.amax(1), bits, False, False)
        else:
            for part in rows.split(range_search._rows_at_a_time(n, bits, META)):
                if method == "pairs":
                    range_search._best_pair(part, bits)
                else:
                    range_search._best_threshold(part, bits, Side.POSITIVE)
    return mode


WEIGHTS = [((512, 4608), 8), ((1280, 23040), 8), ((4096, 9), 8), ((1, 1 << 17), 16)]
SEARCHES = [(*w, method) for w in WEIGHTS for method in ("pairs", "thresholds")]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "bits", "method"), [*SEARCHES, ((5120, 25600), 8, "mse"), ((4096, 9), 8, "mse")])
def test_chunks_of_a_gpu_fit_in_its_memory(size, bits, method):
    assert launches(*size, bits, method).peak <= DEVICE_BYTES


def test_the_bound_is_seen_to_be_exceeded(monkeypatch):
    use_chunks(monkeypatch, 4 * range_errors.DEVICE_VALUES, 512)
    assert launches(1280, 23040, 8, "pairs").peak > DEVICE_BYTES


@pytest.mark.parametrize(("method", "most"), [("pairs", 800), ("thresholds", 300), ("mse", 150)])
def test_a_gpu_gets_few_launches_for_a_large_weight(method, most, monkeypatch):
    assert launches(512, 4608, 8, method).count < most
    if method == "mse":  # planted: the chunks of a CPU's cache
        use_chunks(monkeypatch, range_errors.CACHED_VALUES, 14)
        assert launches(28, 4608, 8, method).count > 5 * most
