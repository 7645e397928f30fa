"""The pipelines of class- and text-conditional latent diffusion models."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import load_config
from ldm.locate import ImageSize, big_or_bundled
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.options import CLASS_CKPT, CLASS_CONFIG, TEXT_CKPT, TEXT_CONFIG, chosen_sampler
from ldm.pipeline import BUNDLED, LatentPipeline, latent_options
from ldm.prompts import asked_classes
from qdiff.errors import UserError, require_at_least
from qdiff.io.prompt_lines import read_prompts
from qdiff.sampling import SamplerOptions
from qdiff.sampling.registry import find_sampler

PROMPT = "a painting of a virus monster playing guitar"


class GuidedPipeline(LatentPipeline):
    """The common base of the two conditional pipelines; see `LatentPipeline` for its arguments."""

    conditional = True

    def __init__(self, *args: Any, precision: str = "full", **others: Any) -> None:
        super().__init__(*args, precision=precision, **others)
        self.config["precision"] = precision


def _check_guided(args: Namespace) -> None:
    """Raise a `UserError` if options of `ldm.options.add_guided_options` contradict each other."""
    require_at_least(0, {"--n_rows": args.n_rows, "--seed": args.seed})
    if args.skip_grid and args.skip_save and not getattr(args, "save_npz", True):
        raise UserError("--skip_grid and --skip_save together leave no output; leave one of them out")
    for name in ("n_samples", "n_iter", "n_batch", "max_images", "batch_size"):
        require_at_least(1, {f"--{name}": getattr(args, name, None)})


class ClassPipeline(GuidedPipeline):
    """A class-conditional model: image i shows class i mod the number of classes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._require_encoder("ClassEmbedder", "class")
        self.classes = self._condition_stage.params.get("n_classes", 1000) - 1  # the last one means "no class"
        self.labels = [self.label(i) for i in range(self.count)]
        self.config["num_images"] = self.count

    @classmethod
    def from_args(cls, args: Namespace) -> ClassPipeline:
        """Return the pipeline that the options of `ldm.options.add_class_options` describe.

        Raises:
            UserError: the options contradict each other.
        """
        _check_guided(args)
        config, weights, note = big_or_bundled(args.config, args.ckpt, CLASS_CONFIG, CLASS_CKPT, BUNDLED["class"])
        options = latent_options(chosen_sampler(args, {}), args.ddim_steps, args.ddim_eta, args.scale)
        made = cls(
            config,
            weights,
            options,
            args.seed,
            args.n_samples,
            args.batch_size or args.n_batch,
            precision=args.precision,
            recompute=not args.no_grad_ckpt,
        )
        made.notes += [note] if note else []
        made.note_steps("--ddim_steps")
        return made

    def label(self, index: int) -> int:
        """Return the class of an image."""
        return index % self.classes

    def conditions(self, rows: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        return self._contexts([self.label(i) for i in rows])


class TextPipeline(GuidedPipeline):
    """A text-conditional model: image i shows prompt i mod the number of prompts.

    Args:
        prompts: one prompt per image.
        calibration_prompts: prompts of the images that a calibration set is recorded from; None takes ``prompts``.
        others: see `LatentPipeline`.
    """

    runs = Path("outputs") / "txt2img-samples"

    def __init__(
        self,
        config: str | Path,
        weights: str | Path,
        options: SamplerOptions,
        seed: int,
        prompts: Sequence[str],
        batch_size: int,
        calibration_prompts: Sequence[str] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(config, weights, options, seed, max(1, len(prompts)), batch_size, **others)
        self._require_encoder("FrozenCLIPEmbedder", "text")
        self.prompts, self.count = list(prompts), len(prompts)
        self.calibration_prompts = self.prompts if calibration_prompts is None else list(calibration_prompts)
        pretrained = self.model_config.get("pretrained") or {}
        self.labels = asked_classes(self.prompts, pretrained.get("class_words", []))
        self.config |= {"prompts": self.prompts, "calibration_prompts": self.calibration_prompts}

    @classmethod
    def from_args(cls, args: Namespace) -> TextPipeline:
        """Return the pipeline that the options of `ldm.options.add_text_options` describe.

        Raises:
            UserError: the options contradict each other, or a prompt file cannot be read.
        """
        kind = chosen_sampler(args, {"plms": "plms", "dpm": "dpm_solver"})
        if args.ddim_eta != 0 and not find_sampler(kind).has_eta:
            option = next((f"--{name}" for name in ("plms", "dpm") if getattr(args, name)), f"--sampler {kind}")
            raise UserError(f"{option} has no η, so --ddim_eta {args.ddim_eta} contradicts it; leave one out")
        _check_guided(args)
        together = getattr(args, "n_batch", args.n_samples)
        config, weights, note = big_or_bundled(args.config, args.ckpt, TEXT_CONFIG, TEXT_CKPT, BUNDLED["text"])
        code = together if args.fixed_code else None
        notes = [note] if note else []
        if args.from_file and args.prompt:
            notes.append("--from-file replaces --prompt")
        prompt = args.prompt or (load_config(config).get("pretrained") or {}).get("prompt", PROMPT)
        lines = [prompt] * args.n_samples
        if args.from_file:
            lines = _prompts_of(args, args.from_file, "--from-file", notes)
        asked = lines if args.from_file else [prompt]
        if args.cali_prompts:
            asked = _prompts_of(args, args.cali_prompts, "--cali_prompts", notes)
        made = cls(
            config,
            weights,
            latent_options(kind, args.ddim_steps, args.ddim_eta, args.scale, code),
            args.seed,
            (lines * args.n_iter)[: cls._limit(args)],
            args.batch_size or together,
            asked,
            size=ImageSize(args.H, args.W, args.C, args.f),
            precision=args.precision,
            recompute=not args.no_grad_ckpt,
        )
        made.notes = notes + made.notes
        made.note_steps("--ddim_steps")
        return made

    @staticmethod
    def _limit(args: Namespace) -> int | None:
        return args.max_images

    def load(self, device: torch.device, network: bool = True) -> None:
        super().load(device, network)
        encoder: FrozenCLIPEmbedder = self.model.cond_stage_model
        for prompt in dict.fromkeys(self.prompts + self.calibration_prompts):
            if cut := encoder.cut(prompt):
                limit = f"the text encoder takes {encoder.max_length} tokens"
                self.notes.append(f"{limit}; the end of the prompt {prompt!r} was cut off: {cut!r}")

    def conditions(self, rows: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        prompts = self.calibration_prompts if calibration else self.prompts
        return self._contexts([prompts[i % len(prompts)] for i in rows])


def _prompts_of(args: Namespace, path: str, option: str, notes: list[str]) -> list[str]:
    """Return the prompts of the file that an option names; a missing file gives no prompts in a dry run."""
    if getattr(args, "dry_run", False) and not Path(path).exists():
        notes.append(f"{option} {path} does not exist; the plan is shown without its prompts")
        return []
    return read_prompts(path, option)


class CaptionPipeline(TextPipeline):
    """The pipeline of EDA-DM's scripts/sample_txt2img.py: ``--n_samples`` images, ``--n_batch`` per batch."""

    runs = Path("runs")

    @staticmethod
    def _limit(args: Namespace) -> int:
        return args.n_samples if args.max_images is None else min(args.max_images, args.n_samples)
