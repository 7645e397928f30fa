"""The pipelines of latent diffusion models: unconditional, by class, by text."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import load_latent_diffusion
from ldm.config import REPOSITORY, load_config
from ldm.locate import ImageSize, big_or_bundled, find_checkpoint, how_to_get, latent_shape
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.util import Checkpointed
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.options import CLASS_CKPT, CLASS_CONFIG, TEXT_CKPT, TEXT_CONFIG, chosen_sampler
from ldm.prompts import asked_classes, read_prompts
from ldm.schedule import build_schedule, parameterization
from ldm.sizes import check_sizes
from ldm.util import instantiate_from_config
from qdiff.config import RangeMethod
from qdiff.errors import UserError, require_at_least
from qdiff.interface import SteppedNetwork
from qdiff.pipeline import Pipeline
from qdiff.sampling import Sampler, SamplerOptions
from qdiff.sampling.registry import find_sampler

BUNDLED = {name: REPOSITORY / "models" / "ldm" / f"digits_{name}" for name in ("vq", "class", "text")}
UNCONDITIONAL = "__is_unconditional__"
PROMPT = "a painting of a virus monster playing guitar"


def latent_options(kind: str, steps: int, eta: float = 0.0, scale: float = 1.0, fixed_code: int | None = None):
    """Return `SamplerOptions` as latent diffusion samples: timesteps begin at 1, and the last step ends at ᾱ_0."""
    return SamplerOptions(kind, steps, offset=1, ends_clean=False, eta=eta, scale=scale, fixed_code=fixed_code)


class LatentPipeline(Pipeline):
    """A latent diffusion model; see `Pipeline`.

    Args:
        config, weights: its YAML file and checkpoint.
        options: of the sampler, e.g. from `latent_options`.
        seed: the noise of image i depends on (seed, i) alone.
        count: how many images.
        batch_size: images at a time.
        size: of the images, where it is not the model's.
        precision: ``autocast`` calls the network in half precision on CUDA; or ``full``.
        recompute: fitting computes activations of blocks again instead of keeping them, where the config says so.

    Raises:
        UserError: the config or a number is wrong.
    """

    def __init__(
        self,
        config: str | Path,
        weights: str | Path,
        options: SamplerOptions,
        seed: int,
        count: int,
        batch_size: int,
        size: ImageSize = ImageSize(),  # noqa: B008, frozen
        precision: str = "full",
        recompute: bool = True,
    ) -> None:
        from omegaconf import OmegaConf

        self.model_config = load_config(config)
        self.weights, self._origin = Path(weights), config
        self._precision, self._recompute = precision, recompute
        shape = latent_shape(self.model_config, size)
        check_sizes(self.model_config, f"config file {config}", shape)
        params = self.model_config.model.params
        sampler = Sampler(build_schedule(params), shape, options, seed, parameterization(params))
        name = Path(config).parent.name if Path(config).stem == "config" else Path(config).stem
        super().__init__(name, sampler, count, batch_size)
        self.eda_dm = OmegaConf.to_container(self.model_config.get("eda_dm") or OmegaConf.create({}), resolve=True)
        self.config = {
            "model": OmegaConf.to_container(self.model_config.model, resolve=True),
            "weights": str(weights),
            "latent_shape": list(shape),
            "sampler": {
                "kind": options.kind,
                "steps": options.steps,
                "eta": options.eta,
                "scale": options.scale,
                "fixed_code": options.fixed_code,
            },
        }

    @property
    def _condition_stage(self) -> Any:
        return self.model_config.model.params.get("cond_stage_config", UNCONDITIONAL)

    def _require_encoder(self, name: str, kind: str) -> None:
        if not str(getattr(self._condition_stage, "target", "")).endswith(f".{name}"):
            raise UserError(f"{self._origin} is not a {kind}-conditional model; use the script of its family")

    def build_network(self) -> tuple[SteppedNetwork, tuple[int, int] | None]:
        """Return the UNet without weights, on the meta device, and (L, D) of the context that it takes, or None."""
        with torch.device("meta"):
            network = instantiate_from_config(self.model_config.model.params.unet_config)
            encoder = instantiate_from_config(self._condition_stage)
        return network, _context_shape(network, encoder)

    def load(self, device: torch.device, network: bool = True) -> None:
        if not self.weights.is_file():
            raise UserError(f"checkpoint {self.weights} does not exist; {how_to_get(self.model_config)}")
        self.model: LatentDiffusion = load_latent_diffusion(self.model_config, self.weights, network)
        if not self._recompute:
            for module in self.model.modules():
                if isinstance(module, Checkpointed):
                    module.use_checkpoint = False
        self.network = self.model.network
        if network:
            self.move_to(device)
        else:
            self.device = device

    def move_to(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device)

    @property
    def context_shape(self) -> tuple[int, int] | None:
        return _context_shape(self.network, self.model.cond_stage_model)

    def _contexts(self, values: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """Encode values, and the absence of a value unless the guidance scale makes it irrelevant."""
        nothing = self.model.cond_stage_model.unconditional
        condition = self.model.condition(values)
        return condition, None if self.sampler.options.scale == 1.0 else self.model.condition([nothing] * len(values))

    def precision(self) -> contextlib.AbstractContextManager:
        if self._precision == "autocast" and self.device.type == "cuda":
            return torch.autocast("cuda")
        return contextlib.nullcontext()

    def to_images(self, x_0: Tensor) -> Tensor:
        with self.precision():
            return self.model.decode(x_0).float()


def _context_shape(network: SteppedNetwork, encoder: Any) -> tuple[int, int] | None:
    # A text is padded to the encoder's length; a class is one token.
    return None if encoder is None else (getattr(encoder, "max_length", 1), network.context_dim)


class UnconditionalPipeline(LatentPipeline):
    """A model without conditions."""

    def __init__(
        self, config: str | Path, weights: str | Path, options: SamplerOptions, seed: int, count: int, batch_size: int
    ) -> None:
        super().__init__(config, weights, options, seed, count, batch_size)
        if self._condition_stage != UNCONDITIONAL:
            raise UserError(
                f"{weights} is a conditional model; use scripts/sample_diffusion_ldm_imagenet.py or scripts/txt2img.py"
            )
        self.config["num_images"] = count

    @classmethod
    def from_args(cls, args: Namespace) -> UnconditionalPipeline:
        """Return what the options of `ldm.options.add_unconditional_options` name.

        Raises:
            UserError: they contradict each other.
        """
        weights = find_checkpoint(args.resume_base) if args.resume_base else BUNDLED["vq"] / "model.safetensors"
        kind = chosen_sampler(args, {"dpm": "dpm_solver", "vanilla_sample": "ancestral"})
        asked = getattr(args, "a_range", None)  # of commands that quantize
        if args.a_min_max and asked not in (None, RangeMethod.MIN_MAX.value):
            raise UserError(f"--a_min_max and --a_range {asked} contradict each other; leave one of them out")
        require_at_least(1, {"--n_samples": args.n_samples, "--batch_size": args.batch_size})
        require_at_least(0, {"--seed": args.seed})
        # The published default of η is 1 whatever the sampler.
        options = latent_options(kind, args.custom_steps, args.eta if find_sampler(kind).has_eta else 0.0)
        config, batch_size = weights.with_name("config.yaml"), args.batch_size or 10
        made = cls(config, weights, options, args.seed, args.n_samples, batch_size)
        if args.a_min_max:
            made.act_range = RangeMethod.MIN_MAX
        made.note_steps("--custom_steps")
        return made


class GuidedPipeline(LatentPipeline):
    """What the two conditional pipelines share."""

    conditional = True

    def __init__(
        self,
        config: str | Path,
        weights: str | Path,
        options: SamplerOptions,
        seed: int,
        count: int,
        batch_size: int,
        size: ImageSize = ImageSize(),  # noqa: B008, frozen
        precision: str = "full",
        recompute: bool = True,
    ) -> None:
        super().__init__(config, weights, options, seed, count, batch_size, size, precision, recompute)
        self.config["precision"] = precision


def _check_guided(args: Namespace) -> None:
    """Raise a `UserError` where options of `ldm.options.add_guided_options` contradict each other."""
    require_at_least(0, {"--n_rows": args.n_rows, "--seed": args.seed})
    if args.skip_grid and args.skip_save and not getattr(args, "save_npz", True):
        raise UserError("--skip_grid and --skip_save together leave nothing; leave one of them out")
    for name in ("n_samples", "n_iter", "n_batch", "max_images", "batch_size"):
        require_at_least(1, {f"--{name}": getattr(args, name, None)})


class ClassPipeline(GuidedPipeline):
    """A class-conditional model: image i shows class i mod their number."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._require_encoder("ClassEmbedder", "class")
        self.classes = self._condition_stage.params.get("n_classes", 1000) - 1  # the last one is "no class"
        self.labels = [self.label(i) for i in range(self.count)]
        self.config["num_images"] = self.count

    @classmethod
    def from_args(cls, args: Namespace) -> ClassPipeline:
        """Return what the options of `ldm.options.add_class_options` name.

        Raises:
            UserError: they contradict each other.
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
    """A text-conditional model: image i shows prompt i mod their number.

    Args:
        prompts: of the images, as many as there are.
        calibration_prompts: of the images that a calibration set is recorded from; None takes ``prompts``.
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
        """Return what the options of `ldm.options.add_text_options` name.

        Raises:
            UserError: they contradict each other, or a prompt file cannot be read.
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
            notes.append("--from-file takes the place of --prompt")
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
                self.notes.append(f"{limit}; of the prompt {prompt!r} this was cut: {cut!r}")

    def conditions(self, rows: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        prompts = self.calibration_prompts if calibration else self.prompts
        return self._contexts([prompts[i % len(prompts)] for i in rows])


def _prompts_of(args: Namespace, path: str, option: str, notes: list[str]) -> list[str]:
    """Return the prompts of the file that an option names; of one that is missing, none in a dry run."""
    if getattr(args, "dry_run", False) and not Path(path).exists():
        notes.append(f"{option} {path} does not exist: the plan is shown without its prompts")
        return []
    return read_prompts(path, option)


class CaptionPipeline(TextPipeline):
    """What EDA-DM's scripts/sample_txt2img.py samples: ``--n_samples`` images, ``--n_batch`` at a time."""

    runs = Path("runs")

    @staticmethod
    def _limit(args: Namespace) -> int:
        return args.n_samples if args.max_images is None else min(args.max_images, args.n_samples)
