"""Compare an exported network with the simulated one, layer by layer, without what rounding makes of last bits.

Two ways to compute one sum differ in last bits; a value on a rounding edge then falls to the other side, and behind a
few layers such flips are as large as the quantization noise itself, 1 % of ε: no tolerance on ε could see a scale that
is one level off. So the simulated network runs on the integers of the runtime: where it quantizes an activation, it is
given what the runtime made of its own. Everything in between is then equal but for last bits, in every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qdiff.deploy.exactness import check_exact
from qdiff.deploy.onnx_lowering import lower
from qdiff.deploy.onnx_network import OnnxNetwork, read_model
from qdiff.deploy.onnx_ranges import BYTE
from qdiff.deploy.runtimes import RUNTIMES as ROWS
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer

RUNTIMES = ("onnxruntime", "openvino")
# Final samples, sampled with the runtime's integers: nothing visible.
FOLLOWED_PSNR = 90.0
# … and by each for itself: flips at rounding edges make 1 % of ε in one call, and a sampler adds them up. On what comes
# last there is little noise, of which they are more.
FREE_STEP_TOLERANCE, FREE_LAST_STEP_TOLERANCE, FREE_PSNR = 0.06, 0.2, 20.0


def relative(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@dataclass
class Differences:
    """Relative L2 of what a runtime computed from what the simulated network made of the same integers.

    Attributes:
        inputs: by activation quantizer, what came to it (all that lies between the quantizers before and this one).
        rounding: by activation quantizer, what it made of the runtime's own input.
        eps: the network's output.
        simulated: the simulated network's ε on the runtime's integers.
    """

    inputs: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    eps: float = 0.0
    simulated: Tensor | None = None

    def sums(self) -> float:
        """Return the largest difference of a sum."""
        return max(*self.inputs.values(), self.eps)

    def levels(self) -> float:
        """Return the largest difference of a quantizer."""
        return max(self.rounding.values())


class Followed:
    """An exported network whose activations can be seen before and behind every quantizer.

    Args:
        path: of `export_onnx`.
        runtime: one of `RUNTIMES`.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        from onnx import helper

        model = read_model(path)
        weights = {tensor.name for tensor in model.graph.initializer}
        made = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert quantizers and not any(node.input[0] in weights for node in quantizers)
        self.pairs = [(node.input[0], made[node.output[0]]) for node in quantizers]
        given = {each.name for each in model.graph.input}
        for name in dict.fromkeys(name for pair in self.pairs for name in pair):
            if name not in given:
                model.graph.output.append(helper.make_empty_tensor_value_info(name))
        # As it runs; what is looked at stays.
        lower(model, ROWS[runtime].changes(check_exact(ROWS[runtime])))
        self._session = ROWS[runtime].open(model, 1)
        self.names = [each.name for each in model.graph.input]
        self._outputs = [each.name for each in model.graph.output]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """ε of the runtime."""
        return torch.from_numpy(np.array(self._run(self._feed(inputs))["eps"]))

    def _run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session(feed), strict=True))

    def _feed(self, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
        return {name: value.float().numpy() for name, value in zip(self.names, inputs, strict=True)}

    def differences(self, qnn: QuantModel, *inputs: Tensor) -> Differences:
        """Run both; see `Differences`."""
        feed = self._feed(inputs)
        there = {name: torch.from_numpy(np.array(v)) for name, v in {**self._run(feed), **feed}.items()}
        names = {id(q): name for name, q in qnn.act_quantizers().items() if q.bits <= BYTE}
        found = Differences()

        def replaced(quantizer: ActQuantizer, x: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
            if quantizer.bits > BYTE:  # arithmetic on float values in the runtime too
                return own(x)
            # Equal quantizers of one tensor are one in the graph, so they are told apart by their inputs.
            pairs = [(there[before], there[behind]) for before, behind in self.pairs if there[before].shape == x.shape]
            if (shifts := quantizer.shifts_of(x)) is not None:  # the graph quantizes 2^k·x, and divides the weight
                pairs = [tuple(each / (1 << shifts) for each in pair) for pair in pairs]
            assert pairs, names[id(quantizer)]
            before, behind = min(pairs, key=lambda pair: float((pair[0] - x).norm()))
            name = names[id(quantizer)]
            found.inputs[name], found.rounding[name] = relative(before, x), relative(behind, own(before))
            return behind

        with _quantizers_replaced(replaced), qnn.quantized(), torch.no_grad():
            found.simulated = qnn(*inputs)
        found.eps = relative(there["eps"], found.simulated)
        assert found.inputs.keys() == set(names.values())
        return found


# Opened once: OpenVINO compiles a network for seconds.
followed_network = functools.cache(Followed)
opened_network = functools.cache(OnnxNetwork)


@contextmanager
def _quantizers_replaced(replaced: Callable[..., Tensor]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        own = ActQuantizer.forward
        patch.setattr(ActQuantizer, "forward", lambda self, x: replaced(self, x, lambda given: own(self, given)))
        yield


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of images or latents whose values are some [−1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


class _AfterRuntime:
    """The simulated network on the integers of a runtime's own trajectory, call by call."""

    def __init__(self, followed: Followed, qnn: QuantModel, calls: list[tuple[Tensor, ...]]) -> None:
        self.followed, self.qnn, self.calls = followed, qnn, iter(calls)
        self.errors: list[float] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        found = self.followed.differences(self.qnn, *next(self.calls))
        self.errors.append(found.eps)
        return found.simulated


@torch.no_grad()
def check_samples(
    qnn: QuantModel, path: Path, runtime: str, model: Pipeline, last: str, calls: int, tolerance: float
) -> None:
    """Assert that what a runtime samples is what is simulated, at every step and in the end.

    Args:
        last: the network's last layer, in which a scale that is one level off is planted.
        calls: of the sampler.
        tolerance: of ε at every step, relative, on the runtime's integers.
    """
    real, followed, fed = opened_network(path, runtime), followed_network(path, runtime), []

    def sampled(network: Callable[..., Tensor]) -> Tensor:
        return model.sample(network, range(2))

    def listened(*inputs: Tensor | None) -> Tensor:
        fed.append(tuple(value for value in inputs if value is not None))
        return followed(*fed[-1])

    made = sampled(listened)
    assert len(fed) == calls
    after = _AfterRuntime(followed, qnn, fed)
    assert psnr(sampled(after), made) > FOLLOWED_PSNR
    assert len(after.errors) == calls and max(after.errors) < tolerance, after.errors

    weights = qnn.layers()[last]
    before = weights.weight_quantizers[0].delta.clone()
    weights.weight_quantizers[0].delta.mul_(1 + 1 / 255)
    weights.drop_dequantized()
    planted = _AfterRuntime(followed, qnn, fed)
    assert psnr(sampled(planted), made) < FOLLOWED_PSNR
    assert min(planted.errors) > tolerance, planted.errors
    weights.weight_quantizers[0].delta.copy_(before)
    weights.drop_dequantized()

    # Each for itself, and the graph as it runs, where nobody looks inside: flips at edges take what they take.
    with qnn.quantized():
        errors = [relative(real(*given), qnn(*given)) for given in fed]
        assert psnr(sampled(real), sampled(qnn)) > FREE_PSNR
    assert max(errors[:-1]) < FREE_STEP_TOLERANCE and errors[-1] < FREE_LAST_STEP_TOLERANCE, errors
