"""Read a table file: its rows, and the command of each row."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdiff.calibration.timesteps import Spacing
from qdiff.cli.table_grid import expand
from qdiff.errors import UserError
from qdiff.evaluation.registry import metric_columns, named_metrics
from qdiff.io.repository import REPOSITORY
from qdiff.io.yaml_files import read_table
from qdiff.methods.registry import METHODS, Method

EXAMPLE = "see configs/tables/digits-demo.yaml"
DEFAULT_METRICS = ("fid", "sfid", "isc", "kid", "fidelity")


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        label: name of the row; the folder of its run is named after it.
        options: the row's options, added to the common ones.
        weights_from: label of the row whose calibrated weights it starts from.
        published: numbers that a paper reports, by metric (keys of `qdiff.evaluation.registry.metric_columns`).
        own_recording: the row records its own calibration set (with another ``--cali_seed``) and not the shared one.
        unverified: the published numbers were quoted from memory of the paper.
        group: label of the row that shows this one together with those of other calibration seeds; None shows it alone.
    """

    label: str
    options: str = ""
    weights_from: str | None = None
    published: dict[str, float] = field(default_factory=dict)
    unverified: bool = False
    own_recording: bool = False
    group: str | None = None

    def __post_init__(self) -> None:
        _check_words(self.options)
        for value in (self.label, self.weights_from or ""):
            _check_text(value)
        known = [column.key for column in metric_columns()]
        bad = [f"{k}: {v}" for k, v in self.published.items() if k not in known or not _is_number(v)]
        if bad:
            raise UserError(
                f"row {self.label}: published {bad[0]} is not a number for one of {', '.join(known)}; correct it"
            )

    @property
    def quantizes(self) -> bool:
        """Whether the row is quantized; otherwise it is float."""
        return "--ptq" in shlex.split(self.options)

    @property
    def _method(self) -> Method | None:
        pairs = list(itertools.pairwise(shlex.split(self.options)))
        return next((method for name, method in METHODS.items() if ("--method", name) in pairs), None)

    @property
    def takes_samples(self) -> bool:
        """Whether the row takes --cali_st and --cali_n: checkpoints need none, EDA-DM and PTQ4DM draw their own."""
        words = shlex.split(self.options)
        pairs = list(itertools.pairwise(words))
        draws = self._method is not None and self._method.draws is not None
        # With dynamic ranges and weights from elsewhere, nothing is left to calibrate.
        dynamic = ("--quant_mode", "dynamic") in pairs and (self.weights_from is not None or "--cali_ckpt" in words)
        return self.quantizes and not (draws or dynamic) and ("--cali_ckpt" not in words or "--resume_w" in words)

    @property
    def calibrates(self) -> bool:
        """Whether the row uses the shared recording; rows at other timesteps than the common ones record their own."""
        pairs = itertools.pairwise(shlex.split(self.options))
        default = Spacing.EVERY if self._method is None else self._method.spacing
        spacing = next((Spacing(word) for option, word in pairs if option == "--cali_spacing"), default)
        return self.takes_samples and not self.own_recording and spacing is Spacing.EVERY


