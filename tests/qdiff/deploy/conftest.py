"""What the deployment tests share: calibrated networks and their exported files, each exported once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from deploy_networks import STEPS, network_inputs
from families import SCRIPTS
from torch import Tensor

from qdiff.calibration.collect import record_evenly
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet, select_samples
from qdiff.config import QuantConfig
from qdiff.methods import linear
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel

REPOSITORY = Path(__file__).parents[3]

# 64 channels are two a norm group: of one, a norm takes out what a channel's scale adds.
# One level of attention at 4×4 is all that they have beside residual blocks: tracing takes its time by layer.
TINY_DDIM = {
    "data": {"dataset": "DIGITS", "image_size": 4, "channels": 1},
    "model": {
        **{"in_channels": 1, "out_ch": 1, "ch": 64, "ch_mult": [1], "num_res_blocks": 1},
        **{"attn_resolutions": [4], "dropout": 0.1, "resamp_with_conv": True},
    },
    "diffusion": {
        **{"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_diffusion_timesteps": 1000},
    },
}
TINY_TEXT = {  # one transformer, in the middle
    **{"image_size": 4, "in_channels": 4, "out_channels": 4, "model_channels": 64, "attention_resolutions": []},
    **{"num_res_blocks": 1, "channel_mult": [1], "num_heads": 2, "use_spatial_transformer": True},
    **{"context_dim": 12, "legacy": False},
}


@dataclass(frozen=True)
class Exported:
    """A calibrated network and its file.

    Attributes:
        inputs: ``inputs(count, seed)``: (x, t) or (x, t, context).
    """

    qnn: QuantModel
    path: Path
    inputs: Callable[[int, int], tuple[Tensor, ...]]


def calibrated(network: torch.nn.Module, data: CalibrationSet, **config: object) -> QuantModel:
    """Return a copy of a float network, wrapped and with ranges set by the linear recipe."""
    qnn = QuantModel(copy.deepcopy(network), QuantConfig(**config))
    linear.calibrate(qnn, data, None, CalibrationRun(show_progress=False))
    return qnn


def random_parameters(network: torch.nn.Module) -> torch.nn.Module:
    """Fill what starts at zero, which would hide what comes before it."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


@pytest.fixture(scope="session")
def ddim_network() -> torch.nn.Module:
    """A float DDIM network of 4×4 images, one channel, with fixed random weights."""
    from omegaconf import OmegaConf

    from ddim.models.diffusion import Model

    torch.manual_seed(0)
    return random_parameters(Model(OmegaConf.create(TINY_DDIM)))


@pytest.fixture(scope="session")
def exported_ddim(ddim_network, tmp_path_factory) -> Exported:
    """W8A8, asymmetric, so that every layer needs the correction of its window; split."""
    from qdiff.deploy.onnx_export import export_onnx

    inputs = network_inputs((1, 4, 4))
    qnn = calibrated(ddim_network, CalibrationSet(inputs(12, 1)), weight_bits=8, act_bits=8, split_shortcut=True)
    path = tmp_path_factory.mktemp("exported") / "ddim.onnx"
    export_onnx(qnn, path, (1, 4, 4), notes={"planted": "note"})
    return Exported(qnn, path, inputs)


@pytest.fixture(scope="session")
def exported_text(tmp_path_factory) -> Exported:
    """A latent UNet with a spatial transformer, W4A8, symmetric, split."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel
    from qdiff.deploy.onnx_export import export_onnx

    torch.manual_seed(0)
    network, inputs = random_parameters(UNetModel(**TINY_TEXT)), network_inputs((4, 4, 4), (5, 12))
    config = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}
    qnn = calibrated(network, CalibrationSet(inputs(12, 1)), **config)
    path = tmp_path_factory.mktemp("exported") / "text.onnx"
    export_onnx(qnn, path, (4, 4, 4), (5, 12))
    return Exported(qnn, path, inputs)


@pytest.fixture(scope="session")
def digits_model() -> Pipeline:
    """The bundled digits model with a sampler of `STEPS` steps, loaded."""
    from qdiff.cli.options.parser import Parser

    script = SCRIPTS["sample_diffusion_ddim"]
    parser = Parser(None)
    script.add_options(parser)
    words = ["--config", str(REPOSITORY / "configs" / "digits.yml"), "--use_pretrained", "--timesteps", str(STEPS)]
    made = script.pipeline_of(_with_batch(parser.parse_args(words)))
    made.load(torch.device("cpu"))
    return made


def _with_batch(args):
    args.batch_size = 8
    return args


@pytest.fixture(scope="session")
def exported_digits(digits_model, tmp_path_factory) -> Exported:
    """The bundled digits model, W4A8, split."""
    from qdiff.deploy.onnx_export import export_onnx

    recording = record_evenly(digits_model, STEPS, 8, show_progress=False)
    data = select_samples(recording, STEPS, 8, digits_model.input_shape, False)
    qnn = calibrated(digits_model.network, data, weight_bits=4, act_bits=8, split_shortcut=True)
    path = tmp_path_factory.mktemp("exported") / "digits.onnx"
    export_onnx(qnn, path, digits_model.input_shape)
    return Exported(qnn, path, network_inputs(digits_model.input_shape))
