"""Run a table: one sampling command per row, the float model first, all measured by the same protocol."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qdiff.cli.kept_results import KeptResults
from qdiff.cli.published_numbers import unverified_note
from qdiff.cli.run_manifest import Manifest, read_manifest
from qdiff.cli.table_file import TableFile, TableRow, without
from qdiff.cli.table_numbers import file_bytes, machine_of, mean_widths, misses, ranges
from qdiff.cli.table_protocol import protocol_of
from qdiff.cli.table_seeds import not_shown, summarise
from qdiff.errors import UserError
from qdiff.evaluation.registry import metric_columns
from qdiff.io.files import written_whole
from qdiff.io.repository import REPOSITORY
from qdiff.report.columns import markdown
from qdiff.report.comparison import comparison_picture

FLOAT_BITS = 32


class TableRun:
    """Carries out a table.

    Args:
        table: the rows.
        device: device of the runs and of the feature network; None lets them choose.
        extractor, extractor_weights: override the table's choice.
        rows: labels of the rows to run, separated by commas; default all. The float row is added if it is not
            finished.
        force: continue even if the float model misses its published numbers, and flag them.
        results: folder to keep the results of rows in, and to take them from (`qdiff.cli.kept_results`).
    """

    def __init__(
        self,
        table: TableFile,
        device: str | None = None,
        extractor: str | None = None,
        extractor_weights: str | None = None,
        rows: str | None = None,
        force: bool = False,
        results: str | Path | None = None,
    ) -> None:
        self.table, self.device, self.force, self.named = table, device, force, rows is not None
        self.results = results
        self._kept: KeptResults | None = None
        self.extractor = extractor or table.extractor
        if not self.extractor:
            raise UserError(f"{table.config} names no pretrained.extractor; add it beside the model's section")
        self.extractor_weights = extractor_weights
        self.chosen = table.rows if rows is None else table.named(rows)

    def print_commands(self) -> None:
        """Print the commands as JSON."""
        rows = self._with_float(self.chosen)
        commands = {row.label: shlex.join(["python", *self.table.command(row, self.device)]) for row in rows}
        print(json.dumps({"extractor": self.extractor, "commands": commands}, indent=1))

    def run(self) -> str:
        """Run and measure the chosen rows, then write the table as .md, .json and .html, and its pictures.

        The table shows the chosen rows and those that earlier calls finished. Rows whose results are kept are not run
        again. The pictures are ``comparison.png`` and, if rows have three or more widths of activations,
        ``against-activation-bits.png``.

        Returns:
            The results and the protocol as markdown without a title.

        Raises:
            UserError: something is missing, a row's command fails, or the float model misses a published number.
        """
        from qdiff.cli.measure import Measuring

        table = self.table
        if table.reference is None:
            raise UserError(f"{table.config} names no reference statistics (pretrained.reference); add them")
        self._measuring = Measuring(
            self.extractor, self.extractor_weights, table.reference, table.metrics, table.clip_model, self.device
        )
        if self.results is not None:
            self._kept = KeptResults(self.results, table, self._measuring.by)
        self._leave_out_rows_without_files()
        self._leave_out_kept_rows()
        for row in self.chosen:
            base = table.base(row)
            if base is not None and base not in self.chosen and not self._is_finished(base):
                raise UserError(
                    f"row {row.label} takes weights from row {base.label}, which is not finished; add it to --rows"
                )
        if table.float_row not in self.chosen and (self.chosen or self._is_kept(table.float_row)):
            self._check_baseline(self._measured(table.float_row))
        for number, row in enumerate(self.chosen, 1):
            print(f"[{number}/{len(self.chosen)}] {row.label}", file=sys.stderr, flush=True)
            if row.calibrates and table.calibration is not None and not table.recording.is_file():
                _call(table.recording_command(self.device))
            _call(table.command(row, self.device))
            measured = self._measured(row)
            print(markdown([measured], header=False), file=sys.stderr, flush=True)
            if row is table.float_row:
                self._check_baseline(measured)
        shown = [row for row in table.rows if row in self.chosen or self._is_finished(row) or self._is_kept(row)]
        return self._write([self._measured(row) for row in shown])

    def _with_float(self, rows: list[TableRow]) -> list[TableRow]:
        """Return the rows to run with the float row before them, unless that is among them or finished.

        A quantized result means nothing without the float result of the same command.
        """
        float_row = self.table.float_row
        return rows if float_row in rows or self._is_finished(float_row) else [float_row, *rows]

    def _leave_out_kept_rows(self) -> None:
        """Leave out the rows whose results are kept, but not those whose images or weights another row needs."""
        run = [row for row in self.chosen if self._is_finished(row) or not self._is_kept(row)]
        bases = [base for row in run if (base := self.table.base(row)) is not None]
        run = [row for row in self.chosen if row in run or row in bases]
        self.chosen = self._with_float(run) if run or not self._is_kept(self.table.float_row) else []

    def _leave_out_rows_without_files(self) -> None:
        """Leave out the rows whose calibrated checkpoint is missing; for a row named in --rows this is an error."""
        left = [row for row in self.chosen if not self._is_kept(row)]
        lacking = {row.label: path for row in left if (path := self.table.missing_checkpoint(row)) is not None}
        for label, path in lacking.items():
            sentence = (
                f"row {label} needs the calibrated checkpoint {path}, which is missing (the head of "
                f"{self.table.path} says where to get it)"
            )
            if self.named:
                raise UserError(f"{sentence}; put it there, or choose other --rows")
            print(f"left out: {sentence}", file=sys.stderr, flush=True)
        self.chosen = [row for row in self.chosen if row.label not in lacking]

    def _check_baseline(self, measured: dict[str, Any]) -> None:
        """Stop if the float model misses its published numbers: the quantized rows would then mean nothing."""
        if measured["flags"] and not self.force:
            raise UserError(
                f"the float baseline is off: {'; '.join(measured['flags'])}; correct the protocol (see "
                f"{self.table.path} and {self.table.folder(self.table.float_row.label) / 'run.json'}), or give --force "
                "to go on with the row flagged"
            )

    def _write(self, results: list[dict[str, Any]]) -> str:
        from qdiff.report.activation_plots import activation_picture, pictured
        from qdiff.report.page import TableResults, write_page

        table, reference = self.table, self._measuring.reference
        protocol = protocol_of(
            table, self._manifest(table.float_row), results, self.extractor, reference, self._measuring.compared
        )
        notes = list(table.notes)
        if (unverified := unverified_note(table)) is not None:
            notes.append(unverified)
        if missing := not_shown(table.rows, results):
            notes.append(f"Rows not yet run, or not with the table's present options: {', '.join(missing)}.")
        if self._kept is not None:
            for row in table.rows:
                if self._is_kept(row):
                    self._kept.restore_picture(row)
        results, folders = summarise(table.rows, results, table.images)
        flags = [f"{row['label']}: {flag}" for row in results for flag in row["flags"]]
        text = "".join(f"**{flag}.**\n\n" for flag in flags)
        text += f"{markdown(results)}\n\nProtocol: {'; '.join(f'{k} {v}' for k, v in protocol)}.\n"
        text += "".join(f"\n{note}\n" for note in notes)
        about = {"title": table.title, "source": table.source, "protocol": dict(protocol), "notes": notes}
        with written_whole(table.out / "table.md") as path:
            path.write_text(f"# {table.title}\n\n{text}")
        with written_whole(table.out / "table.json") as path:
            path.write_text(json.dumps({**about, "rows": results}, indent=1))
        write_page(table.out / "table.html", TableResults(table.title, protocol, results, folders, notes))
        picture = table.out / "comparison.png"
        if any(next(folder.glob("*.png"), None) for folder in folders.values()):
            with written_whole(picture) as path:
                comparison_picture(list(folders.items()), path)
        else:  # rows were kept without their pictures
            picture.unlink(missing_ok=True)
        if (column := pictured(results)) is not None:
            with written_whole(table.out / "against-activation-bits.png") as path:
                activation_picture(column, results, path)
        print(f"# {table.title}\n\n{text}")
        print(f"Page: {table.out / 'table.html'}" + (f"   Picture: {picture}" if picture.is_file() else ""))
        return text

    def _is_finished(self, row: TableRow) -> bool:
        """Whether the row's folder holds all its images, made with the table's present options."""
        folder, base = self.table.folder(row.label), self.table.base(row)
        try:
            manifest = self._read_manifest(row)
            made = shlex.split(manifest.command)[2:]  # without the interpreter and the script
            images = len(list((folder / "img").glob("*.png")))
            complete = manifest.status == "finished" and images == manifest.num_images
        except ValueError:
            return False
        device = ["--device"]
        current = without(made, device) == without(self.table.command(row, self.device)[1:], device)
        return complete and current and (base is None or self._is_finished(base))

    def _is_kept(self, row: TableRow) -> bool:
        return self._kept is not None and self._kept.find(row) is not None

    def _manifest(self, row: TableRow) -> Manifest:
        if not self._is_finished(row) and self._is_kept(row):
            return Manifest(**self._kept.find(row).run)
        return self._read_manifest(row)

    def _read_manifest(self, row: TableRow) -> Manifest:
        return read_manifest(self.table.folder(row.label) / "run.json", "delete its folder to run the row again")

    def _measured(self, row: TableRow) -> dict[str, Any]:
        """Return a row of results, see `qdiff.report.columns`."""
        table, folder = self.table, self.table.folder(row.label)
        told = {
            "label": row.label,
            "published": dict(row.published),
            "command": shlex.join(["python", *table.command(row, self.device)]),
        }
        if not self._is_finished(row) and self._is_kept(row):
            result = {**self._kept.find(row).result, **told}
            return {**result, "flags": [] if row.quantizes else misses(result)}
        manifest = self._read_manifest(row)
        float_folder = None if row is table.float_row else table.folder(table.float_row.label)
        metrics = self._measuring.run(folder, manifest, float_folder)
        calibration, cpu = manifest.calibration_seconds()
        base = table.base(row)
        if base is not None:  # the time that its weights took counts too
            of_weights, cpu_of_weights = self._read_manifest(base).calibration_seconds()
            calibration += of_weights
            cpu = None if cpu is None else cpu + (cpu_of_weights or 0.0)
        quant = (manifest.config.get("ptq") or {}).get("quant", {})
        cost = manifest.cost or {}
        keys = [column.key for column in metric_columns()]
        result = {
            **told,
            "method": manifest.config.get("method", "float"),
            "weight_bits": quant.get("weight_bits") or FLOAT_BITS,
            "act_bits": quant.get("act_bits") or FLOAT_BITS,
            "split": quant.get("split_shortcut", False),
            "modulate": quant.get("modulate", False),
            "ranges": ranges(manifest.config.get("ptq") or {}),
            "ablation": quant.get("ablation"),
            "images": manifest.num_images,
            **{k: float(v) for k, v in metrics.items() if k in keys or k.removesuffix("_std") in keys},
            "noise_mse": (manifest.noise_error or {}).get("mse"),
            "last_step_mse": (manifest.noise_error or {}).get("last_step"),
            **mean_widths(folder),
            "bytes": file_bytes(folder, manifest),
            "counted_bytes": cost.get("size_bytes"),
            "gbops": cost["bops"] / 1e9 if cost else None,
            "state_bytes": cost.get("state_bytes"),
            "additions": cost.get("additions"),
            "calibration_s": calibration,
            "calibration_cpu_s": cpu,
            "sampling_s": manifest.seconds["sampling"],
            "date": time.strftime("%Y-%m-%d", time.localtime((folder / "run.json").stat().st_mtime)),
            "machine": machine_of(manifest),
        }
        if self._kept is not None:
            group = [r for r in table.rows if r.group is not None and r.group == row.group]
            self._kept.keep(row, result, manifest, picture=not group or row is group[0])
        return {**result, "flags": [] if row.quantizes else misses(result)}


def _call(command: list[str]) -> None:
    script, *words = command
    code = subprocess.run([sys.executable, str(REPOSITORY / script), *words], check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        shown = shlex.join(["python", *command])
        raise UserError(f"this command failed with exit code {code} (its error is above): {shown}")
