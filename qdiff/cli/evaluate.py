"""Compare samples with real images, with prompts, and with a float run of the same seeds."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qdiff.cli.processes import choose_device
from qdiff.cli.run_folder import installed_versions
from qdiff.cli.run_manifest import read_manifest
from qdiff.errors import UserError
from qdiff.evaluation.clip_score import clip_scores, load_clip
from qdiff.evaluation.conditions import asked_share
from qdiff.evaluation.extractors import REPOSITORY, create_extractor, extractor_spec
from qdiff.evaluation.features import cached_features
from qdiff.evaluation.fidelity import LPIPS_NETS, compare_runs, require_torchmetrics
from qdiff.evaluation.image_files import check_single_run
from qdiff.evaluation.image_sets import FolderImages, ImageSet, NpzImages, holds_images, open_images
from qdiff.evaluation.metrics import LEAST_IMAGES, NEEDS, check_metrics, compute_metrics, possible_metrics
from qdiff.evaluation.reference import (
    BUNDLED,
    FOREIGN_EXTRACTOR,
    ReferenceStatistics,
    find_reference,
    holds_statistics,
    load_reference,
    reference_of,
)
from qdiff.io.downloads import cache_folder
from qdiff.io.files import check_writable
from qdiff.io.prompt_lines import prompt_lines
from qdiff.report.columns import METRICS

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "torch-fidelity", "torchmetrics", "transformers")


class Samples:
    """Images that were given by a path: a folder, the folder of a run, or a .npz file.

    Attributes:
        path: as given.
        images: what they are.
        manifest: run.json of a run's folder, else empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        inside = self.path / "img"
        if self.path.is_dir() and not inside.is_dir():
            check_single_run(self.path)
        self.images: ImageSet = open_images(inside if inside.is_dir() else self.path)
        self.manifest: dict[str, Any] = {}
        if isinstance(self.images, FolderImages) and self.images.left_out:
            count, rest = len(self.images), self.images.left_out
            print(f"{self.path}: the {count} images directly in it; not the {rest} in folders below", file=sys.stderr)
        file = (self.path if inside.is_dir() else self.path.parent) / "run.json"
        if file.is_file() and (inside.is_dir() or self.path.name in ("img", "samples.npz")):
            try:
                self.manifest = read_manifest(file)
            except ValueError as error:
                raise UserError(f"{file} is not a run's manifest ({error}); remove it or restore it") from error

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest.get("config", {})

    def about(self) -> dict[str, Any]:
        """Return what is known of them, for the JSON."""
        kept = {k: self.config[k] for k in ("script", "method", "seed", "sampler", "ptq") if k in self.config}
        return {"path": str(self.path), "images": len(self.images), **({"run": kept} if kept else {})}