@dataclass(frozen=True)
class Calibration:
    """The recording that all calibrated rows share.

    Attributes:
        script: the command that records.
        options: for the recording and for every quantized row.
        skip: common options, each with one value, that the recording command does not have.
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
    """Reads and checks a table file (YAML; see configs/tables).

    Args:
        file: path of the file.
        out: folder of the runs; default ``runs/<name of the file>``.

    Attributes:
        title: title of the table.
        source: the paper that the published numbers come from.
        rows: all rows, the float row first; grids are expanded (see `qdiff.cli.table_grid.expand`).
        metrics: the metrics to measure, among `named_metrics`.
        extractor, reference: feature network and reference statistics, as `pretrained` of the model's config or the
            table itself names them.
        clip_model: model of the metric "clip"; None takes the usual one.
        notes: sentences for the reader, such as differences from the paper's protocol.

    Raises:
        UserError: the file is missing, is not YAML, or is incomplete.
    """

    def __init__(self, file: str | Path, out: str | Path | None = None) -> None:
        path = self.path = Path(file)
        spec = read_table(path)
        try:
            rows = itertools.chain.from_iterable(expand(row) for row in spec["rows"])
            self.rows = [TableRow(**{**row, "options": row.get("options") or ""}) for row in rows]
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
            raise UserError(f"table {self.path}: metrics has no {unknown[0]!r}; choose from {known}")
        if not self.rows:
            raise UserError(f"table {self.path} has no rows; {EXAMPLE}")
        above: dict[str, Path] = {}
        for row in self.rows:
            if row.weights_from is not None and row.weights_from not in above:
                raise UserError(
                    f"table {self.path}: row {row.label} takes weights from {row.weights_from}, which is not a row "
                    "above it; correct weights_from"
                )
            if self.folder(row.label) in above.values():
                raise UserError(
                    f"table {self.path}: two rows have the folder {self.folder(row.label)}; rename {row.label}"
                )
            above[row.label] = self.folder(row.label)
        if self.rows[0].quantizes:
            raise UserError(
                f"table {self.path}: the first row, {self.rows[0].label}, is quantized; put the float row first: "
                "all others are compared with it"
            )

    @property
    def float_row(self) -> TableRow:
        """The float row, with which all others are compared."""
        return self.rows[0]

    def named(self, text: str) -> list[TableRow]:
        """Return the rows whose labels ``text`` lists, separated by commas, in the table's order.

        The label of a row with several seeds stands for all of them.

        Raises:
            UserError: a label names no row.
        """
        labels = list(dict.fromkeys(label for row in self.rows for label in (row.group, row.label) if label))
        # A label that contains a comma can only be given alone.
        wanted = {text} if text in labels else {part.strip() for part in text.split(",")}
        unknown = sorted(wanted.difference(labels))
        if unknown:
            raise UserError(f"the table has no row {unknown[0]!r}; give --rows labels among: {', '.join(labels)}")
        return [row for row in self.rows if {row.label, row.group} & wanted]

    def base(self, row: TableRow) -> TableRow | None:
        """Return the row whose weights ``row`` starts from."""
        return next((base for base in self.rows if base.label == row.weights_from), None)

    def folder(self, label: str) -> Path:
        """Return the run folder of a row."""
        return self.out / label.lower().replace(" ", "-").replace("/", "-").replace(",", "")

    def kept_images(self, label: str) -> Path:
        """Return the folder for a row's images that were kept from an earlier run (`qdiff.cli.kept_results`)."""
        return self.out / "kept" / self.folder(label).name

    def images(self, label: str) -> Path:
        """Return the folder with a row's images: its run's, or the kept ones where the run has none."""
        own = self.folder(label) / "img"
        return own if (own / "00000.png").is_file() else self.kept_images(label)

    def missing_checkpoint(self, row: TableRow) -> str | None:
        """Return the calibrated checkpoint that a row's options name if the file is missing, else None."""
        named = [path for option, path in itertools.pairwise(shlex.split(row.options)) if option == "--cali_ckpt"]
        return next((path for path in named if not Path(path).is_file()), None)

    @property
    def recording(self) -> Path:
        """The recording that calibrated rows share."""
        return self.out / "calibration_data.pt"

    def command(self, row: TableRow, device: str | None) -> list[str]:
        """Return the sampling command of a row: script and options."""
        words = [*self.common, *shlex.split(row.options), *_device(device), "-l", str(self.folder(row.label))]
        if row.calibrates and self.calibration is not None:
            words += ["--cali_data_path", str(self.recording)]
        if (row.takes_samples or row.own_recording) and self.calibration is not None:
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
        raise TypeError(f"{value!r} is not text")
    return value


def _check_words(value: Any) -> str:
    """Return a text that can be split into words by the shell's rules; anything else is a TypeError."""
    try:
        shlex.split(_check_text(value))
    except ValueError as error:
        raise TypeError(f"{value!r}: {error}") from None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_list(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):  # a string would be read as a list of letters
        raise TypeError(f"{value!r} is not a list")
    return value


def without(words: list[str], options: Collection[str]) -> list[str]:
    """Return command-line words without ``options`` and their values, one each (``--a 1`` or ``--a=1``)."""
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in options:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept
