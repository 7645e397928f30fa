"""What a model family offers the commands: a float network, its sampler, and recordings of what that feeds it."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qdiff.calibration.recording import OnCall, assign, record_assigned, record_calls, record_features
from qdiff.calibration.tdac import Allocation, tdac
from qdiff.calibration.timesteps import Draw, Schedule, evenly_spaced, normal_counts, uniform_counts
from qdiff.config import QuantConfig, RangeMethod
from qdiff.errors import UserError
from qdiff.interface import SteppedNetwork, family_of
from qdiff.io.progress import progress_bar

# TDAC compares features of one batch; those of more images than this say the same and fill the memory.
LOOKED_AT = 64

Network = Callable[..., Tensor]
OnStep = Callable[[int, float, Tensor, Tensor], None]


def trajectory_of(network: Network) -> contextlib.AbstractContextManager:
    """Context for sampling one batch: the network's `trajectory()`, or a no-op."""
    return network.trajectory() if hasattr(network, "trajectory") else contextlib.nullcontext()


class FloatModel:
    """A float diffusion model and its sampler, as a command's options name them: what a family offers the commands.

    Construction reads configs and checks numbers; weights, data and device are touched by `load`.

    Attributes:
        args: the options.
        name: of the default run folder.
        config: what decides the images besides quantization, JSON values.
        count: how many images the command makes.
        batch_size: images at a time.
        weight_range, act_range: what the family's scripts take by default.
        conditional: the network takes a context.
        labels: the class that each image was asked for, where that is known.
        runs: folder of the default run folders.
        eda_dm: EDA-DM's values for this model by option name, of its config's section of that name.
        notes: sentences that the user should read; `load` may add some.
        encoded: `conditions` of the images that `trajectory` is asked for, where that is known: it then needs no
            `load`. None encodes them.
        network, weights: after `load`.
        device: where sampling runs; the CPU until `load` or `move_to`.
    """

    name: str
    config: dict[str, Any]
    count: int
    batch_size: int
    weight_range = RangeMethod.MSE
    act_range = RangeMethod.MSE
    conditional = False
    labels: list[int] | None = None
    runs = Path("runs")
    eda_dm: Mapping[str, Any] = MappingProxyType({})
    encoded: tuple[Tensor | None, Tensor | None] | None = None
    network: SteppedNetwork
    weights: Path | None = None
    device = torch.device("cpu")

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.notes: list[str] = []
        if args.seed < 0:
            raise UserError(f"--seed is {args.seed}; give 0 or more")
        if getattr(args, "batch_size", None) is not None and args.batch_size < 1:
            raise UserError(f"--batch_size is {args.batch_size}; give at least 1")

    @property
    def calls(self) -> int:
        """How often one image's sampling calls the network."""
        raise NotImplementedError

    def note_steps(self, option: str, asked: int, taken: int, training_steps: int) -> None:
        """Add a note where a sampler takes another number of steps than an option asks for."""
        if asked != taken:
            self.notes.append(
                f"{option} {asked} does not divide the {training_steps} training steps: {taken} steps are taken, as by "
                "the published samplers"
            )

    def check_modulation(self, quant: QuantConfig) -> None:
        """Raise a `UserError` where a network that modulates would be sampled in one step."""
        if quant.modulate and self.calls < 2:
            raise UserError("--modulate is about changes from step to step, and this sampler has one; give it more")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""
        raise NotImplementedError

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """[L, D] of the context that the network is fed, after `load`; None where it takes none."""
        return None

    @property
    def training_steps(self) -> int:
        """T, how many timesteps the model was trained with: the network is fed those below it."""
        raise NotImplementedError

    def probe(self) -> tuple[Tensor, ...]:
        """Return two inputs of the network, (x, t[, context]), after `load`: noise at t = T/2, and real conditions."""
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(2, *self.input_shape, generator=generator), torch.full((2,), self.training_steps // 2)
        condition, _ = self.conditions([0, 1], calibration=True)
        return (x, t) if condition is None else (x, t, condition)

    def build_network(self) -> tuple[SteppedNetwork, tuple[int, ...] | None]:
        """Return the network on the meta device, and the [L, D] of its context: shapes without files."""
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

    def conditions(self, indices: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the conditional and the unconditional context of images, each [N, L, D] or None, after `load`."""
        return None, None

    def trajectory(
        self,
        network: Network,
        indices: Sequence[int],
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run the sampler for the images numbered ``indices`` and return x_0 as the network knows it, [N, C, H, W].

        Args:
            network: ε(x, t[, context]), float or quantized.
            calibration: draw from the calibration streams instead of the run's.
            on_call: told of every network call.
            on_step: told of every sampler step: (i, t, x, predicted x_0).
        """
        raise NotImplementedError

    def precision(self) -> contextlib.AbstractContextManager:
        """Return the context in which sampling calls the network: autocast where half precision was asked for."""
        return contextlib.nullcontext()

    def to_images(self, x_0: Tensor) -> Tensor:
        """Turn what `trajectory` returns into images [N, C, H, W] in [−1, 1]."""
        return x_0

    def recorded_calls(self, steps: int, pairs: bool) -> list[int]:
        """Return which calls of a sampling run `record` keeps, counted from 0 (the noisiest).

        Raises:
            UserError: there are fewer.
        """
        if not pairs:
            return evenly_spaced(self.calls, steps)
        if self.calls < 2:
            raise UserError("pairs of steps cannot be recorded from a sampler of one step; give it more")
        if steps >= self.calls:  # the first has none before it
            raise UserError(
                f"--cali_st {steps} with the step before each needs more than the {self.calls} steps of this sampler; "
                f"give --cali_st {self.calls - 1} or less"
            )
        return [call + 1 for call in evenly_spaced(self.calls - 1, steps)]

    @torch.no_grad()
    def record(
        self, steps: int, per_step: int, first: int = 0, show_progress: bool = True, pairs: bool = False
    ) -> dict[str, Tensor]:
        """Record the network's inputs at evenly spaced calls, from image ``first`` of the calibration streams.

        Args:
            pairs: record ``xs_prev`` and ``ts_prev`` too, the call before each.
        """
        calls = self.recorded_calls(steps, pairs)
        kept = sorted({*calls, *(call - 1 for call in calls)}) if pairs else calls
        with progress_bar(total=per_step, desc="recording", unit="img", disable=not show_progress) as bar:
            recorded = record_calls(
                lambda on_call, rows: self.trajectory(
                    self.network, [first + i for i in rows], calibration=True, on_call=on_call
                ),
                per_step,
                self.batch_size,
                kept,
                on_batch=bar.update,
            )
        if not pairs:
            return recorded
        here, before = ([kept.index(call + shift) for call in calls] for shift in (0, -1))
        return {key: values[here] for key, values in recorded.items()} | {
            f"{key}_prev": recorded[key][before] for key in ("xs", "ts")
        }

    @torch.no_grad()
    def record_draw(
        self, draw: Draw, seed: int, first: int = 0
    ) -> tuple[dict[str, list[Tensor]], Allocation | None, list[float]]:
        """Record one network input per image, at the step that a draw's schedule chooses for it.

        Args:
            seed: decides which image gives its sample at which step.
            first: image of the calibration streams to begin at.

        Returns:
            The recording; TDAC's allocation, or None with another schedule; and the timesteps of the sampler's calls.
        """
        generator = torch.Generator().manual_seed(seed)
        timesteps: list[float] = []

        def sample(on_call: OnCall, rows: Sequence[int]) -> Tensor:
            def listen(x: Tensor, t: Tensor, *conditions: Tensor | None) -> None:
                timesteps.append(float(t[0]))
                on_call(x, t, *conditions)

            timesteps.clear()
            return self.trajectory(self.network, [first + i for i in rows], calibration=True, on_call=listen)

        allocation = None
        if draw.schedule is Schedule.TDAC:
            middle = family_of(self.network).middle
            if middle is None:
                raise UserError(f"the middle of {type(self.network).__name__} is not known, which TDAC looks at")
            features = record_features(sample, self.network, middle, range(min(draw.batch_size, draw.count, LOOKED_AT)))
            allocation = tdac(features, draw.radius, draw.lamda, draw.count)
            counts = allocation.counts
        elif draw.schedule is Schedule.NORMAL:
            counts = normal_counts(self.calls, draw.count, generator)
        else:
            counts = uniform_counts(self.calls, draw.count)
        with progress_bar(total=draw.count, desc="recording", unit="img") as bar:
            recording = record_assigned(sample, assign(counts, generator), draw.batch_size, on_batch=bar.update)
        return recording, allocation, list(timesteps)
