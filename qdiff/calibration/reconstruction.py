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


@dataclass(frozen=True)
class RoundingRegulariser:
    """Pushes h(α) to 0 or 1: weight·Σ(1 − |2h − 1|^β), off for the warm-up, then β falls linearly.

    Attributes:
        weight: factor against the reconstruction error.
        warmup: share of the iterations without it.
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
        iterations, batch_size: of the loop.
        lr_rounding: Adam's learning rate for α; None leaves the weights as they are.
        lr_act: Adam's learning rate for activation step sizes, at most `fitting.MAX_STEP_CHANGE` of each; None leaves
            activations in float.
        regulariser: pushes α to a decision; None decides at the end alone.
        decays: learning rates fall to 0 as a cosine.
        drop: probability that an element of the unit's input, and of what an activation quantizer passes on, stays
            in float during an iteration (QDrop, Wei et al. 2022).
        layer_weight: γ of the layers' own errors beside the unit's (EDA-DM's fine-grained reconstruction).
    """

    iterations: int
    batch_size: int
    lr_rounding: float | None = None
    lr_act: float | None = None
    regulariser: RoundingRegulariser | None = None
    decays: bool = False
    drop: float = 0.0
    layer_weight: float = 0.0


@dataclass
class Unit:
    """A block or a layer with everything the loop needs.

    Attributes:
        name: dotted path in the network.
        module: what is run, its leaves in the mode that is to be fitted.
        inputs: positional inputs for all N samples, quantized upstream; each [N, …], where the storage put them.
        target: the float output [N, …].
        float_inputs: the inputs in the float network.
        weights: what the objective weighs the samples' errors by, [N, …]; None where it weighs none.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    float_inputs: tuple[Tensor, ...]
    weights: Tensor | None = None


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
    """Minimise ``objective + layer_weight · the layers' own errors + penalty`` over random batches.

    Args:
        optimiser: of what is learned, with the learning rates of ``settings``.
        settings: see `FitSettings`.
        penalty: extra loss at a given share of the iterations (the rounding regulariser).
        after_step: called after each optimiser step (to keep step sizes positive).
        generator: decides the batches.
        feeding: where the unit runs, and how its samples come there; gradients of a batch add up over its passes.

    Returns:
        The mean objective over the last tenth of the iterations.
    """
    device, tail, iterations, drop = feeding.device, [], settings.iterations, settings.drop
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=iterations) if settings.decays else None
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        dropping = stack.enter_context(Dropping(unit.module, drop, generator, device)) if drop > 0 else None
        layers = LayerErrors(unit.module) if settings.layer_weight > 0 else None
        batches = torch.stack(list(islice(_batches(len(unit.target), settings.batch_size, generator), iterations)))
        counts, inputs_count = feeding.pass_counts(batches.shape[1]), len(unit.inputs)
        float_inputs = unit.float_inputs if dropping is not None or layers is not None else ()
        weights = () if unit.weights is None else (unit.weights,)
        samples = feeding.passes((unit.target, *unit.inputs, *float_inputs, *weights), batches)
        stack.enter_context(contextlib.closing(samples))
        for iteration in range(iterations):
            optimiser.zero_grad(set_to_none=True)
            error, extra = torch.zeros((), device=device), penalty(iteration / iterations)
            for count in counts:
                target, *rest = next(samples)
                weight = rest.pop() if weights else None
                inputs, in_float = tuple(rest[:inputs_count]), tuple(rest[inputs_count:])
                if dropping is not None:
                    inputs = dropping.feed(inputs, in_float)
                with layers.watch(in_float) if layers is not None else contextlib.nullcontext():
                    output = unit.module(*inputs)
                # Objectives are means over samples.
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


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield random rows without end; within a pass every sample comes up once, the remainder of a batch included."""
    size = min(size, count)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]
