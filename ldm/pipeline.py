"""The pipeline of a latent diffusion model, and the unconditional one; the others are in `ldm.conditional`."""

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
from ldm.locate import ImageSize, find_checkpoint, how_to_get, latent_shape
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.util import Checkpointed
from ldm.options import chosen_sampler
from ldm.schedule import build_schedule, parameterization
from ldm.sizes import check_sizes
from ldm.util import instantiate_from_config
from qdiff.errors import UserError, require_at_least
from qdiff.interface import SteppedNetwork
from qdiff.io.diffusers_files import MakeComponent, component_of
from qdiff.io.repository import REPOSITORY
from qdiff.pipeline import Pipeline
from qdiff.ranges.estimators import RangeMethod
from qdiff.sampling import Sampler, SamplerOptions
from qdiff.sampling.registry import find_sampler

BUNDLED = {name: REPOSITORY / "models" / "ldm" / f"digits_{name}" for name in ("vq", "class", "text")}
UNCONDITIONAL = "__is_unconditional__"


def latent_options(kind: str, steps: int, eta: float = 0.0, scale: float = 1.0, fixed_code: int | None = None):
    """Return `SamplerOptions` for latent diffusion: timesteps begin at 1, and the last step ends at ᾱ_0."""
    return SamplerOptions(kind, steps, offset=1, ends_clean=False, eta=eta, scale=scale, fixed_code=fixed_code)


class LatentPipeline(Pipeline):
    """A latent diffusion model; see `Pipeline`.

    Args:
        config, weights: the model's YAML file and checkpoint.
        options: the sampler's options, e.g. from `latent_options`.
        seed: the noise of image i depends only on (seed, i).
        count: number of images.
        batch_size: images per batch.
        size: size of the images, if it is not the model's.
        precision: ``autocast`` calls the network in half precision on CUDA; None is ``full``.
        recompute: fitting recomputes activations of blocks instead of keeping them, if the config says so.

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
        precision: str | None = None,
        recompute: bool = True,
    ) -> None:
        from omegaconf import OmegaConf

        self.model_config = load_config(config)
        self.weights, self._origin = Path(weights), config
        self.precision_name, self._recompute = precision, recompute
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
        """Return the UNet without weights on the meta device, and (L, D) of its context, or None."""
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
        """Encode the values and, unless the guidance scale makes it irrelevant, the unconditional value."""
        nothing = self.model.cond_stage_model.unconditional
        condition = self.model.condition(values)
        return condition, None if self.sampler.options.scale == 1.0 else self.model.condition([nothing] * len(values))

    def precision(self) -> contextlib.AbstractContextManager:
        if self.precision_name == "autocast" and self.device.type == "cuda":
            return torch.autocast("cuda")
        return contextlib.nullcontext()

    def to_images(self, x_0: Tensor) -> Tensor:
        with self.precision():
            return self.model.decode(x_0).float()

    def write_diffusers(self, folder: str | Path, make_unet: MakeComponent = component_of) -> str:
        from ldm.to_diffusers import write_pipeline

        return write_pipeline(self, folder, make_unet)


def _context_shape(network: SteppedNetwork, encoder: Any) -> tuple[int, int] | None:
    # Texts are padded to the encoder's length; a class is one token.
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
        """Return the pipeline that the options of `ldm.options.add_unconditional_options` describe.

        Raises:
            UserError: the options contradict each other.
        """
        weights = find_checkpoint(args.resume_base) if args.resume_base else BUNDLED["vq"] / "model.safetensors"
        kind = chosen_sampler(args, {"dpm": "dpm_solver", "vanilla_sample": "ancestral"})
        asked = getattr(args, "a_range", None)  # only commands that quantize have it
        if args.a_min_max and asked not in (None, RangeMethod.MIN_MAX):
            raise UserError(f"--a_min_max and --a_range {asked} contradict each other; leave one of them out")
        require_at_least(1, {"--n_samples": args.n_samples, "--batch_size": args.batch_size})
        require_at_least(0, {"--seed": args.seed})
        # The published default of η is 1 for every sampler, so samplers without η get 0.
        options = latent_options(kind, args.custom_steps, args.eta if find_sampler(kind).has_eta else 0.0)
        config, batch_size = weights.with_name("config.yaml"), args.batch_size or 10
        made = cls(config, weights, options, args.seed, args.n_samples, batch_size)
        if args.a_min_max:
            made.act_range = RangeMethod.MIN_MAX
        made.note_steps("--custom_steps")
        return made
