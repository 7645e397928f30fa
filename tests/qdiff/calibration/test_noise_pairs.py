"""ε of the float and of the quantized network along the float trajectory."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ddim.pipeline import DdimPipeline
from qdiff.calibration.noise_pairs import collect_noise_pairs
from qdiff.calibration.run import init_weights
from qdiff.calibration.storage import ActivationStorage
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel
from qdiff.sampling import ImageNoise, SamplerOptions
from qdiff.sampling.noise import CALIBRATION_STREAM

SEED, ROWS = 5, [3, 9, 4]


@pytest.fixture
def pipeline(tiny_config, tiny_network, tmp_path):
    OmegaConf.save(tiny_config, tmp_path / "tiny.yml")
    made = DdimPipeline(tmp_path / "tiny.yml", "none", SamplerOptions("ddim", 4, eta=0.5), SEED, batch_size=2)
    made.network = tiny_network
    return made


@pytest.fixture
def qnn(pipeline):
    made = QuantModel(pipeline.network, QuantConfig(weight_bits=2))
    init_weights(made)
    return made


@torch.no_grad()
def test_both_networks_see_the_float_trajectory(pipeline, qnn):
    pairs = collect_noise_pairs(pipeline, qnn, ROWS, show_progress=False)
    assert pairs.times == (750.0, 500.0, 250.0, 0.0)
    seen = []
    pipeline.sampler(qnn, ROWS, calibration=True, on_call=lambda x, t, *_: seen.append((x, t)))
    x_T = ImageNoise(SEED + CALIBRATION_STREAM, ROWS, (1, 8, 8)).draw()
    assert torch.equal(seen[0][0], x_T), "images of the run itself would be judged on what they were fitted to"
    for call, (x, t) in enumerate(seen):
        torch.testing.assert_close(pairs.exact[call], qnn(x, t), rtol=1e-4, atol=1e-5)
        with qnn.quantized():
            wanted = qnn(x, t)
        torch.testing.assert_close(pairs.quantized[call], wanted, rtol=1e-4, atol=1e-5)
        assert float((pairs.quantized[call] - pairs.exact[call]).abs().max()) > 1e-2


def test_neither_batch_nor_storage_matters(pipeline, qnn):
    one = collect_noise_pairs(pipeline, qnn, ROWS, show_progress=False)
    pipeline.batch_size, on_disk = 3, ActivationStorage(0)
    other = collect_noise_pairs(pipeline, qnn, ROWS, on_disk, show_progress=False)
    assert on_disk.on_disk > 0 == on_disk.in_ram
    for a, b in zip((*one.exact, *one.quantized), (*other.exact, *other.quantized), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite(pipeline, qnn, monkeypatch):
    monkeypatch.setattr(qnn.model.conv_out, "bias", torch.nn.Parameter(torch.full((1,), float("nan"))))
    with pytest.raises(UserError, match="ε is not finite at timestep 750"):
        collect_noise_pairs(pipeline, qnn, ROWS, show_progress=False)
