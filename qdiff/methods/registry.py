"""The methods by name. A new method is a file next to this one with a config and a ``calibrate``, and a row below.

METHODS["eda-dm"].calibrate(qnn, data, EdaDmConfig(), CalibrationRun(seed=1234))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.timesteps import Schedule, Spacing
from qdiff.config import ActRanges, LayerBits, QuantConfig
from qdiff.errors import UserError
from qdiff.methods import dmq, eda_dm, gptq, grip, linear, ptq4dm, qdiffusion, tfmq_dm
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod


class Scripts(Enum):
    """The scripts whose conventions a method's command line follows: some options mean or default to something else."""

    Q_DIFFUSION = "Q-Diffusion"
    EDA_DM = "EDA-DM"  # symmetric ranges without --a_sym; presets; drawn calibration sets


@dataclass(frozen=True)
class Method:
    """A way to set all quantizers of a network.

    Attributes:
        name: the value of ``--method`` and of the API's ``method``.
        title: name in tables and plots.
        calibrate: ``calibrate(qnn, data, config, run)``, in place; its config is None for methods without settings.
        config: dataclass of the method's numbers; None for methods without settings.
        options: command-line option → the field that it sets.
        scripts: the scripts whose conventions the command line follows.
        quant: fields of `QuantConfig` that the method sets where nothing else is asked for.
        draws: how the calibration set's timesteps are drawn, one sample per image; None records every image at every
            chosen timestep.
        spacing: which timesteps these are, if a run has more.
        scaling: how layers get factors of their input's channels before anything is quantized.
        chooses_widths: whether commands choose the widths of single layers where they may, so that those that are asked
            for are means; ``quant`` then names no layers.
    """

    name: str
    title: str
    calibrate: Callable[[QuantModel, CalibrationSet, Any, CalibrationRun], None]
    config: type | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    scripts: Scripts = Scripts.Q_DIFFUSION
    quant: Mapping[str, Any] = field(default_factory=dict)
    draws: Schedule | None = None
    spacing: Spacing = Spacing.EVERY
    scaling: InputScaling = field(default_factory=InputScaling)
    chooses_widths: bool = False

    @property
    def learns(self) -> bool:
        """Whether the method fits anything."""
        return self.config is not None

    def quant_config(self, **given: Any) -> QuantConfig:
        """Return the method's widths and ranges, with fields of one's own."""
        return QuantConfig(**{**self.quant, **given})

    def chooses_for(self, config: QuantConfig) -> bool:
        """Return whether the widths of a config are means for which the method chooses those of single layers.

        They are not where the config names other layers than the method itself does, or neither weights nor inputs with
        calibrated ranges are quantized.
        """
        any_mean = config.weight_bits is not None or config.calibrates_acts
        return self.chooses_widths and config.layer_bits in ((), self._own_layers) and any_mean

    def to_choose_from(self, config: QuantConfig) -> QuantConfig:
        """Return the config that the method chooses widths for: without its own ones of single layers.

        Where inputs keep their widths, as they do with dynamic ranges and modulation, its layers keep those of inputs.
        """
        inputs_keep = config.act_bits is not None and not config.calibrates_acts
        kept = [(name, replace(bits, weight_bits=None)) for name, bits in self._own_layers] if inputs_keep else ()
        return replace(config, layer_bits=kept)

    @property
    def _own_layers(self) -> tuple[tuple[str, LayerBits], ...]:
        return self.quant_config(weight_bits=8, act_bits=8).layer_bits  # the same at any widths


_OF_ROUNDING = {"weight_start": "start", "bias_correction": "bias_correction", "temporal_unit": "temporal_unit"}
_Q_DIFFUSION = {
    "cali_iters": "iterations",
    "cali_iters_a": "act_iterations",
    "cali_batch_size": "batch_size",
    "cali_lr_w": "lr_rounding",
    "cali_lr": "lr_act",
    "cali_p": "p",
    "running_stat": "running_stat",
    "rs_sm_only": "running_stat_softmax_only",
    "objective": "objective",
    "recon_unit": "unit",
    **_OF_ROUNDING,
}
_EDA_DM = {
    "recon": "reconstruct",
    "lr_w": "lr_rounding",
    "lr_a": "lr_act",
    "qdrop": "drop",
    "cali_iters": "iterations",
    "cali_batch_size": "batch_size",
    "recon_unit": "unit",
    **_OF_ROUNDING,
}
_SEARCHED_WITH_ENDS = {"weight_range": RangeMethod.SEARCH, "act_range": RangeMethod.SEARCH, "keep_ends": True}
_ROWS = (
    Method(
        "linear",
        "linear",
        linear.calibrate,
        quant={"weight_range": RangeMethod.MIN_MAX, "act_range": RangeMethod.MIN_MAX},
    ),
    Method("qdiff", "Q-Diffusion", qdiffusion.calibrate, qdiffusion.QDiffusionConfig, _Q_DIFFUSION),
    Method(
        "ptq4dm",
        "PTQ4DM",
        ptq4dm.calibrate,
        ptq4dm.Ptq4dmConfig,
        _EDA_DM,
        Scripts.EDA_DM,
        _SEARCHED_WITH_ENDS,
        Schedule.NORMAL,
    ),
    Method(
        "eda-dm",
        "EDA-DM",
        eda_dm.calibrate,
        eda_dm.EdaDmConfig,
        {**_EDA_DM, "add_loss": "layer_weight"},
        Scripts.EDA_DM,
        _SEARCHED_WITH_ENDS,
        Schedule.TDAC,
    ),
    Method("gptq", "GPTQ", gptq.calibrate, gptq.GptqConfig, gptq.OPTIONS),
    Method(
        "tfmq-dm",
        "TFMQ-DM",
        tfmq_dm.calibrate,
        tfmq_dm.TfmqDmConfig,
        {
            "cali_iters": "iterations",
            "cali_batch_size": "batch_size",
            "cali_lr_w": "lr_rounding",
            "objective": "objective",
            "recon_unit": "unit",
            "tfmq_every": "every",
            **_OF_ROUNDING,
        },
        quant={
            "weight_range": RangeMethod.MSE,
            "act_range": RangeMethod.AVERAGE,
            "act_ranges": ActRanges.TIMESTEP,
        },
    ),
    Method(
        "dmq",
        "DMQ",
        dmq.calibrate,
        dmq.DmqConfig,
        _Q_DIFFUSION,
        quant={
            "weight_range": RangeMethod.MSE,
            "act_range": RangeMethod.AVERAGE,
            "act_ranges": ActRanges.TIMESTEP,
            "power_of_two_scales": True,
        },
        scaling=InputScaling(Scaling.LEARNED),
    ),
    Method(
        "grip",
        "GRIP",
        grip.calibrate,
        grip.GripConfig,
        grip.OPTIONS,
        quant=grip.QUANT,
        spacing=Spacing.ENDS,
        chooses_widths=True,
    ),
)
DEFAULT = "qdiff"
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ROWS})


def find_method(name: str) -> Method:
    """Return a method by its name.

    Raises:
        UserError: no method has this name.
    """
    if name not in METHODS:
        raise UserError(f"the method is {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
