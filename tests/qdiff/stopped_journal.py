"""A journal whose run is stopped, as by Ctrl-C, and one that tells which units came from it."""

from __future__ import annotations

from collections.abc import Callable

from qdiff.calibration.journal import CalibrationJournal


class StoppedJournal(CalibrationJournal):
    """Stops the run right after a unit was recorded.

    Args:
        folder: the journal's folder.
        stops: is asked after every unit (number of units so far, phase, index).

    Attributes:
        phase: of the last recorded unit.
    """

    def __init__(self, folder, stops: Callable[[int, str, int], bool]) -> None:
        super().__init__(folder, {})
        self.stops, self.count, self.phase = stops, 0, None

    def record(self, phase, index, module, errors):
        super().record(phase, index, module, errors)
        self.count, self.phase = self.count + 1, phase
        if self.stops(self.count, phase, index):
            raise KeyboardInterrupt


class ResumedJournal(CalibrationJournal):
    """Counts the units that it restores.

    Attributes:
        restored: their number.
    """

    def __init__(self, folder) -> None:
        super().__init__(folder, {})
        self.restored = 0

    def restore(self, phase, index, module):
        found = super().restore(phase, index, module)
        self.restored += found is not None
        return found
