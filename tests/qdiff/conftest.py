"""What the tests of the engine share: copies of the tiny network, data for it, and calibrated networks."""

from __future__ import annotations

import copy

import pytest
import torch

from qdiff.calibration import trajectory_sensitivity, weight_noise
from qdiff.calibration.input_moments import column_order
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker
from qdiff.config import QuantConfig
from qdiff.methods import linear
from qdiff.quant_model import QuantModel


def inputs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x, t) that the tiny network takes, spread over all timesteps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) * (1000 // count)


@pytest.fixture
def data() -> CalibrationSet:
    """12 samples: a batch of 5 leaves a remainder."""
    return CalibrationSet(inputs(12, seed=1))


@pytest.fixture
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Network inputs that no calibration saw."""
    return inputs(16, seed=2)


@pytest.fixture
def walker() -> Walker:
    return Walker(ActivationStorage(), torch.device("cpu"))


@pytest.fixture
def wrap(tiny_network):
    """``wrap(**config)``: the tiny network, always with the same float weights, wrapped and not calibrated."""

    def wrapped(**config) -> QuantModel:
        return QuantModel(copy.deepcopy(tiny_network), QuantConfig(**config))

    return wrapped


@pytest.fixture(scope="module")
def known_networks() -> dict[tuple[str, str], QuantModel]:
    """What `calibrated` has calibrated for the tests of a file, by the configs; never handed out."""
    return {}


@pytest.fixture
def calibrated(wrap, data, tiny_config, known_networks):
    """``calibrated(**config)``: the same, with ranges set by the linear recipe; a copy, calibrated once in a file."""

    def made(**config) -> QuantModel:
        key = str(tiny_config), str(sorted(config.items()))
        if key not in known_networks:
            qnn = wrap(**config)
            linear.calibrate(qnn, data, None, CalibrationRun(show_progress=False))
            known_networks[key] = qnn
        return copy.deepcopy(known_networks[key])

    return made


@pytest.fixture
def run_quantized():
    """``run_quantized(qnn, inputs, weights=True, activations=True)``: the output without gradients."""

    @torch.no_grad()
    def run(qnn: QuantModel, given: tuple[torch.Tensor, ...], weights: bool = True, activations: bool = True):
        with qnn.quantized(weights=weights, activations=activations):
            return qnn(*given)

    return run


@pytest.fixture
def relative():
    """``relative(out, expected)``: ‖out − expected‖ / ‖expected‖."""

    def error(out: torch.Tensor, expected: torch.Tensor) -> float:
        return float((out.double() - expected.double()).norm() / expected.double().norm())

    return error


@pytest.fixture
def state_of():
    """``state_of(network)``: its values, how many hooks each module has, and what its parameters have of gradients."""

    def state(network):
        values = {name: value.clone() for name, value in network.state_dict().items()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
        return values, hooks, [(p.requires_grad, p.grad) for p in network.parameters()]

    return state


@pytest.fixture
def heard_gradients(monkeypatch):
    """What `trajectory_sensitivities` works with: gradients by the weights of layers, and the projections v."""

    def finish(noise, scale=1.0):
        seen.setdefault(noise.layer, noise._gradient[..., column_order(noise.shape).argsort()])

    seen, drawn = {}, []
    run = trajectory_sensitivity._result

    def heard(*given):
        made = run(*given)
        made.register_hook(drawn.append)
        return made

    monkeypatch.setattr(trajectory_sensitivity, "_result", heard)
    monkeypatch.setattr(weight_noise.WeightNoise, "finish", finish)
    return seen, drawn
