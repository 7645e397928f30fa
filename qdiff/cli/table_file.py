"""A table file: its rows, and the command of each."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdiff.cli.table_grid import expand
from qdiff.errors import UserError
from qdiff.evaluation.registry import metric_columns, named_metrics
from qdiff.io.repository import REPOSITORY
from qdiff.io.yaml_files import read_table
from qdiff.methods.registry import METHODS

EXAMPLE = "see configs/tables/digits-demo.yaml"
DEFAULT_METRICS = ("fid", "sfid", "isc", "kid", "fidelity")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        label: its name; the folder of its run is made of it.
        options: what it adds to the common options.
        weights_from: label of the row whose calibrated weights it starts from.
        published: what a paper reports, by metric (keys of `qdiff.evaluation.registry.metric_columns`).
        own_recording: it records a calibration set of its own (with another ``--cali_seed``), not the shared one.
        unverified: the published numbers were quoted from memory of the paper.
    """

    label: str
    options: str = ""
    weights_from: str | None = None
    published: dict[str, float] = field(default_factory=dict)
    unverified: bool = False
    own_recording: bool = False

    def __post_init__(self) -> None:
        _check_words(self.options)
        for value in (self.label, self.weights_from or ""):
            _check_text(value)
        known = [column.key for column in metric_columns()]
        bad = [f"{k}: {v}" for k, v in self.published.items() if k not in known or not _is_number(v)]
        if bad:
            raise UserError(f"row {self.label}: published {bad[0]} is no number of {', '.join(known)}; correct it")

    @property
    def quantizes(self) -> bool:
        """Whether it is a quantized row; any other is float."""
        return "--ptq" in shlex.split(self.options)

    @property
    def calibrates(self) -> bool:
        """Whether it takes the shared recording: checkpoints need none, EDA-DM and PTQ4DM draw their own."""
        words = shlex.split(self.options)
        pairs = list(itertools.pairwise(words))
        draws = any(("--method", name) in pairs for name, method in METHODS.items() if method.draws)
        # Its ranges are dynamic: with weights from elsewhere nothing is left to calibrate.
        dynamic = ("--quant_mode", "dynamic") in pairs and (self.weights_from is not None or "--cali_ckpt" in words)
        return (
            self.quantizes
            and not (draws or self.own_recording or dynamic)
            and ("--cali_ckpt" not in words or "--resume_w" in words)
        )


@dataclass(frozen=True)
class Calibration:
    """The recording that all calibrated rows share.

    Attributes:
        script: the command that records.
        options: for the recording and for every quantized row.
        skip: common options, of one value each, that the recording command does not know.
    """

    script: str
    options: str = ""
    skip: tuple[str, ...] = ("--max_images",)

    def __post_init__(self) -> None:
        _check_text(self.script)
        _check_words(self.options)
        if isinstance(self.skip, str) or not all(isinstance(o, str) and o.startswith("-") for o in self.skip):
            raise UserError(f"calibration: skip is {self.skip!r}; give a list of options, e.g. [--max_images]")