class Evaluation:
    """What `scripts/evaluate.py` does.

    Args:
        args: its options.

    Attributes:
        result: what was found; there after `run`.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.reference_name, sample_path = (None, *args.paths)[-2:]
        self.samples = Samples(sample_path)
        self.real = self._real_images()
        self.against = None if args.against is None else Samples(args.against)
        self.wanted = None if args.metrics is None else _names(args.metrics)
        self.device = choose_device(args.device)
        self.cache = None if args.no_cache else Path(args.cache or cache_folder() / "features")
        self.prompts = self._prompts()
        self._check()
        # Fail on a missing model now, not after 50,000 features.
        self.clip = None if self.prompts is None else load_clip(args.clip_model, args.download)

    @property
    def _uses_features(self) -> bool:
        return self.reference_name is not None or self.wanted is not None

    def _real_images(self) -> ImageSet | None:
        """Return the reference's images; None of statistics that hold none, or without a reference."""
        if self.reference_name is None:
            return None
        path = Path(self.reference_name)
        if path.is_dir() or (path.suffix == ".npz" and not holds_statistics(path)):
            return Samples(path).images
        # ADM's files hold images beside the statistics of the whole set; its precision and recall use them.
        return NpzImages(path) if holds_images(path) else None

    def _prompts(self) -> list[str] | None:
        file = self.args.prompts
        if file is None:
            if self.args.clip and "prompts" not in self.samples.config:
                raise UserError(f"{self.samples.path} has no prompts in a run.json; name a file with --prompts")
            return self.samples.config["prompts"] if self.args.clip else None
        try:
            # As txt2img.py reads them: without empty lines, and without the mark that editors on Windows begin with.
            return prompt_lines(Path(file).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompts {file} cannot be read ({error}); give a text file, one prompt per line"
            ) from None

    def _check(self) -> None:
        """Refuse what cannot be done, before any work."""
        args, samples = self.args, self.samples
        if not self._uses_features and self.against is None and self.prompts is None:
            raise UserError(
                "there is nothing to compare with; name a reference before the samples, or give --against, --prompts "
                "or --metrics isc"
            )
        if self.prompts is not None and len(self.prompts) != len(samples.images):
            raise UserError(
                f"there are {len(self.prompts)} prompts for the {len(samples.images)} images of {samples.path}; give "
                "one per image"
            )
        if args.lpips_weights is not None and self.against is None:
            raise UserError("--lpips-weights is for --against; name the float run that images are compared with")
        if args.lpips_weights is not None and not args.lpips_weights.is_file():
            url = LPIPS_NETS[args.lpips_net][0]
            raise UserError(f"--lpips-weights {args.lpips_weights} is no file; fetch {url} and name it")
        if self.against is not None:
            self._check_pairs()
        if self._uses_features:
            self._check_counts()
            if self.cache is not None:
                check_writable(self.cache / "features.npz")

    def _check_pairs(self) -> None:
        require_torchmetrics()
        samples, against = self.samples, self.against
        ours, theirs = (s.config.get("seed") for s in (samples, against))
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{samples.path} has seed {ours} and {against.path} has {theirs}, so image i of one has not "
                "the noise of image i of the other; sample the float run with the same seed"
            )
        if len(samples.images) != len(against.images):
            raise UserError(
                f"{samples.path} has {len(samples.images)} images and {against.path} has "
                f"{len(against.images)}; compare runs of as many images"
            )
        ours, theirs = (next(s.images.batches(1)).shape[-2:] for s in (samples, against))
        if ours != theirs:
            sizes = [f"{width}×{height}" for height, width in (ours, theirs)]
            raise UserError(
                f"images of {samples.path} are {sizes[0]}, of {against.path} {sizes[1]}; sample both with one model"
            )

    def _check_counts(self) -> None:
        count, few = len(self.samples.images), LEAST_IMAGES["prc"]
        for metric in self.wanted or ["fid"]:
            if count < LEAST_IMAGES[metric]:
                raise UserError(
                    f"{metric} needs {LEAST_IMAGES[metric]} or more images; {self.samples.path} has {count}"
                )
        if self.real is not None and len(self.real) < few:
            raise UserError(f"the reference {self.reference_name} has {len(self.real)} images; give it {few} or more")

    def run(self) -> dict[str, Any]:
        """Return the metrics, and all that a reader must know to compare them with others'."""
        self.result: dict[str, Any] = {"samples": self.samples.about(), "metrics": {}}
        extractor = statistics = None
        if self._uses_features:
            # Missing weights and statistics show before any work.
            extractor = create_extractor(self._extractor_name(), self.args.extractor_weights, self.device)
            statistics = self._statistics(extractor)
        if self.against is not None:
            self._compare_with_float()
        if extractor is not None:
            self._compare_features(extractor, self._reference(extractor, statistics))
        if self.prompts is not None:
            self._compare_with_prompts()
        versions = installed_versions(PACKAGES)
        self.result["packages"] = {name: versions.get(name) for name in PACKAGES}
        return self.result

    def _extractor_name(self) -> str:
        """Return the network to use: the one asked for, or the one that made the statistics."""
        if self.args.extractor is not None:
            return self.args.extractor
        name = str(self.reference_name)
        path = REPOSITORY / BUNDLED[name] if name in BUNDLED and self.real is None else Path(name)
        return load_reference(path).extractor if holds_statistics(path) else FOREIGN_EXTRACTOR

    def _statistics(self, extractor: nn.Module) -> ReferenceStatistics | None:
        """Return the statistics that were named, fit for the metrics that were asked for; None where images were."""
        count, wanted = len(self.samples.images), self.wanted or ["fid"]
        if self.reference_name is None:
            check_metrics(wanted, count, None, extractor)
            return None
        if self.real is not None and not holds_statistics(self.reference_name):
            return None
        statistics = find_reference(self.reference_name, extractor)
        # What needs features of single images can have them of the images in the file.
        rest = [m for m in wanted if self.real is None or NEEDS.get(m) != "features"]
        if rest:
            check_metrics(rest, count, statistics, extractor)
        return statistics

    def _reference(self, extractor: nn.Module, statistics: ReferenceStatistics | None) -> ReferenceStatistics | None:
        """Return the statistics with what was missing added, or made of the images that were named."""
        needed = self.wanted is None or any(NEEDS.get(m) == "features" for m in self.wanted)
        if self.real is None or (statistics is not None and (statistics.features is not None or not needed)):
            return statistics
        found = cached_features(self.real, extractor, self.cache, self.args.batch_size)
        if statistics is None:
            return reference_of(found, str(self.reference_name))
        return dataclasses.replace(statistics, features=found.features.numpy())

    def _compare_features(self, extractor: nn.Module, reference: ReferenceStatistics | None) -> None:
        args, images = self.args, self.samples.images
        metrics = possible_metrics(len(images), reference) if self.wanted is None else self.wanted
        features = cached_features(images, extractor, self.cache, args.batch_size)
        found = compute_metrics(features, reference, extractor, metrics, adm_protocol=self._is_adm)
        labels = self.samples.manifest.get("labels")
        if labels is not None and extractor_spec(extractor.get_name()).classes is not None and self.wanted is None:
            found["asked_share"] = asked_share(features, labels, extractor.get_name())
        self.result["metrics"] |= found
        self.result["samples"]["pixels_hash"] = features.pixels_hash
        self.result["protocol"] = {
            "extractor": extractor.get_name(),
            "inception_score": "parts of 5,000, in order" if self._is_adm else "10 parts, shuffled",
            "left_out": [m for m in LEAST_IMAGES if m not in metrics and self.wanted is None],
        }
        if reference is not None:
            names = ("name", "count", "extractor", "weights_hash", "images_hash")
            self.result["reference"] = {"given": str(self.reference_name)} | {n: getattr(reference, n) for n in names}

    @property
    def _is_adm(self) -> bool:
        """Two .npz files: guided-diffusion's evaluate.py, whose inception score goes over images in order."""
        if self.args.protocol is not None:
            return self.args.protocol == "adm"
        return all(str(path).endswith(".npz") for path in self.args.paths) and len(self.args.paths) == 2

    def _compare_with_float(self) -> None:
        args = self.args
        self.result["metrics"] |= compare_runs(
            self.samples.images,
            self.against.images,
            lpips_weights=args.lpips_weights,
            lpips_net=args.lpips_net,
            device=self.device,
        )
        self.result["against"] = self.against.about()

    def _compare_with_prompts(self) -> None:
        self.result["metrics"] |= clip_scores(self.samples.images, self.prompts, self.clip, device=self.device)


def table(result: dict[str, Any]) -> str:
    """Return the metrics of an evaluation as a markdown table, one per line."""
    row = result["metrics"]
    shown = [(column.heading, column.text(row)) for column in METRICS if column.value(row) is not None]
    reference = result.get("reference")
    head = f"{result['samples']['images']} images of {result['samples']['path']}"
    if reference is not None:
        count = f" ({reference['count']} images)" if reference["count"] else ""
        head += f", reference {reference['name']}{count}, features of {reference['extractor']}"
    if "against" in result:
        head += f"; fidelity to {result['against']['path']}, image by image"
    lines = [head, "", "| metric | value |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in shown)]
    if left_out := result.get("protocol", {}).get("left_out"):
        lines += ["", f"Left out, for too few images or missing in the reference: {', '.join(left_out)}."]
    return "\n".join(lines)


def _names(text: str) -> Sequence[str]:
    names = [part.strip() for part in text.split(",")]
    unknown = [name for name in names if name not in LEAST_IMAGES]
    if unknown:
        raise UserError(f"--metrics {unknown[0]!r} is none of {', '.join(LEAST_IMAGES)}; correct it")
    return names
