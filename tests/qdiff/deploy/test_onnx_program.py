"""Programs that need no decomposition are the graphs that decomposition gives; others are decomposed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from qdiff.deploy.onnx_program import capture  # noqa: E402
from qdiff.deploy.onnx_ranges import OPSET  # noqa: E402

pytestmark = pytest.mark.slow

BATCH = {0: torch.export.Dim("batch", min=1, max=64)}
SHAPE = (3, 4, 5)


class Translated(nn.Module):
    """What is written in another way first: in place, conversions to the same dtype and to another, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x / 0.3).round_().add_(2).clamp_(0, 15).sub_(2).mul_(0.3)
        ones = torch.tensor([1.0, 2.0, 4.0])
        low = x.amin([1, 2, 3], keepdim=True).double()
        mixed = self.linear(rounded.float().movedim(1, -1)).movedim(-1, 1)
        return mixed * ones[:, None, None] - low.to(x.dtype)


class WrittenTo(nn.Module):
    """In place where another tensor shares the memory: to write it out of place would change the result."""

    def forward(self, x: Tensor) -> Tensor:
        half = x / 2
        shared = half.view(-1, 60)
        half.add_(1)
        return shared.view(-1, *SHAPE) + x


class ConstantWrittenTo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        ones = torch.tensor([1.0, 2.0, 4.0])
        ones.mul_(3)
        return x * ones[:, None, None]


class Untranslated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logaddexp(x, x.flip(1)) + 1


class OutputConverted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).float()


def captured(network: nn.Module) -> tuple[torch.export.ExportedProgram, bool]:
    """Return a network's program, and whether it is exported without decomposition."""
    program = capture(network.eval(), (torch.zeros(2, *SHAPE),), ((BATCH),))
    return program, program.run_decompositions({}) is program


def model_of(program: torch.export.ExportedProgram | nn.Module) -> onnx.ModelProto:
    options = {"dynamo": True, "opset_version": OPSET, "external_data": False, "verbose": False}
    return torch.onnx.export(program, (torch.zeros(2, *SHAPE),), dynamic_shapes=((BATCH,)), **options).model_proto


def graph_of(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    """Return a model's nodes without the names of what lies between them."""
    stored = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
    numbers: dict[str, int] = {}

    def known(name: str) -> object:
        return stored.get(name, numbers.setdefault(name, len(numbers)))

    def attributes(node: onnx.NodeProto) -> list[bytes]:
        return [attribute.SerializeToString() for attribute in node.attribute]

    return [
        (node.op_type, [known(i) for i in node.input], attributes(node), [known(o) for o in node.output])
        for node in model.graph.node
    ]


def outputs(model: onnx.ModelProto, x: Tensor) -> Tensor:
    return torch.from_numpy(
        onnx.reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})[0]
    )


def test_what_needs_no_decomposition_is_the_same_graph():
    torch.manual_seed(0)
    network = Translated()
    program, is_whole = captured(network)
    assert is_whole
    ours, theirs = model_of(program), model_of(network)
    assert graph_of(ours) == graph_of(theirs) and len(ours.graph.node) > 10
    network.linear.weight.data[0, 0] += 1  # planted
    assert graph_of(ours) != graph_of(model_of(network))


@pytest.mark.parametrize(
    ("network", "whole"),
    [(WrittenTo(), False), (ConstantWrittenTo(), False), (Untranslated(), False), (OutputConverted(), True)],
)
@torch.no_grad()
def test_programs_are_right_and_decomposed_where_they_must_be(network, whole):
    program, is_whole = captured(network)
    assert is_whole is whole
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(outputs(model_of(program), x), network(x))
