"""In float64 every published network gives the published code's outputs on any CPU: float, weights, activations."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from golden_cases import ALL_CASES, EXACT_TOLERANCE, FLOAT_TOLERANCE, WIDE_CASES, GoldenCase
from thorough import thorough_except
from torch import Tensor

from qdiff import quant_attention
from qdiff.checkpoint import load_checkpoint
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel

NARROW = [name for name in ALL_CASES if name not in WIDE_CASES]
NARROW_ACTIVE = [name for name in NARROW if GoldenCase(name).options["act_bits"]]
ALL = pytest.mark.parametrize(
    "name", thorough_except(ALL_CASES, *NARROW, "wide_sd_w8a8_sym")
)  # the wide ones take seconds
WIDE = pytest.mark.parametrize("name", WIDE_CASES)

# What is planted in the last layer; a float32 number could hardly tell.
TINY_ERROR = 1 + 1e-7
# … and in an activation's step size: smaller errors vanish in the rounding of the next quantizer.
STEP_ERROR = 1.001


@pytest.fixture(scope="module")
def loaded():
    """``loaded(name)``: the case and its network in float64, filled from the published file (not to be changed)."""
    made: dict[str, tuple[GoldenCase, QuantModel]] = {}

    def load(name: str) -> tuple[GoldenCase, QuantModel]:
        if name not in made:
            golden = GoldenCase(name)
            qnn = golden.wrapped()
            load_checkpoint(qnn, golden.path)
            made[name] = golden, qnn.double()
        return made[name]

    return load


@torch.no_grad()
def output(qnn: QuantModel, golden: GoldenCase, weights: bool = True, activations: bool = True) -> Tensor:
    with qnn.quantized(weights=weights, activations=activations):
        return qnn(*golden.exact_inputs)


@pytest.mark.slow
@ALL
def test_float_output(name, loaded, relative):
    golden, qnn = loaded(name)
    expected = golden.values["fp"]
    assert relative(output(qnn, golden, False, False), expected) < EXACT_TOLERANCE
    wrong = copy.deepcopy(qnn)
    list(wrong.layers().values())[-1].weight.data[0].mul_(TINY_ERROR)
    assert relative(output(wrong, golden, False, False), expected) > EXACT_TOLERANCE


@pytest.mark.slow
@ALL
def test_weights_alone(name, loaded, relative):
    golden, qnn = loaded(name)
    # A file without activations was resumed once, with weights alone.
    expected = golden.values["resumed_weight_only" if golden.options["act_bits"] else "resumed"]
    assert relative(output(qnn, golden, activations=False), expected) < EXACT_TOLERANCE
    wrong = copy.deepcopy(qnn)
    list(wrong.layers().values())[-1].weight_quantizers[0].delta.data.mul_(TINY_ERROR)
    assert relative(output(wrong, golden, activations=False), expected) > EXACT_TOLERANCE


def kinds_of(names: list[str]) -> dict[str, str]:
    """Return one activation quantizer of each kind, by what its layer is called inside its block."""
    return {re.sub(r"\d+", "#", ".".join(name.split(".")[-4:])): name for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    thorough_except([n for n in ALL_CASES if GoldenCase(n).options["act_bits"]], *NARROW_ACTIVE, "wide_sd_w8a8_sym"),
)
def test_weights_and_activations(name, loaded, relative):
    golden, qnn = loaded(name)
    expected = golden.values["resumed"]
    assert relative(output(qnn, golden), expected) < EXACT_TOLERANCE
    names = list(qnn.act_quantizers())
    if name not in WIDE_CASES:  # whose norms remove what the embedding adds
        names = [n for n in names if "emb" not in n]
    kinds = kinds_of(names)
    assert len(kinds) > 8
    wrong = copy.deepcopy(qnn)
    with torch.no_grad(), wrong.quantized():  # once for all planted errors
        for quantizer in kinds.values():
            delta = wrong.act_quantizers()[quantizer].delta
            right = delta.clone()
            delta.mul_(STEP_ERROR)
            assert relative(wrong(*golden.exact_inputs), expected) > EXACT_TOLERANCE, quantizer
            delta.copy_(right)


@pytest.mark.slow
@WIDE
def test_wide_networks_see_the_embedding_in_float64(name, loaded, relative, monkeypatch):
    """The networks of 32 channels do not: their norms remove what is constant over a channel."""
    golden, qnn = loaded(name)
    module = __import__(type(qnn.model).__module__, fromlist=["timestep_embedding"])
    embed = module.timestep_embedding
    monkeypatch.setattr(module, "timestep_embedding", lambda t, dim, dtype: embed(t, dim, torch.float32).to(dtype))
    assert relative(output(qnn, golden, False, False), golden.values["fp"]) > EXACT_TOLERANCE


@pytest.mark.slow
def test_softmax_is_computed_in_float64(loaded, relative, monkeypatch):
    golden, qnn = loaded("wide_sd_w4a8_sm16_split")  # of 8 bits, rounding would hide float32's errors
    monkeypatch.setattr(quant_attention, "at_least_single", lambda logits: logits.float())
    assert relative(output(qnn, golden), golden.values["resumed"]) > EXACT_TOLERANCE


@pytest.mark.slow
def test_the_softmax_of_transformer_blocks_is_symmetric_in_published_files(loaded, relative, monkeypatch):
    """Read as unsigned, its range would be of twice the levels, and reach to 2."""
    golden, right = loaded("wide_sd_w8a8_sym")
    assert {int(q.zero_point) for n, q in right.act_quantizers().items() if n.endswith("_w")} == {128}
    wrong = golden.wrapped()
    wrong.family = replace(wrong.family, symmetric_softmax=None)
    with pytest.raises(UserError, match="change --sm_abit"):
        load_checkpoint(wrong, golden.path)
    monkeypatch.setattr("qdiff.checkpoint.published.check_softmax_ranges", lambda *_: None)
    load_checkpoint(wrong, golden.path)
    assert relative(output(wrong.double(), golden), golden.values["resumed"]) > 1e-2


def test_the_softmax_of_attention_blocks_is_not(loaded):
    golden, qnn = loaded("bedroom_w4a8")
    assert golden.options["act_symmetric"]
    assert {int(q.zero_point) for n, q in qnn.act_quantizers().items() if n.endswith("_w")} == {0}


# --- float32, where the order of sums depends on the CPU


@pytest.mark.slow
@WIDE
def test_float32_without_quantized_activations(name, relative):
    golden = GoldenCase(name)
    qnn = golden.wrapped()
    load_checkpoint(qnn, golden.path)
    with torch.no_grad():
        assert relative(qnn(*golden.inputs), golden.values["fp"]) < FLOAT_TOLERANCE
        with qnn.quantized(activations=False):
            made = qnn(*golden.inputs)
    assert relative(made, golden.values["resumed_weight_only"]) < FLOAT_TOLERANCE < relative(made, golden.values["fp"])
