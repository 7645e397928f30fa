"""Runs of the sampling scripts that modulate, and what every layer and quantizer saw while they sampled."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from run_checks import pixels
from torch import Tensor

from qdiff.cli import sample as command
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer, DynamicActQuantizer

IMAGES, BATCH, STEPS = 5, 3, 4  # a batch of three and one of two
# Naive weights: calibrating them has tests of its own.
DYNAMIC = ("--ptq", "--method", "linear", "--weight_bit", 4, "--quant_act", "--act_bit", 4, "--quant_mode", "dynamic")
RECORDED = ("--cali_st", 2, "--cali_n", 2)
MODULATED = (*DYNAMIC, "--modulate", *RECORDED)
SCRIPTS = {"ddim": "sample_diffusion_ddim", "ldm": "sample_diffusion_ldm", "text": "txt2img"}
FOLDER = "-l"


@dataclass
class NetworkCall:
    """What one call of the network did.

    Attributes:
        inputs: of every layer, by name: one a call of the layer.
        seen, made: of every quantizer of a layer, by name: one a call of the quantizer.
        output: of the network.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    made: dict[str, list[Tensor]] = field(default_factory=dict)
    output: Tensor | None = None


@dataclass
class Watched:
    """All network calls of a run's sampling, batch by batch.

    Attributes:
        modulated: how many quantizers every modulated layer has.
    """

    batches: list[list[NetworkCall]] = field(default_factory=list)
    modulated: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def watching():
    """Yield what the sampling of a run inside the block does; calibration and its errors are not looked at."""
    watched, names, inside = Watched(), {}, False
    with pytest.MonkeyPatch.context() as patch:
        trajectory, forward = command.trajectory_of, QuantModel.forward
        layer_forward = QuantModule.forward

        @contextlib.contextmanager
        def batch(qnn):
            nonlocal inside
            names.update({m: n for n, m in qnn.model.named_modules()})
            watched.modulated.update({n: len(m.act_quantizers) for n, m in qnn.layers().items() if m.modulates})
            watched.batches.append([])
            inside = True
            try:
                with trajectory(qnn):
                    yield qnn
            finally:
                inside = False

        def network(self, *inputs):
            if not inside:
                return forward(self, *inputs)
            watched.batches[-1].append(NetworkCall())
            watched.batches[-1][-1].output = forward(self, *inputs)
            return watched.batches[-1][-1].output

        def layer(self, x):
            if inside and watched.batches[-1]:
                watched.batches[-1][-1].inputs.setdefault(names[self], []).append(x)
            return layer_forward(self, x)

        def quantizer_of(kind):
            original = kind.forward

            def quantizer(self, x):
                made = original(self, x)
                if inside and self in names:
                    watched.batches[-1][-1].seen.setdefault(names[self], []).append(x)
                    watched.batches[-1][-1].made.setdefault(names[self], []).append(made)
                return made

            return quantizer

        patch.setattr(command, "trajectory_of", batch)
        patch.setattr(QuantModel, "forward", network)
        patch.setattr(QuantModule, "forward", layer)
        for kind in (ActQuantizer, DynamicActQuantizer):
            patch.setattr(kind, "forward", quantizer_of(kind))
        yield watched


def assert_every_quantizer_sees_the_differences(watched: Watched, calls: int) -> None:
    """On a batch's first call no quantizer fires; on every later one each quantizer of a modulated layer fires once.

    What it sees is x_t − â, with â ← â + Q(x_t − â) from x_T on.
    """
    assert len(watched.modulated) > 20
    for batch in watched.batches:
        assert len(batch) == calls
        first, *later = batch
        assert not first.seen, f"{next(iter(first.seen))} fires on the first call"
        state = {}
        for name in watched.modulated:
            (state[name],) = first.inputs[name]
        for number, now in enumerate(later, 1):
            expected = {f"{n}.act_quantizers.{i}" for n, count in watched.modulated.items() for i in range(count)}
            assert set(now.seen) == expected, f"call {number}: {len(now.seen)} of {len(expected)} quantizers fire"
            for name, count in watched.modulated.items():
                (x,) = now.inputs[name]
                parts = [now.seen[f"{name}.act_quantizers.{i}"] for i in range(count)]
                assert all(len(part) == 1 for part in parts), f"{name} fires more than once"
                dim = 1 if x.dim() == 4 or (x.dim() == 3 and count == 2) else -1
                assert torch.equal(torch.cat([p for (p,) in parts], dim=dim), x - state[name]), f"{name}, call {number}"
                changes = [now.made[f"{name}.act_quantizers.{i}"][0] for i in range(count)]
                state[name] = state[name] + torch.cat(changes, dim=dim)


def psnr(a, b) -> float:
    """Of the images of two run folders, in dB; 99 where they are the same."""
    error = np.square(pixels(a) - pixels(b)).mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
