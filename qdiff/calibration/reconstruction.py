"""The optimisation loop: fit a unit's rounding variables or step sizes to the unit's float output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from qdiff.adaptive_rounding import LearnedRounding
from qdiff.calibration.feeding import Feeding
from qdiff.calibration.layer_errors import LayerErrors
from qdiff.calibration.objectives import Objective
from qdiff.calibration.qdrop import Dropping
from qdiff.calibration.sample_timesteps import SampleTimesteps


@dataclass(frozen=True)
class RoundingRegulariser:
    """Pushes h(α) to 0 or 1: weight·Σ(1 − |2h − 1|^β), off during the warm-up; then β falls linearly.

    Attributes:
        weight: factor relative to the reconstruction error.
        warmup: share of the iterations before the term takes effect.
        beta: first and last β.
    """

    weight: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def __call__(self, roundings: Sequence[LearnedRounding], progress: float) -> Tensor | float:
        """Return the term at ``progress`` in [0, 1) of the iterations."""
        if progress < self.warmup:
            return 0.0
        share = (progress - self.warmup) / (1 - self.warmup)
        beta = self.beta[0] + (self.beta[1] - self.beta[0]) * share
        return self.weight * sum(r.regulariser(beta) for r in roundings)


@dataclass(frozen=True)
class FitSettings:
    """How a unit is fitted.

    Attributes:
        iterations: iterations per unit.
        batch_size: samples per iteration.
        lr_rounding: Adam's learning rate for α; None keeps the weights as they are.
        lr_act: Adam's learning rate for activation step sizes, at most `fitting.MAX_STEP_CHANGE` of each; None leaves
            activations in float.
        regulariser: pushes h(α) to 0 or 1; None rounds at the end only.
        decays: whether learning rates fall to 0 along a cosine.
        drop: probability that an element of the unit's input, or of an activation quantizer's output, stays float
            during an iteration (QDrop, Wei et al. 2022).
        layer_weight: γ, weight of the layers' own errors against the unit's (EDA-DM's fine-grained reconstruction).
        from_integers: roundings start at the layers' present integers, not at the float weights.
    """

    iterations: int
    batch_size: int
    lr_rounding: float | None = None
    lr_act: float | None = None
    regulariser: RoundingRegulariser | None = None
    decays: bool = False
    drop: float = 0.0
    layer_weight: float = 0.0
    from_integers: bool = False


@dataclass
class Unit:
    """A block or layer with everything that the optimisation loop needs.

    Attributes:
        name: dotted path in the network.
        module: the module to run, its leaves in the mode that is to be fitted.
        inputs: positional inputs for all N samples, quantized upstream; each [N, …], on the storage's device.
        target: the float output [N, …].
        float_inputs: the same inputs in the float network.
        weights: weights of the errors in the objective, [N, …]; None for objectives without weights.
        timesteps: of the samples, for ranges per timestep; None without such ranges.
        on_advance: called with the quantized output [N, …] when the walk advances past the unit; None for nothing.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    float_inputs: tuple[Tensor, ...]
    weights: Tensor | None = None
    timesteps: SampleTimesteps | None = None
    on_advance: Callable[[Tensor], None] | None = None


def optimise(
    unit: Unit,
    optimiser: torch.optim.Optimizer,
    objective: Objective,
    settings: FitSettings,
    generator: torch.Generator,
    feeding: Feeding,
    *,
    penalty: Callable[[float], Tensor | float] = lambda progress: 0.0,
    after_step: Callable[[], None] = lambda: None,
    on_iteration: Callable[[], None] = lambda: None,
) -> float:
    """Minimise ``objective + layer_weight · layer errors + penalty`` over random batches.

    Args:
        optimiser: holds the learned parameters with the learning rates of ``settings``.
        settings: see `FitSettings`.
        penalty: extra loss at a given share of the iterations (rounding regulariser).
        after_step: called after each optimiser step (to keep step sizes positive).
        generator: decides the batches.
        feeding: where the unit runs, and how its samples get there; gradients of a batch accumulate over its passes.

    Returns:
        The mean objective over the last tenth of the iterations.
    """
    device, tail, iterations, drop = feeding.device, [], settings.iterations, settings.drop
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=iterations) if settings.decays else None
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        dropping = stack.enter_context(Dropping(unit.module, drop, generator, device)) if drop > 0 else None
        layers = LayerErrors(unit.module) if settings.layer_weight > 0 else None
        batches = random_batches(len(unit.target), settings.batch_size, iterations, generator)
        counts, inputs_count = feeding.pass_counts(batches.shape[1]), len(unit.inputs)
        float_inputs = unit.float_inputs if dropping is not None or layers is not None else ()
        weights = () if unit.weights is None else (unit.weights,)
        entries = () if unit.timesteps is None else (unit.timesteps.of_rows(len(unit.target)),)
        samples = feeding.passes((unit.target, *unit.inputs, *float_inputs, *weights, *entries), batches)
        stack.enter_context(contextlib.closing(samples))
        for iteration in range(iterations):
            optimiser.zero_grad(set_to_none=True)
            error, extra = torch.zeros((), device=device), penalty(iteration / iterations)
            for count in counts:
                target, *rest = next(samples)
                if entries:
                    unit.timesteps.take(rest.pop())
                weight = rest.pop() if weights else None
                inputs, in_float = tuple(rest[:inputs_count]), tuple(rest[inputs_count:])
                if dropping is not None:
                    inputs = dropping.feed(inputs, in_float)
                with layers.watch(in_float) if layers is not None else contextlib.nullcontext():
                    output = unit.module(*inputs)
                # Objectives are means over samples, so each pass counts in proportion to its size.
                share = objective(output, target, weight) * (count / batches.shape[1])
                if layers is not None:
                    share = share + settings.layer_weight * layers.error() * (count / batches.shape[1])
                (share + extra).backward()
                error, extra = error + share.detach(), 0.0
            optimiser.step()
            after_step()
            if cosine is not None:
                cosine.step()
            if iteration >= iterations - max(1, iterations // 10):
                tail.append(error)
            on_iteration()
    return float(torch.stack(tail).mean()) if tail else float("nan")


def random_batches(count: int, size: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Return random rows [iterations, size]; each epoch uses every sample once, and a batch may span two epochs."""
    return torch.stack(list(islice(_batches(count, min(size, count), generator), iterations)))


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]
