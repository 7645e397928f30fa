"""A table of runs: one row a sampling command, all measured by the same protocol."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdiff.errors import UserError
from qdiff.evaluation.comparison import comparison_picture, markdown
from qdiff.files import written_whole

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One row: its label, what it adds to the common options, and a row whose weights it starts from."""

    label: str
    options: str = ""
    weights_from: str | None = None


class TableRun:
    """Carries out a table file (YAML; see configs/tables).

    Args:
        file: the table.
        out: folder of the runs; default ``runs/<name of the file>``.
        device: passed on to the runs.
        extractor, extractor_weights: override the model config's choice.
    """

    def __init__(
        self,
        file: str,
        out: str | None,
        device: str | None,
        extractor: str | None,
        extractor_weights: str | None,
    ) -> None:
        path = Path(file)
        self.spec = _read_yaml(path)
        try:
            self.rows = [Row(**{**row, "options": row.get("options") or ""}) for row in self.spec["rows"]]
            self.common = shlex.split(self.spec["options"])
            pretrained = _read_yaml(REPOSITORY / self.spec["config"])["pretrained"]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"table {path} is incomplete ({error}); see configs/tables/digits-demo.yaml") from None
        self.out = Path(out or f"runs/{path.stem}")
        self.device = [] if device is None else ["--device", device]
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

    def folder(self, label: str) -> Path:
        """Return the run folder of a row."""
        return self.out / label.lower().replace(" ", "-").replace("/", "-").replace(",", "")

    def command(self, row: Row) -> list[str]:
        """Return the sampling command of a row."""
        words = [*self.common, *shlex.split(row.options), *self.device, "-l", str(self.folder(row.label))]
        if "--ptq" in words and "calibration" in self.spec:
            words += ["--cali_data_path", str(self._recording), *self._calibration_numbers()]
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

    def _calibration_numbers(self) -> list[str]:
        return shlex.split(self.spec["calibration"]["options"])

    def _collect_command(self) -> list[str]:
        words = []
        skip = {"--max_images"}  # the one common option that recording does not know
        common = iter(self.common)
        for word in common:
            if word in skip:
                next(common)
            else:
                words.append(word)
        script = self.spec["calibration"]["script"]
        numbers = self._calibration_numbers()
        return [script, *words, *numbers, *self.device, "--out", str(self._recording)]

    def print_commands(self) -> None:
        """Print the commands as JSON."""
        commands = {row.label: shlex.join(["python", *self.command(row)]) for row in self.rows}
        print(json.dumps({"extractor": self.extractor, "commands": commands}, indent=1))

    def run(self) -> None:
        """Run and measure every row, then write ``table.md``, ``table.json`` and ``comparison.png``."""
        from qdiff.evaluation.extractors import create_extractor
        from qdiff.evaluation.reference import load_reference

        extractor = create_extractor(self.extractor, self.extractor_weights)
        if self.reference is None:
            raise UserError(f"{self.spec['config']} names no reference statistics (pretrained.reference); add them")
        reference = load_reference(REPOSITORY / self.reference, extractor)
        if "calibration" in self.spec and not self._recording.is_file():
            _call(self._collect_command())
        results = []
        for number, row in enumerate(self.rows, 1):
            print(f"[{number}/{len(self.rows)}] {row.label}", file=sys.stderr, flush=True)
            _call(self.command(row))
            results.append(self._measured(row, extractor, reference))
            print(markdown(results[-1:], header=False), file=sys.stderr, flush=True)
        text = f"# {self.spec['title']}\n\n{markdown(results)}\n\n{self._protocol(results)}\n"
        with written_whole(self.out / "table.md") as path:
            path.write_text(text)
        with written_whole(self.out / "table.json") as path:
            path.write_text(json.dumps({"title": self.spec["title"], "rows": results}, indent=1))
        folders = [(row.label, self.folder(row.label) / "img") for row in self.rows]
        with written_whole(self.out / "comparison.png") as path:
            comparison_picture(folders, path)
        print(text)
        print(f"Picture: {self.out / 'comparison.png'}   Table: {self.out / 'table.md'}")

    def _measured(self, row: Row, extractor: Any, reference: Any) -> dict[str, Any]:
        from qdiff.evaluation.metrics import compute_metrics

        folder = self.folder(row.label)
        manifest = json.loads((folder / "run.json").read_text())
        cache = folder / "metrics.json"
        fresh = cache.is_file() and cache.stat().st_mtime >= (folder / "img").stat().st_mtime
        if fresh:
            metrics = json.loads(cache.read_text())
        else:
            metrics = compute_metrics(folder / "img", reference, extractor, progress=False)
            with written_whole(cache) as path:
                path.write_text(json.dumps(metrics, indent=1))
        calibrated, files = folder / "quantized.safetensors", manifest["files"]
        loaded = files.get("quantized checkpoint", files["float weights"])["path"]
        size = calibrated if calibrated.is_file() else Path(loaded)
        calibration = manifest["seconds"].get("calibration", 0.0)
        if row.weights_from is not None:  # the time of its weights counts too
            base = json.loads((self.folder(row.weights_from) / "run.json").read_text())
            calibration += base["seconds"].get("calibration", 0.0)
        return {
            "label": row.label,
            "images": manifest["num_images"],
            "noise_mse": manifest.get("noise_error", {}).get("mse"),
            **{k: float(v) for k, v in metrics.items() if k in ("fid", "isc", "isc_std", "kid", "kid_std")},
            "bytes": size.stat().st_size,
            "calibration_s": calibration,
            "sampling_s": manifest["seconds"]["sampling"],
            "command": shlex.join(["python", *self.command(row)]),
        }

    def _protocol(self, results: list[dict[str, Any]]) -> str:
        manifest = json.loads((self.folder(self.rows[0].label) / "run.json").read_text())
        return (
            f"Protocol: {results[0]['images']} images a row, seed {manifest['config']['seed']}, sampler "
            f"{manifest['config']['sampler']}, features {self.extractor}, reference {self.reference}; "
            f"{manifest['machine']['cpus']} CPUs, {manifest.get('torch_threads')} threads, device "
            f"{manifest.get('device')}, torch {manifest['packages'].get('torch')}, {time.strftime('%Y-%m-%d')}. "
            "ε error: mean squared difference from float on held-out network inputs. Size: bytes of the file."
        )


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
