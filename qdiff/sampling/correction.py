"""Correct a quantized network's noise prediction while sampling: one affine map per network call.

The error that the map leaves is random, and a sampler that adds noise adds that much less (`noise_std`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import sqrt

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.sampling.interface import NoisePrediction


@dataclass(frozen=True, eq=False)
class NoiseCorrection:
    """ε' = scale·ε̂ + shift at every network call of a sampling run, ε̂ after guidance.

    Attributes:
        times: the timestep of each call, in the order of the calls.
        scale, shift: float64 [calls, C], or [calls, 1] for one value for all channels.
        error_std: standard deviation of the error of ε', likewise.

    Raises:
        UserError: a table has another shape, or a value that is not finite, or a standard deviation is negative.
    """

    times: tuple[float, ...]
    scale: Tensor
    shift: Tensor
    error_std: Tensor

    def __post_init__(self) -> None:
        for name in self.table_names():
            table = getattr(self, name)
            if table.dim() != 2 or table.shape != self.scale.shape or len(table) != len(self.times):
                raise UserError(
                    f"a noise correction has {name} of shape {tuple(table.shape)} for {len(self.times)} network calls; "
                    "collect it again"
                )
            if not bool(torch.isfinite(table).all()):
                raise UserError(f"a noise correction has {name} that is not finite; collect it again")
        if bool((self.error_std < 0).any()):
            raise UserError("a noise correction has error_std that is negative; collect it again")

    @classmethod
    def table_names(cls) -> list[str]:
        """Return the names of the tables."""
        return [f.name for f in fields(cls) if f.name != "times"]

    def applied_to(self, eps: NoisePrediction) -> NoisePrediction:
        """Return ε' for one sampling run; the calls are counted, because reading t would make the host wait for a GPU.

        Raises:
            UserError: while sampling, if the tables have no entry for a call.
        """
        maps: list[tuple[Tensor, Tensor]] = []
        calls = 0

        def corrected(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            found = eps(x, t)
            if not maps:
                maps.extend(zip(per_channel(self.scale, found), per_channel(self.shift, found), strict=True))
            if calls == len(maps):
                raise UserError(
                    f"the noise correction has entries for {len(maps)} network calls but the sampler makes more; "
                    "collect it with this sampler"
                )
            scale, shift = maps[calls]
            calls += 1
            return scale * found + shift

        return corrected


def per_channel(table: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of a table [calls, C] as [C, 1, 1] on the device of ``like``, in float32 or its wider dtype."""
    table = table.to(torch.promote_types(like.dtype, torch.float32))
    if like.is_cuda:
        table = table.pin_memory()  # from there the host need not wait for the copy
    return table.to(like.device, non_blocking=True)[:, :, None, None].unbind()


def noise_std(
    variances: Sequence[float], eps_weights: Sequence[float], error_std: Tensor | None, like: Tensor
) -> Sequence[float | Tensor]:
    """Return the standard deviation of the noise that each step adds: √max(σ² − c²·s², 0).

    The part of ε's error that no correction predicts reaches the next state as noise of variance c²·s². Where that
    exceeds σ², nothing is added and the excess stays.

    Args:
        variances: σ² of each step.
        eps_weights: c, the weight of ε in the next state, of each step.
        error_std: s, [steps, C] or [steps, 1]; None is 0.
        like: a state of the run [N, C, H, W].

    Returns:
        Per step a number, or with ``error_std`` a tensor [C or 1, 1, 1].

    Raises:
        UserError: ``error_std`` is for another number of steps.

    Source: He et al. 2023, "PTQD" (arXiv 2305.10657), section 3.3, with σ in the direction term left as it is.
    """
    if error_std is None:
        return [sqrt(variance) for variance in variances]
    if len(error_std) != len(variances):
        raise UserError(
            f"error_std has {len(error_std)} rows for {len(variances)} sampling steps; give it one for each step"
        )
    left = torch.tensor(variances, dtype=torch.float64)[:, None]
    taken = torch.tensor(eps_weights, dtype=torch.float64)[:, None] * error_std
    return per_channel((left - taken.square()).clamp(min=0.0).sqrt(), like)
