"""A runtime that computes nothing is an error, not an image of nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdiff.deploy.onnx_network import OnnxNetwork
from qdiff.errors import UserError


class Graph:
    def __init__(self, output: np.ndarray) -> None:
        self.output = output

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.output]


def network_that_returns(output: np.ndarray) -> OnnxNetwork:
    network = OnnxNetwork.__new__(OnnxNetwork)
    network._runtime, network._first, network._graph = "openvino", None, Graph(output)
    network._bos_aware = False
    return network


def test_an_empty_output_is_refused():
    x, t = torch.zeros(2, 1, 4, 4), torch.zeros(2)
    assert network_that_returns(np.ones((2, 1, 4, 4), np.float32))(x, t).shape == x.shape
    with pytest.raises(UserError, match="openvino returns an empty output on this CPU"):
        network_that_returns(np.empty((0,), np.float32))(x, t)
