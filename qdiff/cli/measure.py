"""Measure finished runs by one protocol; what was measured is kept beside the images."""

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
# Images that are compared with the float run's, one by one: the mean of some hundreds is steady, and SSIM is slow.
COMPARED = 256
# Below that a progress bar is noise.
LONG = 5000


class Measuring:
    """Metrics of run folders.

    Args:
        extractor: name of the feature network.
        extractor_weights: its weights file; None takes the bundled or cached one.
        reference: name or file of the reference statistics.
        metrics: names, see `qdiff.evaluation.registry.named_metrics`.
        clip_model: for "clip"; None takes the usual one.
        device: where networks run; None takes CUDA where there is one.

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
        # A retrained extractor, or digits of another size, would otherwise go unnoticed in the cache.
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
                    f"the reference statistics {self.reference.name!r} hold too little for {name}; make them anew "
                    "with scripts/prepare_reference.py, or leave it out of the table's metrics"
                )

    def run(self, folder: Path, manifest: Manifest, float_folder: Path | None) -> dict[str, Any]:
        """Return a run's metrics, out of ``metrics.json`` where they are of these images by this protocol.

        Args:
            folder: the run.
            manifest: its run.json.
            float_folder: run of the float model from the same noise; None for that run itself.
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
        """Return what the table asks for, less what a row of few images and the float row itself cannot have."""
        wanted = [name for name in self.metrics if subject.count >= METRICS[name].least_images]
        if subject.float_images is None:
            wanted = [name for name in wanted if "float_images" not in METRICS[name].inputs]
        return [METRICS[name] for name in (*wanted, *possible(subject, implied_metrics()))]


def _read_cache(file: Path) -> dict[str, Any]:
    """Return what was measured before; nothing where the file is damaged."""
    try:
        cached = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cached if isinstance(cached, dict) else {}
