"""Measure finished runs by one protocol; what was measured is kept beside the images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qdiff.cli.processes import choose_device
from qdiff.errors import UserError
from qdiff.evaluation.clip_score import clip_scores, load_clip
from qdiff.evaluation.conditions import asked_share
from qdiff.evaluation.extractors import create_extractor, extractor_spec, weights_hash
from qdiff.evaluation.fidelity import compare_runs, require_torchmetrics
from qdiff.evaluation.image_sets import FirstImages, open_images
from qdiff.evaluation.metrics import LEAST_IMAGES, compute_metrics, possible_metrics
from qdiff.evaluation.reference import find_reference
from qdiff.io.files import written_whole

CACHE = "metrics.json"
# Images that are compared with the float run's, one by one: the mean of some hundreds is steady, and SSIM is slow.
COMPARED = 256
# Below that a progress bar is noise.
LONG = 5000
# The number whose presence tells that a metric was measured.
KEYS = {"prc": "precision", "clip": "clip_score", "fidelity": "psnr", "asked": "asked_share"}


class Measuring:
    """Metrics of run folders.

    Args:
        extractor: name of the feature network.
        extractor_weights: its weights file; None takes the bundled or cached one.
        reference: name or file of the reference statistics.
        metrics: names out of `qdiff.cli.table_file.MEASURABLE`.
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
        self.extractor_weights = extractor_weights
        self.classes = extractor_spec(extractor).classes
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
        possible = self._possible(max(LEAST_IMAGES.values()))
        impossible = [m for m in self.metrics if m in LEAST_IMAGES and m not in possible]
        if impossible:
            raise UserError(
                f"the reference statistics {self.reference.name!r} hold too little for {impossible[0]}; make them anew "
                "with scripts/prepare_reference.py, or leave it out of the table's metrics"
            )

    def _possible(self, count: int) -> list[str]:
        return possible_metrics(count, self.reference)

    def run(self, folder: Path, manifest: dict[str, Any], float_folder: Path | None) -> dict[str, Any]:
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
                known = {k: v for k, v in known.items() if k != KEYS["fidelity"]}
        found = {"by": self.by, **known}
        lacking = [m for m in self._wanted(manifest, float_folder) if KEYS.get(m, m) not in known]
        for measure in self._measures(lacking):
            found |= measure(images, manifest, float_folder)
        if found != known:
            with written_whole(file) as path:
                path.write_text(json.dumps(found, indent=1))
        return found

    def _wanted(self, manifest: dict[str, Any], float_folder: Path | None) -> list[str]:
        possible = {*self._possible(manifest["num_images"]), "clip", "fidelity"}
        wanted = [m for m in self.metrics if m in possible and (m != "fidelity" or float_folder is not None)]
        # An extractor of other classes than the model's has nothing to say of what was asked for.
        if manifest.get("labels") is not None and self.classes is not None:
            wanted.append("asked")
        return wanted

    def _measures(self, lacking: list[str]) -> list[Callable[[Path, dict[str, Any], Path | None], dict[str, Any]]]:
        """Return what to call for the metrics that lack; those of features share one pass."""
        of_features = [m for m in lacking if m in LEAST_IMAGES]
        measures = [lambda images, manifest, _: self._features(images, manifest, of_features)] if of_features else []
        by_name = {"clip": self._clip, "fidelity": self._fidelity, "asked": self._asked}
        return measures + [by_name[m] for m in lacking if m in by_name]

    def _features(self, images: Path, manifest: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
        return compute_metrics(images, self.reference, self.extractor, metrics, progress=manifest["num_images"] > LONG)

    def _asked(self, images: Path, manifest: dict[str, Any], _: Path | None) -> dict[str, Any]:
        name = self.extractor.get_name()
        return {"asked_share": asked_share(images, manifest["labels"], name, self.extractor_weights)}

    def _clip(self, images: Path, manifest: dict[str, Any], _: Path | None) -> dict[str, Any]:
        prompts = manifest["config"].get("prompts")
        if prompts is None:
            raise UserError(f"{images.parent} has no prompts in its run.json, which clip needs; leave clip out")
        return clip_scores(open_images(images), prompts, self.clip, device=self.device)

    def _fidelity(self, images: Path, manifest: dict[str, Any], float_folder: Path) -> dict[str, Any]:
        ours, theirs = (FirstImages(open_images(f), COMPARED) for f in (images, float_folder / "img"))
        return compare_runs(ours, theirs, device=self.device, progress=False)


def _read_cache(file: Path) -> dict[str, Any]:
    """Return what was measured before; nothing where the file is damaged."""
    try:
        cached = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cached if isinstance(cached, dict) else {}
