"""What every method needs: where calibration runs, the loop over units, and the check that all quantizers are set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qdiff.calibration.feeding import Feeding
from qdiff.calibration.fitting import UnitKind, fit_unit, parts_of
from qdiff.calibration.footprint import Footprint
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.memory_plan import DEFAULT_PASS
from qdiff.calibration.objectives import Objective
from qdiff.calibration.reconstruction import FitSettings, Unit
from qdiff.calibration.sample_timesteps import prepare_timesteps
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker, walk
from qdiff.config import Ablation
from qdiff.interface import State, SteppedNetwork
from qdiff.io.progress import Progress, progress_bar
from qdiff.quant_model import QuantModel


@dataclass
class CalibrationRun:
    """The setting in which one calibration runs.

    Attributes:
        seed: fixes the result.
        weights: False keeps the loaded weights (``--resume_w``).
        storage: keeps activations within a memory budget.
        journal: finished units on disk; None keeps nothing.
        show_progress: show a progress bar with the time left, on stderr.
        errors: the final reconstruction error of every fitted unit; filled in by the method.
        footprint: memory per sample; None sets no limit.
        pass_bytes: the budget for one pass.
        resident_bytes: GPU memory that a unit's samples may occupy while it is fitted.
    """

    seed: int = 0
    weights: bool = True
    storage: ActivationStorage = field(default_factory=ActivationStorage)
    journal: CalibrationJournal | None = None
    show_progress: bool = True
    errors: dict[str, float] = field(default_factory=dict)
    footprint: Footprint | None = None
    pass_bytes: int = DEFAULT_PASS
    resident_bytes: int = 0

    def walker(self, qnn: QuantModel, inputs: tuple[Tensor, ...]) -> Walker:
        """Return what runs modules over a calibration set; ranges per timestep get its timesteps.

        Args:
            inputs: the network's inputs for all samples.
        """
        size = Walker.pass_size
        if self.footprint is not None:
            size = self.footprint.forward_batch(self.pass_bytes, size)
        timesteps = prepare_timesteps(qnn, inputs, self.storage.device)
        return Walker(self.storage, qnn.device, timesteps=timesteps, pass_size=size)

    def feeding(self, qnn: QuantModel, step: str, batch_size: int) -> Feeding:
        """Return how a step's samples get to the network's device, at most as many at a time as fit in a pass."""
        size = batch_size
        if self.footprint is not None:
            size = self.footprint.training_batch(step, self.pass_bytes, batch_size)
        return Feeding(qnn.device, size, self.resident_bytes)

    def generator(self, *place: int) -> torch.Generator:
        """Return a generator for one unit that does not depend on earlier units, so resuming changes nothing."""
        seed = self.seed
        for number in place:
            seed = seed * 1009 + number + 1
        return torch.Generator().manual_seed(seed % (1 << 63))

    def fits_weights(self, qnn: QuantModel) -> bool:
        """Whether this calibration quantizes the weights."""
        return self.weights and qnn.config.weight_bits is not None

    def progress(self, network: SteppedNetwork, iterations: int, title: str = "calibrating") -> Progress:
        """Return a progress bar with ``iterations`` per unit of a network."""
        units = sum(step.is_unit for step in network.steps())
        return progress_bar(units * iterations, title, disable=not self.show_progress)


@dataclass(frozen=True)
class Phase:
    """One walk over the network in which units are fitted.

    Attributes:
        name: names the journal's files.
        number: distinguishes the phase's random generators from those of other phases.
        iterations: iterations per unit, for the progress bar.
        activations: quantize activations when computing a unit's inputs.
        has_work: whether a module has anything to fit.
        label: prefix of the names of the phase's units.
        weights: quantize weights when computing a unit's inputs; without either, these are the float network's.
    """

    name: str
    number: int
    iterations: int
    activations: bool
    has_work: Callable[[nn.Module], bool] = lambda module: True
    label: str = ""
    weights: bool = True


class OpenUnit:
    """The unit that is to be fitted now.

    Attributes:
        index: index of the step in execution order.
        unit: the whole step, as `walk` yields it.
        state: the quantized state before the step.
        walker: the walk's walker.
        errors: of its parts that were fitted or measured, by name.
    """

    def __init__(
        self,
        index: int,
        unit: Unit,
        state: State,
        walker: Walker,
        phase: Phase,
        qnn: QuantModel,
        run: CalibrationRun,
        bar: Progress,
    ) -> None:
        self.index, self.unit, self.state, self.walker = index, unit, state, walker
        self._phase, self._qnn, self._run, self._bar = phase, qnn, run, bar
        self._places: dict[int, tuple[int, float]] = {}  # per part, by identity
        self.errors: dict[str, float] = {}

    def parts(self, kind: UnitKind, wrap: Callable[[nn.Module], nn.Module] = lambda leaf: leaf) -> Iterator[Unit]:
        """Yield the parts to fit in turn: the whole step, or its layers in execution order; see `parts_of`."""
        parts = parts_of(self.unit, kind, self.walker, activations=self._phase.activations, wrap=wrap)
        for number, (part, share) in enumerate(parts):
            self._places[id(part)] = number, share
            if self._phase.has_work(part.module):
                yield part

    def fit(self, part: Unit, objective: Objective, settings: FitSettings) -> None:
        """Fit one of the parts in place and record its error."""
        number, share = self._places[id(part)]
        error = fit_unit(
            part,
            objective,
            settings,
            self._run.generator(self._phase.number, self.index, number),
            self._run.feeding(self._qnn, self.unit.name, settings.batch_size),
            partial(self._bar.update, share),
        )
        self.errors[self._phase.label + part.name] = error

    def measure(self, objective: Objective) -> None:
        """Measure the whole step's error, and record it, as the walk advances past; for methods that do not iterate."""
        self.unit.on_advance = partial(self._measure, objective)

    @torch.no_grad()
    def _measure(self, objective: Objective, output: Tensor) -> None:
        total, target = 0.0, self.unit.target
        for rows in self.walker.slices(len(target)):
            found, wanted = self.walker.load((output, target), rows)
            total += objective(found, wanted, None) * len(found)
        self.errors[self._phase.label + self.unit.name] = float(total / len(target))
        self.record()

    def record(self) -> None:
        """Keep the finished unit and its errors."""
        self._run.errors |= self.errors
        if self._run.journal is not None:
            self._run.journal.record(self._phase.name, self.index, self.unit.module, self.errors)


