"""Which entry of a table of ranges belongs to a timestep: one rule for every sampler and number of steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qdiff.errors import UserError

# Share of a gap between calibrated timesteps by which a timestep may be off: devices differ in the last bits of the
# fractional ones.
TOLERANCE = 1e-3


class CalibratedTimesteps(nn.Module):
    """The timesteps that a network's ranges were calibrated at, and those of the batch that is in work.

    All quantizers of a network share one. A timestep takes the entry of the largest calibrated one that is not above
    it. If these are uniform, t_i = 1 + i·s, that is entry (t − 1)//s as in TFMQ-DM's latent samplers, whichever
    steps are sampled. Below the first and above the last, timesteps up to a gap away take that entry; others have none.

    Attributes:
        values: [T] float32, ascending; empty before calibration.
        rows: int64 [N] or [1], the entry of each sample of the batch; None outside of a call, and until it is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.empty(0))
        self.rows: Tensor | None = None
        self._called: Tensor | None = None  # the timesteps of a call of which no quantizer has asked for its range yet
        self._listed: list[float] = []  # the values, so that reading them does not wait for a GPU
        self._extremes: Tensor | None = None  # of the timesteps on a GPU that nobody has looked at yet

    def set(self, values: Tensor) -> None:
        """Set the calibrated timesteps, float [T], ascending."""
        self.values = values.to(self.values.device, torch.float32)
        self._listed = self.values.tolist()

    def entries(self, t: Tensor) -> Tensor:
        """Return the entry of each timestep, int64 in t's shape; see `check` for timesteps that have none."""
        gaps = self.values.diff()
        starts = self.values[1:] - TOLERANCE * gaps
        return (t.float()[..., None] >= starts).sum(dim=-1)

    def check(self, t: Iterable[float] | Tensor) -> None:
        """Raise a `UserError` for the first timestep that is more than a gap beyond the calibrated ones."""
        values = self._listed
        if len(values) < 2:  # one range for all timesteps
            return
        (low, second), (before, high), slack = values[:2], values[-2:], 1 + TOLERANCE
        for step in t.tolist() if isinstance(t, Tensor) else t:
            if not low - slack * (second - low) <= step <= high + slack * (high - before):
                raise UserError(
                    f"the network is called at timestep {step:g}, but its ranges per timestep were calibrated at "
                    f"{len(values)} timesteps from {low:g} to {high:g}; calibrate at more or at evenly spread steps "
                    "(--cali_spacing ends, or a --cali_st that divides the number of sampling steps), or leave out "
                    "--act_ranges"
                )

    @contextlib.contextmanager
    def at(self, t: Tensor) -> Iterator[None]:
        """Take the ranges of these timesteps inside the block: a call of the network, which may compute in float.

        Args:
            t: [N], or one for all samples.

        Raises:
            UserError: inside, where a quantizer asks for the range of a timestep that has none. On a GPU `check_seen`
                finds this, so that a call does not wait.
        """
        before = self.rows, self._called
        self.rows, self._called = None, t.detach().reshape(-1)
        try:
            yield
        finally:
            self.rows, self._called = before

    def _look_up(self, t: Tensor) -> None:
        if t.device.type == "cpu":
            self.check(t)
        else:
            seen = torch.stack(torch.aminmax(t.float()))
            if self._extremes is not None:
                seen = torch.stack(torch.aminmax(torch.cat([seen, self._extremes])))
            self._extremes = seen
        self.rows, self._called = self.entries(t.to(self.values.device)), None

    def check_seen(self) -> None:
        """Raise a `UserError` if a call on a GPU had a timestep without an entry; waits for the GPU."""
        seen, self._extremes = self._extremes, None
        if seen is not None:
            self.check(seen)

    def rows_of(self, x: Tensor) -> Tensor:
        """Return the entry of each row of a tensor, [M] or [1].

        Args:
            x: [M, …]; of M = k·N rows, each sample has k that follow one another. Any other M is a tensor that is the
                same for all samples.
        """
        if self._called is not None:
            self._look_up(self._called)
        if self.rows is None:
            raise RuntimeError("ranges per timestep need the timestep; call the whole network")
        each, rest = divmod(len(x), len(self.rows))
        if len(self.rows) == 1 or (each == 1 and rest == 0):
            return self.rows
        return self.rows[:1] if rest or each == 0 else self.rows.repeat_interleave(each)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CalibratedTimesteps:
        """Move the module; its values stay float32, because timesteps are compared with them."""
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        if (stored := state.get(f"{prefix}values")) is not None:
            self.values = torch.empty(len(stored), device=self.values.device)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)
        self._listed = self.values.tolist()


def checked_timesteps(values: Tensor) -> Tensor:
    """Return the calibrated timesteps of a file; raises a ValueError if they are not ascending float32 numbers."""
    if values.dtype != torch.float32 or values.dim() != 1 or len(values) == 0:
        raise ValueError("the calibrated timesteps are no list of numbers")
    if not torch.isfinite(values).all() or (values.diff() <= 0).any():
        raise ValueError("the calibrated timesteps are not in ascending order")
    return values


@contextlib.contextmanager
def watched(timesteps: CalibratedTimesteps | None) -> Iterator[None]:
    """Raise a `UserError` at the end of the block if a call inside had a timestep without an entry (`check_seen`)."""
    yield
    if timesteps is not None:
        timesteps.check_seen()


def at_timestep(timesteps: CalibratedTimesteps | None, inputs: Sequence[Tensor]) -> contextlib.AbstractContextManager:
    """Context for a call of a network with these inputs, t the second; a no-op without ranges per timestep.

    Raises:
        UserError: t is not among the inputs; or see `CalibratedTimesteps.at`.
    """
    if timesteps is None or len(timesteps.values) == 0:
        return contextlib.nullcontext()
    if len(inputs) < 2:
        raise UserError("ranges per timestep need t as the second argument of the network; pass it by position")
    return timesteps.at(inputs[1])
