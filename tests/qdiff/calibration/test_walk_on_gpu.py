"""A walk whose activations fit on the GPU leaves them there, with the result of one that keeps them in RAM."""

from __future__ import annotations

import copy

import pytest
import torch
from virtual_cuda import Direction

from qdiff.calibration.run import init_weights
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker, walk
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

GPU = torch.device("cuda", 0)


@pytest.fixture
def walked(cuda, tiny_network, data):
    """``walked(storage)``: every unit's target, and what was counted."""

    def run(storage):
        qnn = QuantModel(copy.deepcopy(tiny_network).to("cuda"), QuantConfig(4, 8))
        init_weights(qnn)
        targets = []
        with cuda.counting() as counts:
            for _, _, unit, _ in walk(qnn.model, data.inputs, Walker(storage, GPU, 5), weights=True, activations=False):
                targets.append(unit.target)
        return [t.cpu() for t in targets], counts

    return run


@pytest.mark.slow
def test_activations_that_fit_stay(walked, data):
    kept, counts = walked(ActivationStorage(device=GPU))
    assert counts.bytes_moved(Direction.H2D) == sum(i.numel() * i.element_size() for i in data.inputs)
    assert counts.bytes_moved(Direction.D2H) == 0
    in_ram, counts = walked(ActivationStorage())
    assert min(counts.bytes_moved(d) for d in (Direction.H2D, Direction.D2H)) > 10_000
    assert all(torch.equal(a, b) for a, b in zip(kept, in_ram, strict=True))


def test_what_is_on_the_gpu_is_counted_and_given_back(cuda):
    storage = ActivationStorage(budget_bytes=0, device=GPU)
    tensor = storage.empty((10,), torch.float32)
    assert tensor.device == GPU and (storage.on_device, storage.in_ram, storage.on_disk) == (40, 0, 0)
    assert storage.peak == 40
