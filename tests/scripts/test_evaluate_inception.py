"""evaluate.py REFERENCE.npz SAMPLES.npz as ADM's users type it, on Inception's architecture with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from digit_sets import digits, write_npz
from threadpoolctl import threadpool_limits
from unfilled_inception import INCEPTION, drawn_inception

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random, of a size that keeps features apart and finite."""
    generator = torch.Generator().manual_seed(0)
    made = drawn_inception(generator)
    for layer in made.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    torch.nn.init.normal_(made.fc.weight, 0.0, 0.1, generator=generator)
    torch.nn.init.zeros_(made.fc.bias)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(made.state_dict(), path)
    return path


def test_verbatim_command(call, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    real, made = write_npz(tmp_path / "ref.npz", digits(0, 6)), write_npz(tmp_path / "made.npz", digits(6, 12))
    with threadpool_limits(1):
        outcome = call("evaluate", real, made, "--extractor-weights", weights, "--json", tmp_path / "a.json")
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["protocol"]["extractor"] == found["reference"]["extractor"] == INCEPTION
    assert found["protocol"]["inception_score"] == "parts of 5,000, in order"
    assert found["protocol"]["left_out"] == ["isc"]
    kept = {}
    for file in (tmp_path / "cache" / "features").iterdir():
        with np.load(file) as archive:
            kept[json.loads(str(archive["about"]))["pixels_hash"]] = {k: archive[k] for k in archive.files}
    ours, theirs = kept.pop(found["samples"]["pixels_hash"]), next(iter(kept.values()))
    assert ours["features"].shape == (6, 2048) and ours["spatial_mu"].shape == (2023,)
    for metric, mean, root in (("fid", "gaussian_mu", "features"), ("sfid", "spatial_mu", None)):
        # The distance is at least that of the means, and at most it and both traces.
        means = ((ours[mean] - theirs[mean]) ** 2).sum()
        sigma = mean.replace("mu", "sigma")
        most = means + np.trace(ours[sigma]) + np.trace(theirs[sigma])
        assert 0 < means < found["metrics"][metric] < most, metric
        if root is not None:
            a, b = ((x[root] - x[root].mean(0)).astype(float) / 5**0.5 for x in (ours, theirs))
            exact = most - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()  # tr (Σ₁Σ₂)^½ is a nuclear norm
            assert found["metrics"][metric] == pytest.approx(exact, rel=1e-4)  # float32 features
