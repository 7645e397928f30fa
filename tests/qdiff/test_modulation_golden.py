"""Dynamic ranges and modulation against the outputs of the published code.

Without modulation they are met as they are. With it, six steps of 4-bit differences hang on the last bit of every sum:
a value that another order of summation moves over a rounding edge moves every later step, and a run of ours with its
inputs scaled by 1 ± 1e-7 is as far from itself as from the published one (5e-3 to 4e-2). What CAN be asked is whether
the published outputs are those of our network for some choice of last bits: the search below goes through runs in which
each layer's input is moved by about its last bit, and follows those that meet every step.
"""

from __future__ import annotations

import json

import pytest
import torch
from golden_cases import ACTIVATION_TOLERANCE, FLOAT_TOLERANCE, GOLDEN, GoldenCase

from qdiff.checkpoint import load_checkpoint

CASES = sorted(path.name for path in GOLDEN.glob("modiff_*"))
PLAIN = [name for name in CASES if name.endswith("_plain")]
MODULATED = [name for name in CASES if name.endswith("_mod")]
SCALES = {"batch": "tensor", "sample": "sample"}
LAST_BIT = 5e-8  # relative; float32 has 6e-8 between 1 and the number above it
TRIES, KEPT = 400, 10  # runs of a step at most, and how many that meet it are gone on with
SEARCHES = 4  # a flip that does not show in the output of its step can lead all that were kept astray


def values(name):
    """Return what a case's file holds; inputs and float outputs are those of the family's ``batch_plain``."""
    return torch.load(GOLDEN / name / "golden.pth", weights_only=True)


def golden_run(name, **changes):
    """Return a case's golden values, the network, and its inputs at each step."""
    case = json.loads((GOLDEN / name / "case.json").read_text())
    golden = {**values(f"{name.rsplit('_', 2)[0]}_batch_plain"), **values(name)}
    source = GoldenCase(case["source_case"])
    options = {"modulate": case["modulate"], **changes}
    qnn = source.wrapped(
        act_bits=case["act_bit"],
        act_symmetric=case["a_sym"],
        act_dynamic=True,
        act_scale_per=SCALES.get(case["act_scale_per"], case["act_scale_per"]),
        **options,
    )
    load_checkpoint(qnn, source.path)
    condition = (golden["context"],) if "context" in golden else ()
    inputs = [(x, t.expand(len(x)), *condition) for x, t in zip(golden["xs"], golden["ts"], strict=True)]
    return golden, qnn, inputs


@torch.no_grad()
def outputs(name, **changes):
    """Return the golden values of a case, and ours: [6, N, …]."""
    golden, qnn, inputs = golden_run(name, **changes)
    with qnn.quantized(), qnn.trajectory():
        return golden, torch.stack([qnn(*each) for each in inputs])


def test_there_are_twelve_cases():
    assert len(PLAIN) == len(MODULATED) == 6


@pytest.mark.parametrize("name", PLAIN)
def test_dynamic_ranges_give_the_published_outputs(name, relative):
    golden, made = outputs(name)
    assert relative(made, golden["outs"]) < ACTIVATION_TOLERANCE
    # The tolerance sees the ranges: those of the other kind are further off.
    other = name.replace("_batch_", "_sample_") if "_batch_" in name else name.replace("_sample_", "_batch_")
    assert relative(made, values(other)["outs"]) > ACTIVATION_TOLERANCE


@torch.no_grad()
def steps_met(name, relative, tries, seed=0, **changes):
    """Return how many steps in a row some run meets to ACTIVATION_TOLERANCE, layer inputs moved by about a last bit."""
    golden, qnn, inputs = golden_run(name, **changes)
    layers = [layer for layer in qnn.layers().values() if layer.modulates]
    generator, exact = torch.Generator().manual_seed(seed), True

    def moved(layer, given):
        x = given[0]
        return None if exact else (x * (1 + LAST_BIT * torch.randn(x.shape, generator=generator)),)

    for layer in layers:
        layer.register_forward_pre_hook(moved)
    with qnn.quantized(), qnn.trajectory():
        going = [[(None, None)] * len(layers)]
        for step, (each, wanted) in enumerate(zip(inputs, golden["outs"], strict=True)):
            met, near = [], []
            for number in range(tries):
                exact = number < len(going)
                for layer, remembered in zip(layers, going[number % len(going)], strict=True):
                    layer.memory.input, layer.memory.output = remembered
                error = relative(qnn(*each), wanted)
                after = [(layer.memory.input, layer.memory.output) for layer in layers]
                if error < FLOAT_TOLERANCE:
                    met.append(after)
                elif error < ACTIVATION_TOLERANCE and len(near) < KEPT:
                    near.append(after)
                if len(met) == KEPT:
                    break
            if not met + near:
                return step
            going = met or near
    return len(inputs)


@pytest.mark.parametrize("name", MODULATED)
def test_modulation_gives_the_published_outputs_for_some_last_bits(name, relative):
    assert any(steps_met(name, relative, TRIES, seed) == 6 for seed in range(SEARCHES))


@pytest.mark.parametrize("name", MODULATED)
def test_last_bits_do_not_make_up_for_a_wrong_network(name, relative):
    # The first two steps do not tell: before the third there is no error to compensate.
    assert steps_met(name, relative, 60, ablation="no-compensation") == 2
    # A softer measure for what is further off than any order of sums.
    golden, made = outputs(name)
    _, plain = outputs(name, modulate=False)
    assert relative(plain[1:], golden["outs"][1:]) > 3 * relative(made[1:], golden["outs"][1:])
    wanted = golden["weight_only"]
    assert relative(plain[1:], wanted[1:]) > 1.5 * relative(made[1:], wanted[1:])
