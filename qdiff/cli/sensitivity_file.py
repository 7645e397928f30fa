"""The file in which a run folder keeps the sensitivities of its layers, and which other runs may begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdiff.calibration.sensitivity import Operand
from qdiff.errors import UserError, first_line
from qdiff.io.files import written_whole

DATA = "data"  # in the settings of sensitivities, the hash of the recording
_OTHERS = "leave out --sensitivities, or choose another --logdir"


class SensitivityFile:
    """``sensitivities.json``: quality by operand, layer and width, beside what it depends on; kept layer by layer.

    Args:
        path: the file; may not exist yet.
        settings: what the values depend on, apart from the samples (JSON values).
        start: a file of another run to begin with, if ``path`` does not exist.

    Raises:
        UserError: a file is damaged, or holds values of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], start: Path | None = None) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self._values: dict[str, dict[str, dict[str, float] | None]] = {operand.value: {} for operand in Operand}
        self._data: str | None = None
        source = path if path.is_file() else start
        if source is None:
            return
        try:
            there = json.loads(source.read_text(encoding="utf-8"))
            for operand in Operand:
                self._values[operand.value] = {
                    name: None if found is None else {str(int(b)): float(value) for b, value in found.items()}
                    for name, found in there[operand.value].items()
                }
            before = dict(there["settings"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{source} holds no sensitivities ({first_line(error)}); delete it, or give another"
            ) from error
        self._data = before.pop(DATA, None)
        if names := sorted(k for k in before | self.settings if before.get(k) != self.settings.get(k)):
            raise UserError(f"{source} holds sensitivities of other settings ({', '.join(names)}); {_OTHERS}")

    def settle(self, data: str) -> None:
        """Say on which samples the values are measured.

        Args:
            data: hash of the recording.

        Raises:
            UserError: the values in the file were measured on others.
        """
        if self._data not in (None, data):
            raise UserError(f"the sensitivities were measured on another calibration set; {_OTHERS}")
        self._data = data

    def __contains__(self, key: tuple[Operand, str]) -> bool:
        return key[1] in self._values[key[0].value]

    def add(self, operand: Operand, found: Mapping[str, dict[int, float] | None]) -> None:
        """Keep what was found for some layers; None if one is never called."""
        for name, values in found.items():
            kept = None if values is None else {str(bits): value for bits, value in values.items()}
            self._values[operand.value][name] = kept
        with written_whole(self.path) as temporary:
            temporary.write_text(
                json.dumps({"settings": {**self.settings, DATA: self._data}, **self._values}, indent=1)
            )

    def of(self, operand: Operand) -> dict[str, dict[int, float] | None]:
        """Return the quality by layer and width."""
        return {
            name: None if values is None else {int(bits): value for bits, value in values.items()}
            for name, values in self._values[operand.value].items()
        }
