"""Compare samples with real images, with prompts, and with a float run of the same seeds."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qdiff.cli.processes import choose_device
from qdiff.cli.run_folder import installed_versions
from qdiff.cli.samples import Samples
from qdiff.errors import UserError
from qdiff.evaluation.clip_score import load_clip
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.fidelity import LPIPS_NETS, require_torchmetrics
from qdiff.evaluation.measure import check, measure, possible
from qdiff.evaluation.reference import FOREIGN_EXTRACTOR, ReferenceStatistics
from qdiff.evaluation.reference_set import ReferenceSet
from qdiff.evaluation.registry import METRICS, implied_metrics, metric_columns, optional_metrics
from qdiff.evaluation.subject import Subject
from qdiff.io.downloads import cache_folder
from qdiff.io.files import check_writable
from qdiff.io.markdown import markdown_table
from qdiff.io.prompt_lines import read_prompts

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "torch-fidelity", "torchmetrics", "transformers")


class Evaluation:
    """The evaluation that `scripts/evaluate.py` runs.

    Args:
        args: the script's options.

    Attributes:
        result: the results; set by `run`.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        reference_name, sample_path = (None, *args.paths)[-2:]
        self.samples = Samples(sample_path)
        self.reference = None if reference_name is None else ReferenceSet(reference_name)
        self.against = None if args.against is None else Samples(args.against)
        self.wanted = None if args.metrics is None else _names(args.metrics)
        self.subject = Subject(
            self.samples.images,
            float_images=None if self.against is None else self.against.images,
            labels=self.samples.manifest.labels,
            name=str(self.samples.path),
            lpips_weights=args.lpips_weights,
            lpips_net=args.lpips_net,
            adm_protocol=self._is_adm,
            device=choose_device(args.device),
            batch_size=args.batch_size,
            cache=None if args.no_cache else Path(args.cache or cache_folder() / "features"),
        )
        self.subject.prompts = self._prompts()
        self._check()
        if self.subject.prompts is not None:  # fail on a missing model now, not after 50,000 features
            self.subject.clip = load_clip(args.clip_model, args.download)

    @property
    def _uses_features(self) -> bool:
        if self.wanted is None:
            return self.reference is not None
        return any("extractor" in METRICS[m].inputs for m in self.wanted)

    @property
    def _is_adm(self) -> bool:
        """Whether two .npz files are compared, as guided-diffusion's evaluate.py does (inception score in order)."""
        if self.args.protocol is not None:
            return self.args.protocol == "adm"
        return all(str(path).endswith(".npz") for path in self.args.paths) and len(self.args.paths) == 2

    def _prompts(self) -> list[str] | None:
        if self.args.prompts is not None:
            return read_prompts(self.args.prompts, "--prompts")
        if self.args.clip and "prompts" not in self.samples.config:
            raise UserError(f"{self.samples.path} has no prompts in a run.json; give a file with --prompts")
        return self.samples.config["prompts"] if self.args.clip else None

    def _check(self) -> None:
        """Refuse impossible requests before any work."""
        args, samples, prompts = self.args, self.samples, self.subject.prompts
        if self.reference is None and self.wanted is None and self.against is None and prompts is None:
            raise UserError(
                "there is nothing to compare with; give a reference before the samples, or give --against, --prompts "
                "or --metrics isc"
            )
        if prompts is not None and len(prompts) != len(samples.images):
            raise UserError(
                f"there are {len(prompts)} prompts for the {len(samples.images)} images of {samples.path}; give "
                "one per image"
            )
        if args.lpips_weights is not None and self.against is None:
            raise UserError(
                "--lpips-weights needs --against; give the float run to compare with, or leave --lpips-weights out"
            )
        if args.lpips_weights is not None and not args.lpips_weights.is_file():
            url = LPIPS_NETS[args.lpips_net][0]
            raise UserError(f"--lpips-weights {args.lpips_weights} is not a file; download {url} and give its path")
        if self.against is not None:
            self._check_pairs()
        if self.reference is not None or self.wanted is not None:
            self._check_counts()
        if self._uses_features and self.subject.cache is not None:
            check_writable(self.subject.cache / "features.npz")

    def _check_pairs(self) -> None:
        require_torchmetrics()
        samples, against = self.samples, self.against
        ours, theirs = (s.config.get("seed") for s in (samples, against))
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{samples.path} has seed {ours} and {against.path} has {theirs}, so image i of one does "
                "not start from the noise of image i of the other; sample the float run with the same seed"
            )
        if len(samples.images) != len(against.images):
            raise UserError(
                f"{samples.path} has {len(samples.images)} images and {against.path} has "
                f"{len(against.images)}; compare runs with the same number of images"
            )
        ours, theirs = (next(s.images.batches(1)).shape[-2:] for s in (samples, against))
        if ours != theirs:
            sizes = [f"{width}×{height}" for height, width in (ours, theirs)]
            raise UserError(
                f"images of {samples.path} are {sizes[0]}, of {against.path} {sizes[1]}; sample both with one model"
            )

    def _check_counts(self) -> None:
        count, few = len(self.samples.images), METRICS["prc"].least_images
        for metric in self.wanted or ["fid"]:
            least = METRICS[metric].least_images
            if count < least:
                raise UserError(f"{metric} needs {least} or more images; {self.samples.path} has {count}")
        real = None if self.reference is None else self.reference.images
        if real is not None and len(real) < few:
            raise UserError(f"the reference {self.reference.name} has {len(real)} images; give it {few} or more")

    def run(self) -> dict[str, Any]:
        """Return the metrics, and everything a reader needs to compare them with others."""
        subject = self.subject
        if self._uses_features:
            # Fail on missing weights or statistics before any work.
            subject.extractor = self._extractor()
            subject.reference = self._statistics(subject.extractor)
        names = self._names()
        self.result: dict[str, Any] = {"samples": self.samples.about(), "metrics": measure(subject, names)}
        if self.against is not None:
            self.result["against"] = self.against.about()
        if subject.extractor is not None:
            self._describe_features(subject, names)
        versions = installed_versions(PACKAGES)
        self.result["packages"] = {name: versions.get(name) for name in PACKAGES}
        return self.result

    def _extractor(self) -> nn.Module:
        """Return the feature network: the one that was asked for, or else the one that made the statistics."""
        name = self.args.extractor
        if name is None:
            name = FOREIGN_EXTRACTOR if self.reference is None else self.reference.extractor
        return create_extractor(name, self.args.extractor_weights, self.subject.device)

    def _statistics(self, extractor: nn.Module) -> ReferenceStatistics | None:
        """Return the reference statistics, checked for the requested metrics; None without a reference."""
        subject, reference, wanted = self.subject, self.reference, self.wanted or ["fid"]
        if reference is None:
            check(subject, wanted)
            return None
        subject.reference = statistics = reference.statistics(extractor)
        # Metrics that need features of single images can compute them from the images in the file.
        of_features = [m for m in wanted if METRICS[m].reference_part == "features"]
        rest = [m for m in wanted if reference.images is None or m not in of_features]
        if statistics is not None and rest:
            check(subject, rest)
        needs_features = self.wanted is None or bool(of_features)
        return reference.completed(statistics, extractor, needs_features, subject.cache, subject.batch_size)

    def _names(self) -> list[str]:
        """Return the metrics to compute: the requested ones, or else all that the reference allows."""
        of_images = list(self.wanted or ())
        if self.wanted is None and self.reference is not None:
            of_images = possible(self.subject, [*optional_metrics(), *implied_metrics()])
        # Fidelity comes first: it may refuse the two runs, before the slow passes of the feature network.
        fidelity = ["fidelity"] if self.against is not None else []
        return [*fidelity, *of_images, *(["clip"] if self.subject.prompts is not None else [])]

    def _describe_features(self, subject: Subject, names: Sequence[str]) -> None:
        reference = subject.reference
        self.result["samples"]["pixels_hash"] = subject.features.pixels_hash
        self.result["protocol"] = {
            "extractor": subject.extractor.get_name(),
            "inception_score": "parts of 5,000, in order" if subject.adm_protocol else "10 parts, shuffled",
            "left_out": [m for m in optional_metrics() if m not in names and self.wanted is None],
        }
        if reference is not None:
            fields = ("name", "count", "extractor", "weights_hash", "images_hash")
            self.result["reference"] = {"given": self.reference.name} | {f: getattr(reference, f) for f in fields}


def table(result: dict[str, Any]) -> str:
    """Return the metrics of an evaluation as a markdown table, one per line."""
    row = result["metrics"]
    shown = [(column.heading, column.text(row)) for column in metric_columns() if column.value(row) is not None]
    reference = result.get("reference")
    head = f"{result['samples']['images']} images of {result['samples']['path']}"
    if reference is not None:
        count = f" ({reference['count']} images)" if reference["count"] else ""
        head += f", reference {reference['name']}{count}, features of {reference['extractor']}"
    if "against" in result:
        head += f"; fidelity to {result['against']['path']}, image by image"
    lines = [head, "", markdown_table(shown, ["metric", "value"])]
    if left_out := result.get("protocol", {}).get("left_out"):
        lines += ["", f"Left out, for too few images or missing in the reference: {', '.join(left_out)}."]
    return "\n".join(lines)


def _names(text: str) -> Sequence[str]:
    names = [part.strip() for part in text.split(",")]
    known = optional_metrics()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--metrics has no {unknown[0]!r}; choose from {', '.join(known)}")
    return names
