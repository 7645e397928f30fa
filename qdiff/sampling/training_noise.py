"""The noise that a network was trained with, as a model's config describes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qdiff.sampling.parameterization import Parameterization
from qdiff.sampling.schedule import COSINE_OFFSET, BetaKind, DiffusionSchedule, make_beta_schedule


@dataclass(frozen=True)
class TrainingNoise:
    """A noise schedule by its description, and what the network predicts.

    Attributes:
        kind, start, end, count, cosine_offset: see `make_beta_schedule`.
        zero_terminal_snr: see `DiffusionSchedule`.
        parameterization: what the network predicts.
    """

    kind: BetaKind | str
    start: float
    end: float
    count: int
    cosine_offset: float = COSINE_OFFSET
    zero_terminal_snr: bool = False
    parameterization: Parameterization = Parameterization.EPS

    def betas(self) -> Tensor:
        """Return β_t, not yet rescaled, float64 [T]; a `UserError` if the description is wrong."""
        return make_beta_schedule(self.kind, self.start, self.end, self.count, self.cosine_offset)

    def schedule(self) -> DiffusionSchedule:
        """Return the schedule; a `UserError` if the description is wrong."""
        return DiffusionSchedule(self.betas(), zero_terminal_snr=self.zero_terminal_snr)
