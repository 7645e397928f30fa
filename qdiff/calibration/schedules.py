"""How many calibration samples each timestep gives."""

from __future__ import annotations

from qdiff.errors import UserError


def evenly_spaced(recorded: int, count: int) -> list[int]:
    """Return ``count`` step indices out of ``recorded``: every ⌊recorded/count⌋-th from the first (Q-Diffusion).

    Raises:
        UserError: more steps asked for than recorded, or fewer than one.
    """
    if not 1 <= count <= recorded:
        raise UserError(
            f"{count} calibration steps were asked for and {recorded} are recorded; give --cali_st 1 to {recorded}"
        )
    return list(range(0, recorded, recorded // count))[:count]
