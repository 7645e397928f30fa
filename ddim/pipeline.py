"""The pipeline of a DDIM model, which samples pixels without conditions."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.config import build_schedule, load_config, parameterization
from ddim.datasets.transform import from_network_range
from ddim.models.diffusion import Model
from ddim.pretrained import load_float_weights, pretrained_path
from ddim.sizes import check_sizes
from qdiff.errors import UserError, require_at_least
from qdiff.io.diffusers_files import MakeComponent, component_of
from qdiff.pipeline import Pipeline
from qdiff.ranges.estimators import RangeMethod
from qdiff.sampling import Sampler, SamplerOptions
from qdiff.sampling.registry import find_sampler, sample_types

BATCH = 64  # images per batch if neither the caller nor the config gives a number


def ddim_sampler(config: Any, options: SamplerOptions, seed: int) -> Sampler:
    """Return the sampler for a model's images.

    Args:
        config: the result of `load_config`.
    """
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    return Sampler(build_schedule(config), shape, options, seed, parameterization(config))


class DdimPipeline(Pipeline):
    """A DDIM model.

    Args:
        config: the model's YAML file.
        weights: file of the float weights; None takes the config's released or bundled ones.
        options: the sampler's options.
        seed: the noise of image i depends only on (seed, i).
        count: number of images.
        batch_size: images per batch; None takes the config's.
        model_dir: folder of the released weights; None takes the cache.

    Raises:
        UserError: the config or a number is wrong.
    """

    # The papers' DDIM scripts use min-max ranges for weights and activations.
    weight_range = act_range = RangeMethod.MIN_MAX

    def __init__(
        self,
        config: str | Path,
        weights: str | Path | None = None,
        options: SamplerOptions = SamplerOptions(),  # noqa: B008, frozen
        seed: int = 1234,
        count: int = 1,
        batch_size: int | None = None,
        model_dir: str | Path | None = None,
    ) -> None:
        from omegaconf import OmegaConf

        self.model_config = load_config(config)
        check_sizes(self.model_config, f"config file {config}")
        self._given, self._model_dir = weights, model_dir
        sampler = ddim_sampler(self.model_config, options, seed)
        if batch_size is None:
            batch_size = self.model_config.get("sampling", {}).get("batch_size", BATCH)
        super().__init__(Path(config).stem, sampler, count, batch_size)
        model = OmegaConf.to_container(self.model_config, resolve=True)
        self.eda_dm = model.pop("eda_dm", None) or {}
        self.config = {
            "model": model,
            "weights": "pretrained" if weights is None else str(weights),
            "sampler": {
                "kind": find_sampler(options.kind).option,
                "timesteps": options.steps,
                "skip_type": options.spacing,
                "eta": options.eta,
                "order": options.order,
                "method": options.method,
            },
            "max_images": count,
        }

    @classmethod
    def from_args(cls, args: Namespace) -> DdimPipeline:
        """Return the pipeline that the options of `ddim.options` describe.

        Raises:
            UserError: the options contradict each other.
        """
        if args.use_pretrained == bool(args.ckpt):
            raise UserError("the float weights need exactly one of --use_pretrained and --ckpt PATH; give one of them")
        if args.ckpt and args.model_dir:
            raise UserError("--ckpt and --model_dir contradict each other; leave one of them out")
        count = getattr(args, "max_images", 1)  # commands that make no images do not have it
        require_at_least(1, {"--max_images": count, "--batch_size": args.batch_size})
        require_at_least(0, {"--seed": args.seed})
        options = SamplerOptions(
            sample_types()[args.sample_type],
            args.timesteps,
            args.skip_type,
            eta=args.eta,
            order=args.dpm_order,
            method=args.dpm_method,
        )
        made = cls(args.config, args.ckpt or None, options, args.seed, count, args.batch_size, args.model_dir)
        made.note_steps("--timesteps")
        made.config["sequence"] = getattr(args, "sequence", False)
        return made

    def build_network(self) -> tuple[Model, None]:
        """Return the network without weights on the meta device, and None because it takes no context."""
        with torch.device("meta"):
            return Model(self.model_config), None

    def load(self, device: torch.device, network: bool = True) -> None:
        if not network:
            self.network, _ = self.build_network()
            self.device = device
            return
        given = self._given
        self.weights = pretrained_path(self.model_config, self._model_dir) if given is None else Path(given)
        self.network = Model(self.model_config)
        load_float_weights(self.network, self.weights)
        self.move_to(device)

    def move_to(self, device: torch.device) -> None:
        self.device = device
        self.network.to(device).eval()

    def to_images(self, x_0: Tensor) -> Tensor:
        return from_network_range(x_0, self.model_config.data)

    def write_diffusers(self, folder: str | Path, make_unet: MakeComponent = component_of) -> str:
        from ddim.diffusers_folder import write_pipeline

        return write_pipeline(self, folder, make_unet)
