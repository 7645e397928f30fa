"""The keys of a latent diffusion config, and their allowed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.schedule import BETA_SCHEDULES
from qdiff.io.config_schema import Key
from qdiff.sampling import Parameterization

COUNT = Key(int, least=1)
CONTEXT = "conditions are read only by cross attention"
# Used only by training or logging in the latent diffusion code; their values do not affect sampling.
WITHOUT_EFFECT = (
    *("first_stage_key", "cond_stage_key", "cond_stage_trainable", "monitor", "log_every_t", "loss_type"),
    *("original_elbo_weight", "l_simple_weight", "learn_logvar", "logvar_init", "scheduler_config", "unet_trainable"),
    *("ckpt_path", "ignore_keys", "load_only_unet", "reset_ema", "reset_num_ema_updates", "make_it_fit"),
    *("ucg_training", "clip_denoised", "force_null_conditioning"),
)
MODEL = {"target": Key(str), "params": Key(Mapping), "base_learning_rate": Key(float)}
PARAMS = {
    "unet_config": Key(Mapping, required=True),
    "first_stage_config": Key(Mapping, required=True),
    "cond_stage_config": Key(str | Mapping),
    "image_size": COUNT,
    "channels": COUNT,
    "timesteps": COUNT,
    "linear_start": Key(float),
    "linear_end": Key(float),
    "cosine_s": Key(float, least=0),
    "beta_schedule": Key(choices=tuple(BETA_SCHEDULES)),
    "rescale_betas_zero_snr": Key(bool),
    "given_betas": Key(choices=(None,), because="use beta_schedule instead"),
    "parameterization": Key(choices=tuple(kind.value for kind in Parameterization)),
    "scale_factor": Key(float),
    "scale_by_std": Key(bool),
    "use_ema": Key(bool),
    "conditioning_key": Key(choices=("crossattn", None), because=CONTEXT),
    "concat_mode": Key(bool),
    "num_timesteps_cond": Key(choices=(1, None), because="no noise is added to conditions"),
    "cond_stage_forward": Key(choices=(None,), because="condition encoders are always called"),
    "use_positional_encodings": Key(choices=(False,)),
    "v_posterior": Key(choices=(0, 0.0), because="ancestral sampling uses the posterior's variance"),
    **{name: Key(Any) for name in WITHOUT_EFFECT},
}
STAGE = {"target": Key(str, required=True), "params": Key(Mapping)}
TOP = {
    "base": Key(str),
    "model": Key(Mapping, required=True),
    "training": Key(Mapping),
    "pretrained": Key(Mapping),
    "eda_dm": Key(Mapping),  # by option name; the method checks it
    "data": Key(Mapping),  # for training
    "lightning": Key(Mapping),  # for training with the latent diffusion code
}
PRETRAINED = {
    **{name: Key(str) for name in ("file", "url", "md5", "reference", "extractor", "note", "prompt")},
    "class_words": Key(Sequence[str]),
}