class TableFile:
    """A table file (YAML; see configs/tables), checked.

    Args:
        file: its path.
        out: folder of the runs; default ``runs/<name of the file>``.

    Attributes:
        title, source: of the table; the source is the paper whose numbers are the published ones.
        rows: float rows first in meaning and place: the first row is one. Those of a grid are here one by one (see
            `qdiff.cli.table_grid.expand`).
        metrics: what is measured, out of `named_metrics`.
        extractor, reference: feature network and reference statistics, as `pretrained` of the model's config or the
            table itself names them.
        clip_model: for "clip"; None takes the usual one.
        notes: sentences for the reader, such as where protocols differ from the paper's.

    Raises:
        UserError: it is missing, no YAML, or incomplete.
    """

    def __init__(self, file: str | Path, out: str | Path | None = None) -> None:
        path = self.path = Path(file)
        spec = read_table(path)
        try:
            rows = itertools.chain.from_iterable(expand(row) for row in spec["rows"])
            self.rows = [Row(**{**row, "options": row.get("options") or ""}) for row in rows]
            self.title, self.script, self.config = (_check_text(spec[k]) for k in ("title", "script", "config"))
            self.common = shlex.split(_check_words(spec["options"]))
            given = spec.get("calibration")
            self.calibration = (
                None if given is None else Calibration(**{**given, "options": given.get("options") or ""})
            )
            self.metrics = tuple(_check_list(spec.get("metrics") or DEFAULT_METRICS))
            self.notes = list(_check_list(spec.get("notes") or []))
            for key in ("extractor", "reference", "clip_model", "source"):
                if spec.get(key) is not None:
                    _check_text(spec[key])
            config = read_table(REPOSITORY / self.config)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"table {path} is incomplete ({error}); {EXAMPLE}") from None
        pretrained = config.get("pretrained")
        pretrained = pretrained if isinstance(pretrained, dict) else {}
        self.extractor = spec.get("extractor") or pretrained.get("extractor")
        self.reference = spec.get("reference") or pretrained.get("reference")
        self.clip_model, self.source = spec.get("clip_model"), spec.get("source")
        self.out = Path(out or f"runs/{path.stem}")
        self._check()

    def _check(self) -> None:
        unknown = [m for m in self.metrics if m not in named_metrics()]
        if unknown:
            known = ", ".join(named_metrics())
            raise UserError(f"table {self.path}: metrics {unknown[0]!r} is none of {known}; correct it")
        if not self.rows:
            raise UserError(f"table {self.path} has no rows; {EXAMPLE}")
        above: dict[str, Path] = {}
        for row in self.rows:
            if row.weights_from is not None and row.weights_from not in above:
                raise UserError(
                    f"table {self.path}: row {row.label} takes weights from {row.weights_from}, which is no row above "
                    "it; correct weights_from"
                )
            if self.folder(row.label) in above.values():
                raise UserError(
                    f"table {self.path}: two rows have the folder {self.folder(row.label)}; rename {row.label}"
                )
            above[row.label] = self.folder(row.label)
        if self.rows[0].quantizes:
            raise UserError(
                f"table {self.path}: the first row, {self.rows[0].label}, is quantized; put the float row first, all "
                "others are judged beside it"
            )

    @property
    def float_row(self) -> Row:
        """The baseline."""
        return self.rows[0]

    def named(self, text: str) -> list[Row]:
        """Return the rows whose labels stand in ``text``, separated by commas, in the table's order.

        Raises:
            UserError: there is no such row.
        """
        labels = [row.label for row in self.rows]
        # A label with a comma in it can be named alone.
        wanted = {text} if text in labels else {part.strip() for part in text.split(",")}
        unknown = sorted(wanted.difference(labels))
        if unknown:
            raise UserError(f"the table has no row {unknown[0]!r}; --rows takes labels out of: {', '.join(labels)}")
        return [row for row in self.rows if row.label in wanted]

    def base(self, row: Row) -> Row | None:
        """Return the row whose weights ``row`` starts from."""
        return next((base for base in self.rows if base.label == row.weights_from), None)

    def folder(self, label: str) -> Path:
        """Return the run folder of a row."""
        return self.out / label.lower().replace(" ", "-").replace("/", "-").replace(",", "")

    def missing_checkpoint(self, row: Row) -> str | None:
        """Return the calibrated checkpoint that a row's options name and that is not there."""
        named = [path for option, path in itertools.pairwise(shlex.split(row.options)) if option == "--cali_ckpt"]
        return next((path for path in named if not Path(path).is_file()), None)

    @property
    def recording(self) -> Path:
        """The recording that calibrated rows share."""
        return self.out / "calibration_data.pt"

    def command(self, row: Row, device: str | None) -> list[str]:
        """Return the sampling command of a row: script and options."""
        words = [*self.common, *shlex.split(row.options), *_device(device), "-l", str(self.folder(row.label))]
        if row.calibrates and self.calibration is not None:
            words += ["--cali_data_path", str(self.recording)]
        if (row.calibrates or row.own_recording) and self.calibration is not None:
            words += shlex.split(self.calibration.options)
        if row.weights_from is not None:
            words += ["--resume_w", "--cali_ckpt", str(self.folder(row.weights_from) / "quantized.safetensors")]
        return [self.script, *words]

    def recording_command(self, device: str | None) -> list[str]:
        """Return the command that writes `recording`."""
        words = [*without(self.common, self.calibration.skip), *shlex.split(self.calibration.options)]
        like = ["--like", Path(self.script).stem]
        return [self.calibration.script, *like, *words, *_device(device), "--out", str(self.recording)]


def _device(name: str | None) -> list[str]:
    return [] if name is None else ["--device", name]


def _check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _check_words(value: Any) -> str:
    """Return a text that the shell's rules take apart into words; anything else is a TypeError."""
    try:
        shlex.split(_check_text(value))
    except ValueError as error:
        raise TypeError(f"{value!r}: {error}") from None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_list(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):  # a text would be taken for a list of letters
        raise TypeError(f"{value!r} is no list")
    return value


def without(words: list[str], options: Collection[str]) -> list[str]:
    """Return command-line words less ``options`` and the one value that each has (``--a 1`` or ``--a=1``)."""
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in options:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept
