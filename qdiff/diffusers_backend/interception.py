"""Functions in the place of a pipeline's own while its loop runs."""

from __future__ import annotations

import contextlib
import copy
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from qdiff.errors import UserError, first_line

UNIFORM = "give --uniform_widths (in Python uniform_widths=True)"
"""What helps where a loop cannot be followed."""


class Reached(Exception):
    """Ends a pipeline's loop where what is wanted from it is there."""


@contextlib.contextmanager
def intercepted(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Call ``function`` in the place of a module's forward; calls that it makes itself reach the module."""
    before, inside = module.forward, False

    def forward(*args: Any, **keywords: Any) -> Any:
        nonlocal inside
        if inside:
            return before(*args, **keywords)
        inside = True
        try:
            return function(*args, **keywords)
        finally:
            inside = False

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def refusals_told(pipe: Any) -> Iterator[None]:
    """Turn what diffusers' own code refuses inside the block, as a scheduler that does not suit, into a `UserError`.

    Errors that are raised anywhere else, by a network of ours for example, are left as they are.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__")).startswith("diffusers."):
            raise
        scheduler = type(getattr(pipe, "scheduler", None)).__name__
        raise UserError(
            f"{type(pipe).__name__} does not run with {scheduler} and these options ({first_line(error)}); give "
            "another --scheduler, another number of --steps, or other options"
        ) from error


@contextlib.contextmanager
def ended_at_a_step(pipe: Any, is_last: Callable[[], bool]) -> Iterator[list[Tensor]]:
    """End a pipeline's loop, inside the block, after the first step of its scheduler for which ``is_last`` says so.

    A copy of the scheduler takes the steps, because schedulers keep tensors of earlier ones, with their gradients.

    Yields:
        A list that holds the next sample of that step afterwards; it stays empty if there was none, or no scheduler.
    """
    made: list[Tensor] = []
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        yield made
        return
    taking = copy.copy(scheduler)
    step = taking.step

    @functools.wraps(step)  # pipelines look at its parameters
    def stepped(*args: Any, **keywords: Any) -> Any:
        after = step(*args, **keywords)
        if is_last():
            made.append(after[0])
            raise Reached
        return after

    taking.step = stepped
    pipe.scheduler = taking
    try:
        with contextlib.suppress(Reached):
            yield made
    finally:
        pipe.scheduler = scheduler
