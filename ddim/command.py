"""A DDIM model as the options of a command line name it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddim.config import load_config
from ddim.datasets.transform import from_network_range
from ddim.models.diffusion import Model
from ddim.pretrained import load_float_weights, pretrained_path
from ddim.sampling import DdimSampler, SamplerOptions
from ddim.sizes import check_sizes
from qdiff.calibration.recording import OnCall
from qdiff.config import RangeMethod
from qdiff.errors import UserError
from qdiff.pipeline import FloatModel, Network, OnStep


class DdimModel(FloatModel):
    """What scripts/sample_diffusion_ddim.py samples."""

    # The papers' DDIM scripts take min-max ranges on both sides.
    weight_range = act_range = RangeMethod.MIN_MAX

    def __init__(self, args: Namespace) -> None:
        from omegaconf import OmegaConf

        self.model_config = load_config(args.config)
        check_sizes(self.model_config, f"config file {args.config}")
        super().__init__(args)
        if args.use_pretrained == bool(args.ckpt):
            raise UserError("give the float weights by exactly one of --use_pretrained and --ckpt PATH")
        if args.ckpt and args.model_dir:
            raise UserError("--ckpt and --model_dir contradict each other; leave one of them out")
        self.options = SamplerOptions(
            args.sample_type, args.timesteps, args.skip_type, args.eta, args.dpm_order, args.dpm_method
        )
        self.sampler = DdimSampler(self.model_config, self.options, args.seed, torch.device("cpu"))
        if self.options.kind != "dpm_solver":
            schedule = self.sampler.schedule
            self.note_steps("--timesteps", args.timesteps, len(self.sampler.timesteps), schedule.num_train)
        self.batch_size = args.batch_size or self.model_config.get("sampling", {}).get("batch_size", 64)
        self.name = Path(args.config).stem
        self.count = getattr(args, "max_images", 1)
        if self.count < 1:
            raise UserError(f"--max_images is {self.count}; give at least 1")
        model = OmegaConf.to_container(self.model_config, resolve=True)
        self.eda_dm = model.pop("eda_dm", None) or {}
        self.config = {
            "model": model,
            "weights": args.ckpt or "pretrained",
            "sampler": vars(self.options),
            "max_images": self.count,
            "sequence": getattr(args, "sequence", False),
        }

    @property
    def calls(self) -> int:
        return self.sampler.calls

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.sampler.shape

    @property
    def training_steps(self) -> int:
        return self.sampler.schedule.num_train

    def build_network(self) -> tuple[Model, None]:
        """Return the network without weights, on the meta device, and None for the context that it does not take."""
        with torch.device("meta"):
            return Model(self.model_config), None

    def load(self, device: torch.device, network: bool = True) -> None:
        if not network:
            self.network, _ = self.build_network()
            self.device = device
            return
        self.weights = (
            Path(self.args.ckpt) if self.args.ckpt else pretrained_path(self.model_config, self.args.model_dir)
        )
        self.network = Model(self.model_config)
        load_float_weights(self.network, self.weights)
        self.move_to(device)

    def move_to(self, device: torch.device) -> None:
        self.device = device
        self.network.to(device).eval()
        self.sampler = DdimSampler(self.model_config, self.options, self.args.seed, device)

    def trajectory(
        self,
        network: Network,
        indices: Sequence[int],
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        def eps(x: Tensor, t: Tensor) -> Tensor:
            if on_call is not None:
                on_call(x, t)
            return network(x, t)

        return self.sampler(eps, indices, on_step=on_step, calibration=calibration)

    def to_images(self, x_0: Tensor) -> Tensor:
        return from_network_range(x_0, self.model_config.data)
