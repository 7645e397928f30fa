"""Latent diffusion models as the options of a command line name them."""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import load_latent_diffusion
from ldm.config import REPOSITORY, load_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.util import Checkpointed
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.options import CLASS_CKPT, CLASS_CONFIG, TEXT_CKPT, TEXT_CONFIG
from ldm.prompts import asked_classes, read_prompts
from ldm.sampling import LatentSampler, LatentSamplerOptions, SamplerKind
from ldm.schedule import build_schedule
from qdiff.calibration.collect import OnCall
from qdiff.cli.command import FloatModel, Network, OnStep
from qdiff.config import RangeMethod
from qdiff.errors import UserError

log = logging.getLogger("qdiff")

BUNDLED = {name: REPOSITORY / "models" / "ldm" / f"digits_{name}" for name in ("vq", "class", "text")}
CHECKPOINTS = ("model.ckpt", "model.safetensors")


class LatentModel(FloatModel):
    """What the latent scripts share.

    Args:
        config_path, weights: of the model.
        options: of the sampler.
        latent_shape: (C, h, w) where options ask for another than the config's.
    """

    def __init__(
        self,
        args: Namespace,
        config_path: str | Path,
        weights: str | Path,
        options: LatentSamplerOptions,
        latent_shape: tuple[int, int, int] | None = None,
    ) -> None:
        from omegaconf import OmegaConf

        super().__init__(args)
        self.model_config = load_config(config_path)
        self.weights, self.options = Path(weights), options
        params = self.model_config.model.params
        size = params.get("image_size", 256)
        self.latent_shape = latent_shape or (params.get("channels", 3), size, size)
        self.schedule = build_schedule(params)
        self.sampler = self._sampler(torch.device("cpu"))
        self.name = Path(config_path).parent.name if Path(config_path).stem == "config" else Path(config_path).stem
        self.config = {
            "model": OmegaConf.to_container(self.model_config.model, resolve=True),
            "weights": str(weights),
            "latent_shape": list(self.latent_shape),
            "sampler": {**vars(options), "kind": options.kind.value},
        }

    def _sampler(self, device: torch.device) -> LatentSampler:
        return LatentSampler(self.schedule, self.latent_shape, self.options, self.args.seed, device)

    @property
    def downsampling(self) -> int:
        """Image pixels a latent position, along each side."""
        return 2 ** (len(self.model_config.model.params.first_stage_config.params.ddconfig.ch_mult) - 1)

    @property
    def calls(self) -> int:
        return self.sampler.calls

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.latent_shape

    def load(self, device: torch.device) -> None:
        if not self.weights.is_file():
            raise UserError(f"checkpoint {self.weights} does not exist; {_how_to_get(self.model_config)}")
        self.model: LatentDiffusion = load_latent_diffusion(self.model_config, self.weights)
        if getattr(self.args, "no_grad_ckpt", False):
            for module in self.model.modules():
                if isinstance(module, Checkpointed):
                    module.use_checkpoint = False
        self.network = self.model.network
        self.move_to(device)

    def move_to(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device)
        self.sampler = self._sampler(device)

    def conditions(self, indices: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the conditional and the unconditional context of images, each [N, L, D] or None."""
        return None, None

    def _contexts(self, values: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """Encode values, and the absence of a value unless the guidance scale makes it irrelevant."""
        nothing = self.model.cond_stage_model.unconditional
        condition = self.model.condition(values)
        return condition, None if self.options.scale == 1.0 else self.model.condition([nothing] * len(values))

    def _precision(self) -> contextlib.AbstractContextManager:
        if getattr(self.args, "precision", "full") == "autocast" and self.device.type == "cuda":
            return torch.autocast("cuda")
        return contextlib.nullcontext()

    def trajectory(
        self,
        network: Network,
        indices: Sequence[int],
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        with self._precision():
            condition, unconditional = self.conditions(indices, calibration)
            return self.sampler(network, indices, condition, unconditional, calibration, on_call, on_step)

    def to_images(self, x_0: Tensor) -> Tensor:
        with self._precision():
            return self.model.decode(x_0).float()


class UnconditionalModel(LatentModel):
    """What scripts/sample_diffusion_ldm.py samples."""

    def __init__(self, args: Namespace) -> None:
        weights = find_checkpoint(args.resume_base or BUNDLED["vq"])
        if args.dpm and args.vanilla_sample:
            raise UserError("--dpm and --vanilla_sample contradict each other; leave one of them out")
        if args.a_min_max:
            self.act_range = RangeMethod.MIN_MAX
        kind = SamplerKind.DPM_SOLVER if args.dpm else SamplerKind.DDIM
        if args.vanilla_sample:
            kind = SamplerKind.ANCESTRAL
        # DPM-Solver and ancestral sampling have no η; the published default is 1 whatever the sampler.
        eta = args.eta if kind is SamplerKind.DDIM else 0.0
        super().__init__(
            args, weights.with_name("config.yaml"), weights, LatentSamplerOptions(kind, args.custom_steps, eta)
        )
        if self.model_config.model.params.get("cond_stage_config", "__is_unconditional__") != "__is_unconditional__":
            raise UserError(
                f"{weights} is a conditional model; use scripts/sample_diffusion_ldm_imagenet.py or scripts/txt2img.py"
            )
        self.count = args.n_samples
        if self.count < 1:
            raise UserError(f"--n_samples is {self.count}; give at least 1")
        self.batch_size = args.batch_size or 10
        self.config["num_images"] = self.count


class ClassModel(LatentModel):
    """What scripts/sample_diffusion_ldm_imagenet.py samples: image i shows class i mod their number."""

    conditional = True

    def __init__(self, args: Namespace) -> None:
        config, weights = _big_or_bundled(args, CLASS_CONFIG, CLASS_CKPT, BUNDLED["class"])
        options = LatentSamplerOptions(SamplerKind.DDIM, args.ddim_steps, args.ddim_eta, args.scale)
        super().__init__(args, config, weights, options)
        stage = self.model_config.model.params.get("cond_stage_config")
        if not str(getattr(stage, "target", "")).endswith(".ClassEmbedder"):
            raise UserError(f"{config} is not a class-conditional model; use the script of its family")
        self.classes = stage.params.get("n_classes", 1000) - 1  # the last one is "no class"
        self.count = args.n_samples
        if self.count < 1 or args.n_batch < 1:
            raise UserError(f"--n_samples is {self.count} and --n_batch {args.n_batch}; give at least 1")
        self.batch_size = args.batch_size or args.n_batch
        self.labels = [self.label(i) for i in range(self.count)]
        self.config["num_images"] = self.count

    def label(self, index: int) -> int:
        return index % self.classes

    def conditions(self, indices: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        return self._contexts([self.label(i) for i in indices])


class TextModel(LatentModel):
    """What scripts/txt2img.py samples: image i shows prompt i mod their number."""

    conditional = True

    def __init__(self, args: Namespace) -> None:
        if args.laion400m:
            raise UserError("--laion400m is not supported (that model's text encoder is a BERT); leave it out")
        if args.plms and args.dpm:
            raise UserError("--plms and --dpm contradict each other; leave one of them out")
        if args.plms and args.ddim_eta != 0:
            raise UserError(f"--plms has no noise, so --ddim_eta {args.ddim_eta} contradicts it; leave one out")
        for name in ("n_samples", "n_iter"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} is {getattr(args, name)}; give at least 1")
        if args.from_file and args.prompt:
            log.warning("--from-file takes the place of --prompt")
        config, weights = _big_or_bundled(args, TEXT_CONFIG, TEXT_CKPT, BUNDLED["text"])
        kind = SamplerKind.PLMS if args.plms else SamplerKind.DPM_SOLVER if args.dpm else SamplerKind.DDIM
        options = LatentSamplerOptions(
            kind, args.ddim_steps, args.ddim_eta, args.scale, args.n_samples if args.fixed_code else None
        )
        super().__init__(args, config, weights, options, _latent_shape(args, config))
        stage = self.model_config.model.params.get("cond_stage_config")
        if not str(getattr(stage, "target", "")).endswith(".FrozenCLIPEmbedder"):
            raise UserError(f"{config} is not a text-conditional model; use the script of its family")
        pretrained = self.model_config.get("pretrained") or {}
        prompt = args.prompt or pretrained.get("prompt", "a painting of a virus monster playing guitar")
        lines = read_prompts(args.from_file) if args.from_file else [prompt] * args.n_samples
        self.prompts = lines * args.n_iter
        if args.max_images is not None:
            if args.max_images < 1:
                raise UserError(f"--max_images is {args.max_images}; give at least 1")
            self.prompts = self.prompts[: args.max_images]
        self.calibration_prompts = read_prompts(args.cali_prompts) if args.cali_prompts else lines
        self.count = len(self.prompts)
        self.batch_size = args.batch_size or args.n_samples
        self.labels = asked_classes(self.prompts, pretrained.get("class_words", []))
        self.config |= {"prompts": self.prompts, "calibration_prompts": self.calibration_prompts}

    def load(self, device: torch.device) -> None:
        super().load(device)
        encoder: FrozenCLIPEmbedder = self.model.cond_stage_model
        for prompt in dict.fromkeys(self.prompts):
            if cut := encoder.cut(prompt):
                log.warning(
                    "the text encoder takes %d tokens; of the prompt %r this was cut: %r",
                    encoder.max_length,
                    prompt,
                    cut,
                )

    def conditions(self, indices: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        prompts = self.calibration_prompts if calibration else self.prompts
        return self._contexts([prompts[i % len(prompts)] for i in indices])


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that ``-r`` names: a file, or the model file in a folder.

    Raises:
        UserError: no config.yaml beside it.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in CHECKPOINTS if (path / name).is_file()]
        path = found[0] if found else path / CHECKPOINTS[0]
    if not path.with_name("config.yaml").is_file():
        raise UserError(
            f"there is no config.yaml beside {path}; -r names a model's checkpoint or folder, e.g. "
            "models/ldm/lsun_beds256/model.ckpt"
        )
    return path


def _big_or_bundled(args: Namespace, config: str, ckpt: str, bundled: Path) -> tuple[str | Path, str | Path]:
    """Return config and checkpoint: the given ones, else the big model where it is, else the bundled one."""
    if args.ckpt and not args.config:
        beside = Path(args.ckpt).with_name("config.yaml")
        return (beside if beside.is_file() else config), args.ckpt
    if args.config:
        beside = load_config(args.config).get("pretrained", {}).get("file", ckpt)
        return args.config, args.ckpt or beside
    if Path(ckpt).is_file():
        return config, ckpt
    log.info("%s is not there: taking the bundled model %s", ckpt, bundled)
    return bundled / "config.yaml", bundled / "model.safetensors"


def _latent_shape(args: Namespace, config: str | Path) -> tuple[int, int, int]:
    """Return (C, H/f, W/f) of the options, checked against the model."""
    params = load_config(config).model.params
    channels, size = params.get("channels", 3), params.get("image_size", 256)
    factor = 2 ** (len(params.first_stage_config.params.ddconfig.ch_mult) - 1)
    if args.C not in (None, channels) or args.f not in (None, factor):
        raise UserError(f"this model has --C {channels} and --f {factor}; leave these options out")
    height, width = args.H or size * factor, args.W or size * factor
    # The UNet halves the latent once a level, and its skips must fit on the way back.
    unit = factor * 2 ** (len(params.unet_config.params.channel_mult) - 1)
    for name, value in (("H", height), ("W", width)):
        if value < 1 or value % unit:
            raise UserError(
                f"--{name} is {value}; give a positive multiple of {unit} (this model's --f {factor} times what its "
                "UNet halves)"
            )
    return channels, height // factor, width // factor


def _how_to_get(config: Any) -> str:
    pretrained = config.get("pretrained") or {}
    if "url" in pretrained:
        return f"download {pretrained['url']} and put it there ({pretrained.get('note', 'a checkpoint file')})"
    return "check the path"
