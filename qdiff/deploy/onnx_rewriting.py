"""Rewrite a graph node by node, and find the parts of quantized products in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qdiff.deploy.onnx_weights import keep_initialisers

if TYPE_CHECKING:
    import onnx

MIDDLE = 128  # middle level of 8 bits
HALF = MIDDLE // 2  # two products of a byte and a weight up to this fit 16 bits: 2·255·64 < 2^15

Change = Callable[["Rewriting", "onnx.NodeProto"], None]


@dataclass(frozen=True)
class Weight:
    """The integers of a product's second operand, with the output channels first.

    Attributes:
        integers: int16 [O, I, …].
        zero_points: int16 [O].
        scale: name of δ [O].
        transposed: the product takes [I, O].
    """

    integers: np.ndarray
    zero_points: np.ndarray
    scale: str
    transposed: bool

    def shifted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return q and z as int8, both reduced by the same number: by z if all q − z fit int8, else by 128."""
        centred = self.integers - self.zero_points.reshape(-1, *[1] * (self.integers.ndim - 1))
        if centred.min() >= -MIDDLE and centred.max() < MIDDLE:
            return centred.astype(np.int8), np.zeros(len(self.zero_points), np.int8)
        return (self.integers - MIDDLE).astype(np.int8), (self.zero_points - MIDDLE).astype(np.int8)


class Rewriting:
    """A graph that is rewritten node by node, in order; new nodes are appended in place of the current one."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.stored = {tensor.name: tensor for tensor in self.graph.initializer}
        self.made_by = {output: node for node in self.graph.node for output in node.output}
        self.sizes = {value.name: side for value in self.graph.value_info if (side := _sides(value)) is not None}
        self.nodes: list[onnx.NodeProto] = []
        self._done: set[str] = set()
        self._made: list[str] = []

    def constant(self, name: str, values: np.ndarray) -> str:
        """Store a tensor under a name, once."""
        from onnx import numpy_helper

        if name not in self.stored:
            self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
            self._made.append(name)
        return name

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        """Append a node, unless its output exists already, and return its output.

        Args:
            domain: domain of the operation; empty for ONNX's own.
        """
        from onnx import helper

        if output not in self._done:
            self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))
            self._done.add(output)
        if all(known.domain != domain for known in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(domain, 1))
        return output

    def array(self, name: str) -> np.ndarray:
        """Return the values of a stored tensor."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.stored[name])

    def weight(self, product: onnx.NodeProto) -> Weight | None:
        """Return the quantized weight of a product, or None."""
        node = self.made_by.get(product.input[1])
        transposed = node is not None and node.op_type == "Transpose"
        if transposed:
            node = self.made_by.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.stored:
            return None
        integers, zero_points = (self.array(name).astype(np.int16) for name in (node.input[0], node.input[2]))
        return Weight(integers, zero_points, node.input[1], transposed)

    def quantized_input(self, product: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the node that dequantizes a product's input, or None if the input is not quantized."""
        node = self.made_by.get(product.input[0])
        found = node is not None and node.op_type == "DequantizeLinear" and node.input[0] not in self.stored
        return node if found else None

    def rewrite(self, changes: Mapping[str, Change]) -> None:
        """Replace nodes by the change for their operation, then drop everything that is no longer used."""
        for node in self.graph.node:
            if node.op_type in changes:
                changes[node.op_type](self, node)
            else:
                self.nodes.append(node)
        wanted, kept = {output.name for output in self.graph.output}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        nodes = [type(node).FromString(node.SerializeToString()) for node in reversed(kept)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        keep_initialisers(self.graph, wanted)
        self.graph.initializer.extend(self.stored[name] for name in self._made if name in wanted)


def of_integers(change: Callable[[Rewriting, onnx.NodeProto, onnx.NodeProto, Weight], None]) -> Change:
    """Return a change for products of a quantized input and a quantized weight; other products stay as they are.

    Args:
        change: ``change(graph, product, node that dequantizes its input, weight)``.
    """

    def changed(graph: Rewriting, product: onnx.NodeProto) -> None:
        weight, given = graph.weight(product), graph.quantized_input(product)
        if weight is None or given is None:
            graph.nodes.append(product)
        else:
            change(graph, product, given, weight)

    return changed


def _sides(value: onnx.ValueInfoProto) -> list[int] | None:
    """Return the sides of a value [N, C, …]; None if they are not fixed."""
    sides = [dim.dim_value for dim in value.type.tensor_type.shape.dim[2:]]
    return sides if all(sides) else None