def units_to_fit(
    qnn: QuantModel,
    network: SteppedNetwork,
    inputs: tuple[Tensor, ...],
    phase: Phase,
    run: CalibrationRun,
    bar: Progress,
) -> Iterator[OpenUnit]:
    """Walk over a network and yield the units that are still to be fitted, in execution order: every method's loop.

    Units that the journal holds are restored instead; a fitted unit is recorded when control returns, and one whose
    error is measured as the walk advances past it.

    Args:
        network: the network whose steps are walked over, ``qnn.model`` or a view of it.
        inputs: inputs of the network for all samples.
    """
    walker = run.walker(qnn, inputs)
    steps = walk(network, inputs, walker, weights=phase.weights, activations=phase.activations)
    for index, _, unit, state in steps:
        bar.set_postfix_str(f"{phase.name} of {unit.name}" if phase.label else unit.name, refresh=False)
        before = bar.n
        if phase.has_work(unit.module):
            found = None if run.journal is None else run.journal.restore(phase.name, index, unit.module)
            if found is None:
                opened = OpenUnit(index, unit, state, walker, phase, qnn, run, bar)
                yield opened
                if unit.on_advance is None:  # else it is recorded once its error is measured
                    opened.record()
            else:
                run.errors |= found
        bar.update(phase.iterations - (bar.n - before))  # iterations that were not counted one by one


def init_weights(qnn: QuantModel) -> None:
    """Choose the ranges of all weights and round to nearest; does nothing if weights stay in float."""
    if qnn.config.weight_bits is None:
        return
    for layer in qnn.layers().values():
        if len(layer.weight_quantizers) > 0:
            layer.init_weight_ranges(qnn.config.weight_range)


@torch.no_grad()
def assert_all_fired(qnn: QuantModel, data: CalibrationSet, batch: int = 4, activations: bool = True) -> None:
    """Check on a few samples that every quantizer is set and takes part in a forward pass.

    Args:
        activations: False checks only the weights, because the ranges of changes are calibrated after them.

    Raises:
        RuntimeError: a quantizer did nothing, or the output is not finite (a defect of the wrapping, not of the data).
    """
    qnn.reset_fired()
    inputs = tuple(i[:batch].to(qnn.device) for i in data.inputs)
    with qnn.quantized(weights=True, activations=activations), qnn.trajectory():
        output = qnn(*inputs)
        if qnn.config.modulate:  # the first step has no change to quantize
            output = qnn(*inputs)
    shows = activations and qnn.config.ablation is not Ablation.CLEARED_STATE  # this ablation silences them on purpose
    silent = qnn.silent_quantizers() if shows else []
    if silent:
        raise RuntimeError(f"{len(silent)} activation quantizers never fired, e.g. {silent[0]}")
    if not torch.isfinite(output).all():
        raise RuntimeError("the quantized network's output is not finite after calibration")
