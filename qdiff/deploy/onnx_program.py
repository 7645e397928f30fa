"""Capture a network as a program that the ONNX exporter need not decompose.

The exporter decomposes every program, which traces it three times more: half of the time of an export. Quantized
networks consist of operations that it translates as they are, once a few are written in another way; a program that
has others is decomposed as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

aten = torch.ops.aten

# Free of side effects, and translated as they are; a check of the example's shapes is left out.
TRANSLATED = frozenset(
    {
        *("onnx_symbolic::_symbolic", "getitem", "eq", "aten::_assert_tensor_metadata", "aten::_assert_scalar"),
        *("aten::add.Tensor", "aten::sub.Tensor", "aten::mul.Tensor", "aten::div.Tensor", "aten::clamp", "aten::round"),
        *("aten::neg", "aten::minimum", "aten::maximum", "aten::amin", "aten::amax"),
        *("aten::exp", "aten::sin", "aten::cos", "aten::silu", "aten::gelu", "aten::tanh", "aten::softmax.int"),
        *("aten::conv1d", "aten::conv2d", "aten::linear", "aten::matmul", "aten::group_norm", "aten::layer_norm"),
        *("aten::upsample_nearest2d.vec", "aten::avg_pool2d", "aten::pad", "aten::dropout", "aten::arange"),
        *("aten::cat", "aten::chunk", "aten::split_with_sizes", "aten::unbind.int", "aten::select.int"),
        *("aten::reshape", "aten::view", "aten::flatten.using_ints", "aten::unflatten.int", "aten::sym_size.int"),
        *("aten::transpose.int", "aten::permute", "aten::unsqueeze", "aten::squeeze.dim", "aten::expand"),
        *("aten::clone", "aten::zeros_like", "aten::full_like", "aten::slice.Tensor", "aten::_to_copy"),
    }
)
OUT_OF_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.round_.default: aten.round.default,
    aten.clamp_.default: aten.clamp.default,
}
MAKES_NEW_MEMORY = (aten.div.Tensor, *OUT_OF_PLACE.values())


def capture(network: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: tuple[Any, ...]) -> ExportedProgram:
    """Return a network as a program for `torch.onnx.export`, which decomposes it only where it must.

    Args:
        network: in eval mode.
        inputs: an example, of any values.
        dynamic_shapes: of the inputs, as `torch.export.export` takes them.
    """
    program = torch.export.export(network, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    graph = program.graph_module.graph
    for node in reversed(list(graph.nodes)):
        _leave_out(node)
    for node in graph.nodes:
        _write_out_of_place(node)
        _write_as_translated(node)
    graph.eliminate_dead_code()  # what was left out, and dtypes of comparisons that nothing reads
    program.graph_module.recompile()
    if all(name_of(node) in TRANSLATED for node in graph.nodes if node.op == "call_function"):
        program.run_decompositions = lambda table=None: program
    return program


def _write_out_of_place(node: fx.Node) -> None:
    """Replace an operation in place where the memory that it overwrites is new and nothing else reads it."""
    if node.target in OUT_OF_PLACE:
        written = node.args[0]
        if written.target in MAKES_NEW_MEMORY and len(written.users) == 1:
            node.target = OUT_OF_PLACE[node.target]


def _leave_out(node: fx.Node) -> None:
    """Let users of a conversion to the same dtype, or of a fresh copy of a constant, take what it is made of.

    Outputs keep their names, and constants that are written to their copies.
    """
    if any(user.op == "output" for user in node.users):
        return
    if node.target is aten.to.dtype and len(node.args) == 2:
        replaced = node.args[0].meta["val"].dtype == node.args[1]
    elif node.target is aten.lift_fresh_copy.default:
        replaced = not any(isinstance(u.target, OpOverload) and u.target._schema.is_mutable for u in node.users)
    else:
        replaced = node.target is aten.detach_.default
    if replaced:
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)


def _write_as_translated(node: fx.Node) -> None:
    """Replace an operation that is not translated by one that is, as decomposition does."""
    if node.target is aten.to.dtype and len(node.args) == 2:
        given, dtype = node.args
        node.target, node.args, node.kwargs = aten._to_copy.default, (given,), {"dtype": dtype}
    elif node.target is aten.movedim.int:
        given, source, destination = node.args
        order = list(range(given.meta["val"].dim()))
        order.insert(destination % len(order), order.pop(source))
        node.target, node.args = aten.permute.default, (given, order)
    elif node.target is aten.chunk.default:
        given, chunks, *dim = node.args
        node.args = (given, chunks, (*dim, 0)[0] % given.meta["val"].dim())


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls, with namespace and overload where it has them."""
    target = node.target
    return target.name() if isinstance(target, OpOverload) else target.__name__
