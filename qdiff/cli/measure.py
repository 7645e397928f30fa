"""Measure finished runs by one protocol, and keep the results beside the images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdiff.cli.processes import choose_device
from qdiff.cli.run_manifest import Manifest
from qdiff.errors import UserError
from qdiff.evaluation.clip_score import load_clip
from qdiff.evaluation.extractors import create_extractor, weights_hash
from qdiff.evaluation.fidelity import require_torchmetrics
from qdiff.evaluation.image_sets import open_images
from qdiff.evaluation.measure import measure, possible
from qdiff.evaluation.reference import find_reference
from qdiff.evaluation.registry import METRICS, Metric, implied_metrics
from qdiff.evaluation.subject import Subject
from qdiff.io.files import written_whole

CACHE = "metrics.json"
# Images compared one by one with the float run's. SSIM is slow, and the mean over some hundreds is stable.
COMPARED = 256
# Runs with at most this many images are measured without a progress bar.
LONG = 5000


class Measuring:
    """Metrics of run folders.

    Args:
        extractor: name of the feature network.
        extractor_weights: file with its weights; None takes the bundled or cached one.
        reference: name or file of the reference statistics.
        metrics: names of metrics; see `qdiff.evaluation.registry.named_metrics`.
        clip_model: model of the metric "clip"; None takes the usual one.
        device: device of the networks; None takes CUDA if available.

    Raises:
        UserError: weights or statistics are missing, or do not fit each other.
    """

    def __init__(
        self,
        extractor: str,
        extractor_weights: str | None,
        reference: str,
        metrics: Sequence[str],
        clip_model: str | None = None,
        device: str | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.extractor = create_extractor(extractor, extractor_weights, self.device)
        self.reference = find_reference(reference, self.extractor)
        self.metrics, self.compared = tuple(metrics), COMPARED
        # Identifies the protocol in the cache, so that e.g. a retrained extractor makes cached results invalid.
        self.by = {
            "weights_hash": weights_hash(self.extractor),
            "reference_hash": self.reference.images_hash,
            "reference": self.reference.name,
            "clip_model": clip_model,
            "compared": COMPARED,
        }
        # Fail on a missing model now, not after hours of sampling.
        self.clip = load_clip(*([] if clip_model is None else [clip_model])) if "clip" in self.metrics else None
        if "fidelity" in self.metrics:
            require_torchmetrics()
        for name in self.metrics:
            part = METRICS[name].reference_part
            if part is not None and getattr(self.reference, part) is None:
                raise UserError(
                    f"the reference statistics {self.reference.name!r} hold too little for {name}; make them again "
                    "with scripts/prepare_reference.py, or leave it out of the table's metrics"
                )

    def run(self, folder: Path, manifest: Manifest, float_folder: Path | None) -> dict[str, Any]:
        """Return a run's metrics, from ``metrics.json`` if it belongs to these images and this protocol.

        Args:
            folder: the run folder.
            manifest: the run's manifest.
            float_folder: run folder of the float model with the same noise; None for that run itself.
        """
        images, file = folder / "img", folder / CACHE
        known: dict[str, Any] = {}
        if file.is_file() and file.stat().st_mtime >= images.stat().st_mtime:
            cached = _read_cache(file)
            known = cached if cached.get("by") == self.by else {}
            if float_folder is not None and file.stat().st_mtime < (float_folder / "img").stat().st_mtime:
                of_pairs = {m.columns[0].key for m in METRICS.values() if "float_images" in m.inputs}
                known = {k: v for k, v in known.items() if k not in of_pairs}
        found = {"by": self.by, **known}
        subject = self._subject(folder, manifest, float_folder)
        missing = [m.name for m in self._wanted(subject) if m.columns[0].key not in known]
        if missing:
            found |= measure(subject, missing)
        if found != known:
            with written_whole(file) as path:
                path.write_text(json.dumps(found, indent=1))
        return found

    def _subject(self, folder: Path, manifest: Manifest, float_folder: Path | None) -> Subject:
        return Subject(
            folder / "img",
            self.reference,
            self.extractor,
            float_images=None if float_folder is None else open_images(float_folder / "img"),
            prompts=manifest.config.get("prompts"),
            labels=manifest.labels,
            name=str(folder),
            clip=self.clip,
            compared=self.compared,
            device=self.device,
            progress=manifest.num_images > LONG,
        )

    def _wanted(self, subject: Subject) -> list[Metric]:
        """Return the table's metrics that this run allows: it may have too few images, or be the float row."""
        wanted = [name for name in self.metrics if subject.count >= METRICS[name].least_images]
        if subject.float_images is None:
            wanted = [name for name in wanted if "float_images" not in METRICS[name].inputs]
        return [METRICS[name] for name in (*wanted, *possible(subject, implied_metrics()))]


def _read_cache(file: Path) -> dict[str, Any]:
    """Return the cached results; an empty dict if the file is damaged."""
    try:
        cached = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cached if isinstance(cached, dict) else {}
