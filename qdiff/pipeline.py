"""What a model family offers: a float network with its sampler, conditions and decoder, as one object."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qdiff.config import QuantConfig
from qdiff.errors import UserError, require_at_least
from qdiff.interface import SteppedNetwork
from qdiff.ranges.estimators import RangeMethod
from qdiff.sampling import Network, OnCall, OnStep, Sampler, find_sampler


def trajectory_of(network: Network) -> contextlib.AbstractContextManager:
    """Context for sampling one batch: the network's `trajectory()`, or a no-op."""
    return network.trajectory() if hasattr(network, "trajectory") else contextlib.nullcontext()


class Pipeline:
    """A float diffusion model and its sampler. A family derives its own, with a ``from_args`` for its scripts.

    Construction reads configs and checks numbers; weights, data and device are touched by `load`.

    Args:
        name: of the default run folder.
        sampler: of the images, or of their latents.
        count: how many images a run makes, at least 1.
        batch_size: images at a time, at least 1.

    Attributes:
        config: what decides the images besides quantization and seed, JSON values.
        weight_range, act_range: what the family's scripts take by default.
        conditional: the network takes a context.
        labels: the class that each image was asked for, where that is known.
        runs: folder of the default run folders.
        eda_dm: EDA-DM's values for this model by option name, of its config's section of that name.
        notes: sentences that the user should read; `load` may add some.
        precision_name: in which `precision` the network is called, ``full`` or ``autocast``; None where there is no
            choice.
        encoded: `conditions` of the images that `sample` is asked for, where that is known: it then needs no
            `load`. None encodes them.
        network, weights: after `load`.
        device: where sampling runs; the CPU until `load` or `move_to`.

    Raises:
        UserError: a number is out of range.
    """

    config: dict[str, Any]
    weight_range = RangeMethod.MSE
    act_range = RangeMethod.MSE
    conditional = False
    labels: list[int] | None = None
    runs = Path("runs")
    eda_dm: Mapping[str, Any] = MappingProxyType({})
    precision_name: str | None = None
    encoded: tuple[Tensor | None, Tensor | None] | None = None
    network: SteppedNetwork
    weights: Path | None = None
    device = torch.device("cpu")

    def __init__(self, name: str, sampler: Sampler, count: int, batch_size: int) -> None:
        self.name, self.sampler, self.count, self.batch_size = name, sampler, count, batch_size
        self.notes: list[str] = []
        require_at_least(0, {"seed": sampler.seed})
        require_at_least(1, {"count": count, "batch_size": batch_size})

    @property
    def calls(self) -> int:
        """How often one image's sampling calls the network."""
        return self.sampler.calls

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""
        return self.sampler.shape

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(L, D) of the context that the network is fed, after `load`; None where it takes none."""
        return None

    @property
    def training_steps(self) -> int:
        """T, how many timesteps the model was trained with: the network is fed those below it."""
        return self.sampler.schedule.num_train

    def note_steps(self, option: str) -> None:
        """Add a note where the sampler takes another number of steps than an option asks for."""
        asked, taken = self.sampler.options.steps, len(self.sampler.timesteps)
        if asked != taken and not find_sampler(self.sampler.options.kind).places_steps:
            self.notes.append(
                f"{option} {asked} does not divide the {self.training_steps} training steps: {taken} steps are taken, "
                "as by the published samplers"
            )

    def check_modulation(self, quant: QuantConfig) -> None:
        """Raise a `UserError` where a network that modulates would be sampled in one step."""
        if quant.modulate and self.calls < 2:
            raise UserError("--modulate is about changes from step to step, and this sampler has one; give it more")

    def probe(self) -> tuple[Tensor, ...]:
        """Return two inputs of the network, (x, t[, context]), after `load`: noise at t = T/2, and real conditions."""
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(2, *self.input_shape, generator=generator), torch.full((2,), self.training_steps // 2)
        condition, _ = self.conditions([0, 1], calibration=True)
        return (x, t) if condition is None else (x, t, condition)

    def build_network(self) -> tuple[SteppedNetwork, tuple[int, int] | None]:
        """Return the network on the meta device, and the (L, D) of its context: shapes without files."""
        raise NotImplementedError

    def load(self, device: torch.device, network: bool = True) -> None:
        """Load the float weights onto a device.

        Args:
            network: False leaves the network without weights, on the meta device, and everything else on the CPU until
                `move_to`: the network is then filled from a quantized file. ``weights`` is None where nothing was read.
        """
        raise NotImplementedError

    def move_to(self, device: torch.device) -> None:
        """Move what was loaded to another device."""
        raise NotImplementedError

    def conditions(self, rows: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the conditional and the unconditional context of images, each [N, L, D] or None, after `load`."""
        return None, None

    def precision(self) -> contextlib.AbstractContextManager:
        """Return the context in which sampling calls the network: autocast where half precision was asked for."""
        return contextlib.nullcontext()

    def sample(
        self,
        network: Network,
        rows: Sequence[int],
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run the sampler for the images numbered ``rows`` and return x_0 as the network knows it, [N, C, H, W].

        Args:
            network: float or quantized.
            calibration: draw from the calibration streams instead of the run's.
            on_call: told of every network call.
            on_step: told of every sampler step: (i, t, x, predicted x_0).
        """
        with self.precision():
            condition, unconditional = self.encoded or self.conditions(rows, calibration)
            return self.sampler(network, rows, self.device, condition, unconditional, calibration, on_call, on_step)

    def to_images(self, x_0: Tensor) -> Tensor:
        """Turn what `sample` returns into images [N, C, H, W] in [−1, 1]."""
        return x_0
