"""Trace a quantized network into an ONNX graph."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff.deploy.onnx_leaves import OnnxAttention, OnnxLayer
from qdiff.deploy.onnx_program import capture
from qdiff.deploy.onnx_ranges import OPSET
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.tracing.trace import Call, call_directly

if TYPE_CHECKING:
    import onnx

LARGEST_BATCH = 1 << 16
INPUTS, OUTPUT = ("x", "t", "context"), "eps"
STATE = "state"  # state.LAYER.input, state.LAYER.output


class _Denoiser(nn.Module):
    """Returns a network's ε and the state of its modulated layers, as a function of its inputs and the previous state.

    ε is NaN where a context begins with another token than the one that layers have an output for.

    Args:
        network: network whose leaves are `OnnxLayer` and `OnnxAttention`.
        count: number of the network's own inputs; the inputs after them are the state.
        call: runs the network on its inputs.
    """

    def __init__(self, network: nn.Module, count: int, call: Call = call_directly) -> None:
        super().__init__()
        self.network, self.count, self.call = network, count, call
        self.layers = tuple(m for m in network.modules() if isinstance(m, OnnxLayer))
        self.memories = tuple(layer.memory for layer in self.layers if layer.memory is not None)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given, state = inputs[: self.count], inputs[self.count :]
        for memory in self.memories:
            memory.clear()
        if state:
            for memory, before, output in zip(self.memories, state[::2], state[1::2], strict=True):
                memory.input, memory.output = before, output
        eps = self.call(self.network, *given)
        for seen in (layer.seen for layer in self.layers if layer.seen.same is not None):
            # Not in the layer, because a quantized operand cannot hold NaN.
            known = seen.same.view(-1, *[1] * (eps.dim() - 1))
            eps = torch.where(known, eps, torch.full_like(eps, torch.nan))
        return eps, *(tensor for memory in self.memories for tensor in (memory.input, memory.output))


@torch.no_grad()
def trace(
    qnn: QuantModel, image_shape: tuple[int, ...], context_shape: tuple[int, ...] | None, later: bool = False
) -> onnx.ModelProto:
    """Return the graph of one call.

    Args:
        qnn: calibrated network; it is not changed.
        image_shape: (C, H, W).
        context_shape: (L, D) of the context, or None.
        later: for a network that modulates: trace a step after the first, which also takes the state.
    """
    network = _with_onnx_leaves(qnn)
    shapes = [image_shape, (), *([] if context_shape is None else [context_shape])]
    names, sample = list(INPUTS[: len(shapes)]), [torch.zeros(2, *shape) for shape in shapes]
    denoiser = _Denoiser(network, len(shapes), qnn.call_network)
    states = [f"{STATE}.{memory.name}.{part}" for memory in denoiser.memories for part in ("input", "output")]
    if later:
        # Clones, because the first layer's state is x itself, and the exporter would merge the two inputs.
        names, sample = names + states, sample + [tensor.clone() for tensor in denoiser(*sample)[1:]]
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    dynamic_shapes = (tuple({0: batch} for _ in sample),)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about versions of its own parts
            program = torch.onnx.export(
                capture(denoiser, tuple(sample), dynamic_shapes),
                dynamo=True,
                dynamic_shapes=dynamic_shapes,  # names the free axis
                input_names=names,
                output_names=[OUTPUT, *(f"next.{state}" for state in states)],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    model = program.model_proto
    for node in model.graph.node:  # drop the nodes' origins in Python, which take more bytes than the weights
        del node.metadata_props[:]
    # Keep only the shapes of convolutions' inputs, which the rewriting for a runtime needs.
    taken = {node.input[0] for node in model.graph.node if node.op_type == "Conv"}
    shapes = [value for value in model.graph.value_info if value.name in taken]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    return model


def _with_onnx_leaves(qnn: QuantModel) -> nn.Module:
    """Return a copy of the network in float32 on the CPU with traceable leaves; matching tensors are shared."""
    tensors = (*qnn.model.parameters(), *qnn.model.buffers())
    memo: dict[int, Any] = {id(tensor): _on_cpu(tensor) for tensor in tensors}
    network = copy.deepcopy(qnn.model, memo)
    made: dict[nn.Module, nn.Module] = {}  # a leaf that is used in several places stays one, with one state
    for path, parent in list(network.named_modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a leaf's second place
            if isinstance(child, QuantModule) and child not in made:
                made[child] = OnnxLayer(child, f"{path}.{name}" if path else name)
            elif isinstance(child, QuantAttention) and child not in made:
                made[child] = OnnxAttention(child)
            if child in made:
                setattr(parent, name, made[child])
    return network.eval()


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, floats as float32; the tensor itself if it is that already or has no values."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta or (tensor.dtype == dtype and tensor.device.type == "cpu"):
        return tensor
    moved = tensor.detach().to("cpu", dtype)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
