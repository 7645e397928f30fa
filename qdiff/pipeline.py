"""The interface of a model family: a float network with its sampler, conditions and decoder in one object."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.errors import UserError, require_at_least
from qdiff.interface import SteppedNetwork
from qdiff.io.diffusers_files import MakeComponent, component_of
from qdiff.ranges.estimators import RangeMethod
from qdiff.sampling import Correction, Network, OnCall, OnStep, Sampler, find_sampler


def trajectory_of(network: Network) -> contextlib.AbstractContextManager:
    """Context for sampling one batch: the network's `trajectory()`, or a no-op."""
    return network.trajectory() if hasattr(network, "trajectory") else contextlib.nullcontext()


class Pipeline:
    """A float diffusion model and its sampler. Each family derives its own, with a ``from_args`` for its scripts.

    The constructor reads configs and checks numbers; only `load` reads weights and data and uses the device.

    Args:
        name: name of the default run folder.
        sampler: samples the images or their latents.
        count: number of images per run, at least 1.
        batch_size: images per batch, at least 1.

    Attributes:
        config: everything besides quantization and seed that decides the images, as JSON values.
        weight_range, act_range: the default range methods of the family's scripts.
        conditional: whether the network takes a context.
        labels: the requested class of each image, if known.
        runs: parent folder of the default run folders.
        eda_dm: EDA-DM's values for this model by option name, from the config's section of that name.
        notes: sentences for the user; `load` may add some.
        precision_name: the precision in which the network is called, ``full`` or ``autocast``; None if there is no
            choice.
        encoded: precomputed `conditions` of the images that `sample` is called for, which need no `load`; None
            computes them.
        network, weights: set by `load`.
        device: the device that sampling runs on; the CPU until `load` or `move_to`.

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
        """Network calls per image."""
        return self.sampler.calls

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""
        return self.sampler.shape

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(L, D) of the network's context, after `load`; None if it takes none."""
        return None

    @property
    def training_steps(self) -> int:
        """T, the number of training timesteps; the network takes timesteps below T."""
        return self.sampler.schedule.num_train

    def note_steps(self, option: str) -> None:
        """Add a note if the sampler takes a different number of steps than an option requests."""
        asked, taken = self.sampler.options.steps, len(self.sampler.timesteps)
        row = find_sampler(self.sampler.options.kind)
        if row.takes_all and asked != taken:
            self.notes.append(f"{option} {asked} has no effect: {row.title} takes {taken} steps")
        elif asked != taken and not row.places_steps:
            self.notes.append(
                f"{option} {asked} does not divide the {self.training_steps} training steps: {taken} steps are taken, "
                "as in the published samplers"
            )

    def check_modulation(self, quant: QuantConfig) -> None:
        """Raise a `UserError` if a modulated network would be sampled in a single step."""
        if quant.modulate and self.calls < 2:
            raise UserError("--modulate quantizes changes between steps but this sampler has one step; give more")

    def probe(self) -> tuple[Tensor, ...]:
        """Return two inputs of the network, (x, t[, context]), after `load`: noise at t = T/2 and real conditions."""
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(2, *self.input_shape, generator=generator), torch.full((2,), self.training_steps // 2)
        condition, _ = self.conditions([0, 1], calibration=True)
        return (x, t) if condition is None else (x, t, condition)

    def build_network(self) -> tuple[SteppedNetwork, tuple[int, int] | None]:
        """Return the network on the meta device and the (L, D) of its context; no files are read."""
        raise NotImplementedError

    def load(self, device: torch.device, network: bool = True) -> None:
        """Load the float weights onto a device.

        Args:
            network: False leaves the network without weights on the meta device, and everything else on the CPU until
                `move_to`; the network is then filled from a quantized file. ``weights`` is None if no file was read.
        """
        raise NotImplementedError

    def move_to(self, device: torch.device) -> None:
        """Move everything that was loaded to another device."""
        raise NotImplementedError

    def conditions(self, rows: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the conditional and the unconditional context of images, each [N, L, D] or None, after `load`."""
        return None, None

    def under_own_names(self, qnn: nn.Module) -> nn.Module:
        """Return the quantized network under the names that its layers have in files of other programs."""
        return qnn

    def precision(self) -> contextlib.AbstractContextManager:
        """Return the context in which sampling calls the network: autocast if half precision was requested."""
        return contextlib.nullcontext()

    def sample(
        self,
        network: Network,
        rows: Sequence[int],
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
        correction: Correction | None = None,
    ) -> Tensor:
        """Run the sampler for the images numbered ``rows`` and return x_0 in the network's space, [N, C, H, W].

        Args:
            network: float or quantized.
            calibration: use the calibration streams instead of the run's.
            on_call: called for every network call.
            on_step: called after every sampler step with (i, t, x, predicted x_0).
            correction: see `qdiff.sampling.NoiseCorrection`.
        """
        with self.precision():
            condition, unconditional = self.encoded or self.conditions(rows, calibration)
            context = condition, unconditional
            return self.sampler(network, rows, self.device, *context, calibration, on_call, on_step, correction)

    def sample_latents(self, network: Network, rows: Sequence[int]) -> Tensor:
        """Run the sampler for images of the calibration stream and return what its last step returns, not decoded.

        No step leaves torch, so that the result has gradients if the network's outputs have.
        """
        return self.sample(network, rows, calibration=True)

    def with_steps(self, steps: int) -> Pipeline:
        """Return this pipeline with a sampler of so many steps and much the same result; both share their network."""
        made = copy.copy(self)
        made.sampler = self.sampler.with_steps(steps)
        return made

    def to_images(self, x_0: Tensor) -> Tensor:
        """Turn the result of `sample` into images [N, C, H, W] in [−1, 1]."""
        return x_0

    def write_diffusers(self, folder: str | Path, make_unet: MakeComponent = component_of) -> str:
        """Load the float weights and write the model as the folder of a pipeline of the diffusers library.

        Args:
            make_unet: makes diffusers' network from ours, e.g. a quantized one.

        Returns:
            A line that describes the folder.

        Raises:
            UserError: the library is missing or has no such network, or the folder is not empty or cannot be written.
        """
        raise UserError(f"there is no diffusers pipeline for {self.name}; its family has no write_diffusers")
