"""Latent diffusion models as the options of a command line name them."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import load_latent_diffusion
from ldm.config import load_config
from ldm.locate import big_or_bundled, find_checkpoint, how_to_get, latent_shape
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.util import Checkpointed
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.options import CLASS_CKPT, CLASS_CONFIG, TEXT_CKPT, TEXT_CONFIG
from ldm.prompts import asked_classes
from ldm.sampling import LatentSampler, LatentSamplerOptions, SamplerKind
from ldm.schedule import build_schedule, parameterization
from ldm.sizes import check_sizes
from ldm.util import instantiate_from_config
from qdiff.calibration.recording import OnCall
from qdiff.config import RangeMethod
from qdiff.errors import UserError
from qdiff.interface import SteppedNetwork
from qdiff.io.prompt_lines import read_prompts
from qdiff.io.repository import REPOSITORY
from qdiff.pipeline import FloatModel, Network, OnStep

BUNDLED = {name: REPOSITORY / "models" / "ldm" / f"digits_{name}" for name in ("vq", "class", "text")}


class LatentModel(FloatModel):
    """What the latent scripts share.

    Args:
        config_path, weights: of the model.
        options: of the sampler.
    """

    def __init__(
        self, args: Namespace, config_path: str | Path, weights: str | Path, options: LatentSamplerOptions
    ) -> None:
        from omegaconf import OmegaConf

        super().__init__(args)
        self.model_config = load_config(config_path)
        self.weights, self.options = Path(weights), options
        self.latent_shape = latent_shape(self.model_config, args)
        check_sizes(self.model_config, f"config file {config_path}", self.latent_shape)
        params = self.model_config.model.params
        self.schedule = build_schedule(params)
        self.parameterization = parameterization(params)
        self.sampler = self._sampler(torch.device("cpu"))
        if options.kind in (SamplerKind.DDIM, SamplerKind.PLMS):
            option = "--ddim_steps" if hasattr(args, "ddim_steps") else "--custom_steps"
            self.note_steps(option, options.steps, len(self.sampler.timesteps), self.schedule.num_train)
        self.name = Path(config_path).parent.name if Path(config_path).stem == "config" else Path(config_path).stem
        self.eda_dm = OmegaConf.to_container(self.model_config.get("eda_dm") or OmegaConf.create({}), resolve=True)
        self.config = {
            "model": OmegaConf.to_container(self.model_config.model, resolve=True),
            "weights": str(weights),
            "latent_shape": list(self.latent_shape),
            "sampler": {**vars(options), "kind": options.kind.value},
        }

    def _sampler(self, device: torch.device) -> LatentSampler:
        return LatentSampler(
            self.schedule, self.latent_shape, self.options, self.args.seed, device, self.parameterization
        )

    @property
    def calls(self) -> int:
        return self.sampler.calls

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.latent_shape

    @property
    def training_steps(self) -> int:
        return self.schedule.num_train

    def build_network(self) -> tuple[SteppedNetwork, tuple[int, int] | None]:
        """Return the UNet without weights, on the meta device, and (L, D) of the context that it takes, or None."""
        params = self.model_config.model.params
        with torch.device("meta"):
            network = instantiate_from_config(params.unet_config)
            encoder = instantiate_from_config(params.get("cond_stage_config", "__is_unconditional__"))
        if encoder is None:
            return network, None
        # A text is padded to the encoder's length; a class is one token.
        return network, (getattr(encoder, "max_length", 1), network.context_dim)

    def load(self, device: torch.device, network: bool = True) -> None:
        if not self.weights.is_file():
            raise UserError(f"checkpoint {self.weights} does not exist; {how_to_get(self.model_config)}")
        self.model: LatentDiffusion = load_latent_diffusion(self.model_config, self.weights, network)
        if getattr(self.args, "no_grad_ckpt", False):
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
        self.sampler = self._sampler(device)

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        condition, _ = self.conditions([0], calibration=True)
        return None if condition is None else tuple(condition.shape[1:])

    def _contexts(self, values: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """Encode values, and the absence of a value unless the guidance scale makes it irrelevant."""
        nothing = self.model.cond_stage_model.unconditional
        condition = self.model.condition(values)
        return condition, None if self.options.scale == 1.0 else self.model.condition([nothing] * len(values))

    def precision(self) -> contextlib.AbstractContextManager:
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
        with self.precision():
            condition, unconditional = self.encoded or self.conditions(indices, calibration)
            return self.sampler(network, indices, condition, unconditional, calibration, on_call, on_step)

    def to_images(self, x_0: Tensor) -> Tensor:
        with self.precision():
            return self.model.decode(x_0).float()


class UnconditionalModel(LatentModel):
    """What scripts/sample_diffusion_ldm.py samples."""

    def __init__(self, args: Namespace) -> None:
        bundled = BUNDLED["vq"] / "model.safetensors"
        weights = find_checkpoint(args.resume_base) if args.resume_base else bundled
        if args.dpm and args.vanilla_sample:
            raise UserError("--dpm and --vanilla_sample contradict each other; leave one of them out")
        if args.a_min_max and getattr(args, "a_range", None) not in (None, RangeMethod.MIN_MAX.value):
            raise UserError(f"--a_min_max and --a_range {args.a_range} contradict each other; leave one of them out")
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


class GuidedModel(LatentModel):
    """What the two conditional scripts share: options of `ldm.options.add_guided_options`."""

    conditional = True

    def __init__(
        self, args: Namespace, config_path: str | Path, weights: str | Path, options: LatentSamplerOptions
    ) -> None:
        if args.n_rows < 0:
            raise UserError(f"--n_rows is {args.n_rows}; give 0 or more")
        if args.skip_grid and args.skip_save and not getattr(args, "save_npz", True):
            raise UserError("--skip_grid and --skip_save together leave nothing; leave one of them out")
        super().__init__(args, config_path, weights, options)
        self.config["precision"] = args.precision


class ClassModel(GuidedModel):
    """What scripts/sample_diffusion_ldm_imagenet.py samples: image i shows class i mod their number."""

    def __init__(self, args: Namespace) -> None:
        config, weights, note = big_or_bundled(args, CLASS_CONFIG, CLASS_CKPT, BUNDLED["class"])
        options = LatentSamplerOptions(SamplerKind.DDIM, args.ddim_steps, args.ddim_eta, args.scale)
        super().__init__(args, config, weights, options)
        self.notes += [note] if note else []
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


class TextModel(GuidedModel):
    """What scripts/txt2img.py samples: image i shows prompt i mod their number."""

    runs = Path("outputs") / "txt2img-samples"

    def __init__(self, args: Namespace) -> None:
        if args.plms and args.dpm:
            raise UserError("--plms and --dpm contradict each other; leave one of them out")
        for option in ("plms", "dpm"):
            if getattr(args, option) and args.ddim_eta != 0:
                raise UserError(
                    f"--{option} adds no noise, so --ddim_eta {args.ddim_eta} contradicts it; leave one out"
                )
        together = getattr(args, "n_batch", args.n_samples)
        for name in ("n_samples", "n_iter", "n_batch"):
            if getattr(args, name, 1) < 1:
                raise UserError(f"--{name} is {getattr(args, name)}; give at least 1")
        config, weights, note = big_or_bundled(args, TEXT_CONFIG, TEXT_CKPT, BUNDLED["text"])
        kind = SamplerKind.PLMS if args.plms else SamplerKind.DPM_SOLVER if args.dpm else SamplerKind.DDIM
        options = LatentSamplerOptions(
            kind, args.ddim_steps, args.ddim_eta, args.scale, together if args.fixed_code else None
        )
        super().__init__(args, config, weights, options)
        self.notes += [note] if note else []
        if args.from_file and args.prompt:
            self.notes.append("--from-file takes the place of --prompt")
        stage = self.model_config.model.params.get("cond_stage_config")
        if not str(getattr(stage, "target", "")).endswith(".FrozenCLIPEmbedder"):
            raise UserError(f"{config} is not a text-conditional model; use the script of its family")
        pretrained = self.model_config.get("pretrained") or {}
        prompt = args.prompt or pretrained.get("prompt", "a painting of a virus monster playing guitar")
        lines = self._read_prompts(args.from_file, "--from-file") if args.from_file else [prompt] * args.n_samples
        self.prompts = lines * args.n_iter
        if args.max_images is not None:
            if args.max_images < 1:
                raise UserError(f"--max_images is {args.max_images}; give at least 1")
            self.prompts = self.prompts[: args.max_images]
        self.calibration_prompts = lines if args.from_file else [prompt]
        if args.cali_prompts:
            self.calibration_prompts = self._read_prompts(args.cali_prompts, "--cali_prompts")
        self.count = len(self.prompts)
        self.batch_size = args.batch_size or together
        self.labels = asked_classes(self.prompts, pretrained.get("class_words", []))
        self.config |= {"prompts": self.prompts, "calibration_prompts": self.calibration_prompts}

    def _read_prompts(self, path: str, option: str) -> list[str]:
        """Return the prompts of the file that an option names; of one that is missing, none in a dry run."""
        if getattr(self.args, "dry_run", False) and not Path(path).exists():
            self.notes.append(f"{option} {path} does not exist: the plan is shown without its prompts")
            return []
        return read_prompts(path, option)

    def load(self, device: torch.device, network: bool = True) -> None:
        super().load(device, network)
        encoder: FrozenCLIPEmbedder = self.model.cond_stage_model
        for prompt in dict.fromkeys(self.prompts + self.calibration_prompts):
            if cut := encoder.cut(prompt):
                limit = f"the text encoder takes {encoder.max_length} tokens"
                self.notes.append(f"{limit}; of the prompt {prompt!r} this was cut: {cut!r}")

    def conditions(self, indices: Sequence[int], calibration: bool) -> tuple[Tensor | None, Tensor | None]:
        prompts = self.calibration_prompts if calibration else self.prompts
        return self._contexts([prompts[i % len(prompts)] for i in indices])


class CaptionModel(TextModel):
    """What EDA-DM's scripts/sample_txt2img.py samples: ``--n_samples`` images, ``--n_batch`` at a time."""

    runs = Path("runs")

    def __init__(self, args: Namespace) -> None:
        if args.max_images is None or args.max_images > args.n_samples:
            args.max_images = args.n_samples
        super().__init__(args)
