"""A table of runs: one row a sampling command, all measured by the same protocol."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdiff.errors import UserError
from qdiff.evaluation.comparison import comparison_picture, markdown
from qdiff.files import written_whole

REPOSITORY = Path(__file__).resolve().parents[2]
SHOWN_METRICS = ("fid", "isc", "isc_std", "kid", "kid_std", "asked_share")


@dataclass(frozen=True)
class Row:
    """One row: its label, what it adds to the common options, and a row whose weights it starts from."""

    label: str
    options: str = ""
    weights_from: str | None = None


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
        if isinstance(self.skip, str) or not all(isinstance(o, str) and o.startswith("-") for o in self.skip):
            raise UserError(f"calibration: skip is {self.skip!r}; give a list of options, e.g. [--max_images]")


class TableRun:
    """Carries out a table file (YAML; see configs/tables).

    Args:
        file: the table.
        out: folder of the runs; default ``runs/<name of the file>``.
        device: passed on to the runs.
        extractor, extractor_weights: override the model config's choice.
        rows: labels of the rows to run, separated by commas; default all.
    """

    def __init__(
        self,
        file: str,
        out: str | None,
        device: str | None,
        extractor: str | None,
        extractor_weights: str | None,
        rows: str | None = None,
    ) -> None:
        path = Path(file)
        self.spec = _read_yaml(path)
        try:
            self.rows = [Row(**{**row, "options": row.get("options") or ""}) for row in self.spec["rows"]]
            self.common = shlex.split(self.spec["options"])
            given = self.spec.get("calibration")
            self.calibration = (
                None if given is None else Calibration(**{**given, "options": given.get("options") or ""})
            )
            config = _read_yaml(REPOSITORY / self.spec["config"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"table {path} is incomplete ({error}); see configs/tables/digits-demo.yaml") from None
        self.out = Path(out or f"runs/{path.stem}")
        self.device = [] if device is None else ["--device", device]
        pretrained = config.get("pretrained")
        if not isinstance(pretrained, dict) or not (extractor or pretrained.get("extractor")):
            raise UserError(f"{self.spec['config']} names no pretrained.extractor; add it beside the model's section")
        self.extractor = extractor or pretrained["extractor"]
        self.extractor_weights = extractor_weights
        self.reference = pretrained.get("reference")
        if not self.rows:
            raise UserError(f"table {path} has no rows; see configs/tables/digits-demo.yaml")
        above: dict[str, Path] = {}
        for row in self.rows:
            if row.weights_from is not None and row.weights_from not in above:
                raise UserError(
                    f"table {path}: row {row.label} takes weights from {row.weights_from}, which is no row above it"
                )
            if self.folder(row.label) in above.values():
                raise UserError(f"table {path}: two rows have the folder {self.folder(row.label)}; rename {row.label}")
            above[row.label] = self.folder(row.label)
        self.chosen = self.rows if rows is None else self._named(rows)

    def _named(self, text: str) -> list[Row]:
        """Return the rows whose labels stand in ``text``, in the table's order."""
        labels = [row.label for row in self.rows]
        # A label with a comma in it can be named alone.
        wanted = {text} if text in labels else {part.strip() for part in text.split(",")}
        unknown = sorted(wanted.difference(labels))
        if unknown:
            raise UserError(f"the table has no row {unknown[0]!r}; --rows takes labels out of: {', '.join(labels)}")
        return [row for row in self.rows if row.label in wanted]

    def folder(self, label: str) -> Path:
        """Return the run folder of a row."""
        return self.out / label.lower().replace(" ", "-").replace("/", "-").replace(",", "")

    def command(self, row: Row) -> list[str]:
        """Return the sampling command of a row."""
        words = [*self.common, *shlex.split(row.options), *self.device, "-l", str(self.folder(row.label))]
        if "--ptq" in words and self.calibration is not None:
            words += ["--cali_data_path", str(self._recording), *shlex.split(self.calibration.options)]
        if row.weights_from is not None:
            words += [
                "--resume_w",
                "--cali_ckpt",
                str(self.folder(row.weights_from) / "quantized.safetensors"),
            ]
        return [self.spec["script"], *words]

    @property
    def _recording(self) -> Path:
        return self.out / "calibration_data.pt"

    def _collect_command(self) -> list[str]:
        words = [*_without(self.common, self.calibration.skip), *shlex.split(self.calibration.options)]
        like = ["--like", Path(self.spec["script"]).stem]
        return [self.calibration.script, *like, *words, *self.device, "--out", str(self._recording)]

    def print_commands(self) -> None:
        """Print the commands as JSON."""
        commands = {row.label: shlex.join(["python", *self.command(row)]) for row in self.chosen}
        print(json.dumps({"extractor": self.extractor, "commands": commands}, indent=1))

    def run(self) -> None:
        """Run and measure the chosen rows, then write ``table.md``, ``table.json`` and ``comparison.png``.

        These show the chosen rows and those that earlier calls finished.
        """
        from qdiff.evaluation.extractors import create_extractor
        from qdiff.evaluation.reference import load_reference

        extractor = create_extractor(self.extractor, self.extractor_weights)
        if self.reference is None:
            raise UserError(f"{self.spec['config']} names no reference statistics (pretrained.reference); add them")
        reference = load_reference(REPOSITORY / self.reference, extractor)
        for row in self.chosen:
            base = self._base(row)
            if base is not None and base not in self.chosen and not self._is_finished(base):
                raise UserError(
                    f"row {row.label} takes weights from {base.label}, which is not finished; add it to --rows"
                )
        calibrated = self.calibration is not None and any("--ptq" in self.command(row) for row in self.chosen)
        if calibrated and not self._recording.is_file():
            _call(self._collect_command())
        for number, row in enumerate(self.chosen, 1):
            print(f"[{number}/{len(self.chosen)}] {row.label}", file=sys.stderr, flush=True)
            _call(self.command(row))
            measured = self._measured(row, extractor, reference)
            print(markdown([measured], header=False), file=sys.stderr, flush=True)
        shown = [row for row in self.rows if row in self.chosen or self._is_finished(row)]
        self._write([self._measured(row, extractor, reference) for row in shown])

    def _write(self, results: list[dict[str, Any]]) -> None:
        text = f"# {self.spec['title']}\n\n{markdown(results)}\n\n{self._protocol(results)}\n"
        shown = [row["label"] for row in results]
        missing = [row.label for row in self.rows if row.label not in shown]
        if missing:
            text += f"\nRows not yet run, or not with the table's present options: {', '.join(missing)}.\n"
        with written_whole(self.out / "table.md") as path:
            path.write_text(text)
        with written_whole(self.out / "table.json") as path:
            path.write_text(json.dumps({"title": self.spec["title"], "rows": results}, indent=1))
        with written_whole(self.out / "comparison.png") as path:
            comparison_picture([(label, self.folder(label) / "img") for label in shown], path)
        print(text)
        print(f"Picture: {self.out / 'comparison.png'}   Table: {self.out / 'table.md'}")

    def _base(self, row: Row) -> Row | None:
        """Return the row whose weights ``row`` starts from."""
        return next((base for base in self.rows if base.label == row.weights_from), None)

    def _is_finished(self, row: Row) -> bool:
        """Whether the row's folder holds all its images, made with the options that the table has now."""
        folder, base = self.folder(row.label), self._base(row)
        try:
            manifest = json.loads((folder / "run.json").read_text())
            made = shlex.split(manifest["command"])[2:]  # past the interpreter and the script
            images = len(list((folder / "img").glob("*.png")))
            complete = manifest["status"] == "finished" and images == manifest["num_images"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        device = ["--device"]
        current = _without(made, device) == _without(self.command(row)[1:], device)
        return complete and current and (base is None or self._is_finished(base))

    def _measured(self, row: Row, extractor: Any, reference: Any) -> dict[str, Any]:
        folder = self.folder(row.label)
        manifest = json.loads((folder / "run.json").read_text())
        metrics = self._metrics(folder, manifest.get("labels"), extractor, reference)
        calibrated, files = folder / "quantized.safetensors", manifest["files"]
        # A float latent model's file also holds an autoencoder: what counts is the quantized network alone.
        size = manifest.get("network_bytes") or Path(files["float weights"]["path"]).stat().st_size
        if "quantized checkpoint" in files or calibrated.is_file():
            file = calibrated if calibrated.is_file() else Path(files["quantized checkpoint"]["path"])
            size = file.stat().st_size
        calibration = manifest["seconds"].get("calibration", 0.0)
        if row.weights_from is not None:  # the time of its weights counts too
            base = json.loads((self.folder(row.weights_from) / "run.json").read_text())
            calibration += base["seconds"].get("calibration", 0.0)
        return {
            "label": row.label,
            "images": manifest["num_images"],
            "noise_mse": manifest.get("noise_error", {}).get("mse"),
            **{k: float(metrics[k]) for k in SHOWN_METRICS if k in metrics},
            "bytes": size,
            "calibration_s": calibration,
            "sampling_s": manifest["seconds"]["sampling"],
            "command": shlex.join(["python", *self.command(row)]),
        }

    def _metrics(self, folder: Path, labels: list[int] | None, extractor: Any, reference: Any) -> dict[str, Any]:
        """Return a row's metrics, out of ``metrics.json`` where they are of these images, by this extractor."""
        from qdiff.evaluation.conditions import asked_share
        from qdiff.evaluation.extractors import extractor_spec
        from qdiff.evaluation.metrics import compute_metrics

        cache, images = folder / "metrics.json", folder / "img"
        # A retrained extractor, or digits of another size, would otherwise go unnoticed.
        by = {"weights_hash": reference.weights_hash, "reference_hash": reference.images_hash}
        metrics: dict[str, Any] = {}
        if cache.is_file() and cache.stat().st_mtime >= images.stat().st_mtime:
            cached = json.loads(cache.read_text())
            metrics = cached if cached.get("by") == by else {}
        known = set(metrics)
        if not metrics:
            metrics = {"by": by, **compute_metrics(images, reference, extractor, progress=False)}
        # An extractor of other classes than the model's has nothing to say here.
        if labels is not None and "asked_share" not in metrics and extractor_spec(self.extractor).classes is not None:
            metrics["asked_share"] = asked_share(images, labels, self.extractor, self.extractor_weights)
        if set(metrics) != known:
            with written_whole(cache) as path:
                path.write_text(json.dumps(metrics, indent=1))
        return metrics

    def _protocol(self, results: list[dict[str, Any]]) -> str:
        manifest = json.loads((self.folder(results[0]["label"]) / "run.json").read_text())
        return (
            f"Protocol: {results[0]['images']} images a row, seed {manifest['config']['seed']}, sampler "
            f"{manifest['config']['sampler']}, features {self.extractor}, reference {self.reference}; "
            f"{manifest['machine']['cpus']} CPUs, {manifest.get('torch_threads')} thread(s), device "
            f"{manifest.get('device')}, torch {manifest['packages'].get('torch')}, {time.strftime('%Y-%m-%d')}. "
            "ε error: mean squared difference from float on held-out network inputs. Size: bytes of the "
            "quantized file; of float, the denoising network's weights in float32."
            + (" Asked: images that show what was asked for." if any("asked_share" in r for r in results) else "")
        )


def _without(words: list[str], options: Collection[str]) -> list[str]:
    """Return command-line words less ``options`` and the one value that each has (``--a 1`` or ``--a=1``)."""
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in options:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"table or config {path} does not exist; see configs/tables") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML ({str(error).splitlines()[0]}); correct it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a YAML mapping; correct it")
    return value


def _call(command: list[str]) -> None:
    script, *words = command
    code = subprocess.run([sys.executable, str(REPOSITORY / script), *words], check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        shown = shlex.join(["python", *command])
        raise UserError(f"this command failed with exit code {code} (its error is above): {shown}")
