"""Configs of latent models: what they may name, how they extend each other, and the schedule they describe."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

import ldm.config
from ldm.config import load_config
from ldm.keys import WITHOUT_EFFECT
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.schedule import build_schedule
from ldm.sizes import check_sizes
from ldm.util import ALLOWED_TARGETS, instantiate_from_config
from qdiff.errors import UserError
from qdiff.io.repository import REPOSITORY
from qdiff.sampling import make_beta_schedule

# Relative, of ᾱ: published code rounds betas to float32.
PRODUCT_TOLERANCE = 1e-7

CLASSES = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 12, "n_classes": 5}}
HOLDER = "ldm.models.diffusion.ddpm.LatentDiffusion"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """``written(config, name)``: a config file; relative ``base`` entries count from its folder."""
    monkeypatch.setattr(ldm.config, "REPOSITORY", tmp_path)

    def write(config, name="config.yaml"):
        path = tmp_path / name
        path.write_text(config if isinstance(config, str) else OmegaConf.to_yaml(config))
        return path

    return write


# ---------------------------------------------------------------------- classes that a config may name


@pytest.mark.parametrize(
    "target", ["os.system", "torch.nn.Linear", "builtins.exec", "ldm.util.importlib.import_module", "", None, ["a"]]
)
def test_other_targets_are_not_imported(target, monkeypatch):
    imported = []
    monkeypatch.setattr("ldm.util.importlib.import_module", imported.append)
    with pytest.raises(UserError, match=r"is not allowed|no target"):
        instantiate_from_config(OmegaConf.create({"target": target, "params": {"command": "true"}}))
    assert imported == []


@pytest.mark.parametrize("target", sorted(ALLOWED_TARGETS))
def test_allowed_targets_exist(target, monkeypatch):
    module, name = target.rsplit(".", 1)
    made = []
    monkeypatch.setattr(f"{module}.{name}", lambda **params: made.append(params) or "made")
    assert instantiate_from_config({"target": target, "params": {"a": 1}}) == "made"
    assert instantiate_from_config(OmegaConf.create({"target": target})) == "made"
    assert made == [{"a": 1}, {}]


@pytest.mark.parametrize("config", ["__is_first_stage__", "__is_unconditional__"])
def test_nothing(config):
    assert instantiate_from_config(config) is None


@pytest.mark.parametrize("config", ["ldm.models.autoencoder.AutoencoderKL", 3, {}, {"params": {}}, ["target"], None])
def test_no_target(config):
    with pytest.raises(UserError, match="has no target"):
        instantiate_from_config(config)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"embed_dim": 4}, "ddconfig"),
        ({"embed_dim": 4, "ddconfig": {"ch": 32}}, "do not fit"),
        ({"embed_dim": 4, "colour": 3, "ddconfig": {}}, "colour"),
    ],
)
def test_parameters_that_do_not_fit(params, says):
    with pytest.raises(UserError, match=says):
        instantiate_from_config({"target": "ldm.models.autoencoder.AutoencoderKL", "params": params})


def test_a_width_that_norms_cannot_group(model_config):
    config = model_config()
    config.model.params.unet_config.params.model_channels = 20
    with pytest.raises(UserError, match=r"do not fit.*divisible"):
        instantiate_from_config(config.model)


def test_a_sentence_from_inside_is_kept(model_config):
    config = model_config()
    config.model.params.unet_config.params.dims = 3
    with pytest.raises(UserError, match=r"^UNetModel supports dims 2"):
        instantiate_from_config(config.model)


# ---------------------------------------------------------------------- files


def test_file(written, model_config):
    config = load_config(written(model_config()))
    assert config == model_config()
    assert isinstance(instantiate_from_config(config.model), LatentDiffusion)


def test_base_is_extended_and_overridden(written, model_config):
    written(model_config(), "base.yaml")
    extended = "base: base.yaml\nmodel: {params: {linear_end: 0.5, unet_config: {params: {num_res_blocks: 2}}}}\n"
    config = load_config(written(extended, "other.yaml"))
    expected = model_config()
    expected.model.params.linear_end = 0.5
    expected.model.params.unet_config.params.num_res_blocks = 2
    expected.base = "base.yaml"
    assert config == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not readable YAML"),
        ("- 1", "not a YAML mapping"),
        ("", "model.target is None"),
        ("model: {ch: 32}", "model.target is None"),
        ("model: 3", "model.target is None"),
        ("model: {target: ldm.other.Model}", "model.target is ldm.other.Model"),
        (f"model: {{target: {HOLDER}}}", "has no model.params.unet_config"),
        (f"model: {{target: {HOLDER}, params: null}}", r"model\.params null; it must be a mapping"),
        (f"model: {{target: {HOLDER}, params: {{unet_config: 3}}}}", "has no model.params.unet_config"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
        ("base: 3", "3 does not exist"),
    ],
)
def test_bad_files(text, says, written):
    with pytest.raises(UserError, match=says) as caught:
        load_config(written(text))
    assert "\n" not in str(caught.value)


def test_file_without_a_part(written, model_config):
    for part in ("unet_config", "first_stage_config"):
        for spoil in (
            lambda c, part=part: c.model.params.pop(part),
            lambda c, part=part: c.model.params[part].pop("params"),
            lambda c, part=part: c.model.params[part].pop("target"),
        ):
            config = model_config()
            spoil(config)
            with pytest.raises(UserError, match=f"has no model.params.{part}"):
                load_config(written(config))
        config = model_config()
        config.model.params[part].target = "os.system"
        with pytest.raises(UserError, match=r"target os\.system, which is not allowed"):
            load_config(written(config))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("**/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_models_load_and_fit(path):
    if path.parent.name not in ("latent-diffusion", "stable-diffusion") and path.name != "config.yaml":
        pytest.skip("no model's config")
    check_sizes(load_config(path), "config file x")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("parameterization", "score", r"parameterization 'score'; only 'eps' or 'x0' or 'v'"),
        ("beta_schedule", "jsd", "beta_schedule 'jsd'"),
        ("conditioning_key", "concat", "conditioning_key 'concat'.*only by cross attention"),
        ("conditioning_key", "hybrid", "conditioning_key 'hybrid'"),
        ("conditioning_key", "adm", "conditioning_key 'adm'"),
        ("given_betas", [0.1, 0.2], "given_betas"),
        ("v_posterior", 0.5, "v_posterior"),
        ("num_timesteps_cond", 4, "num_timesteps_cond"),
        ("linear_end", "abc", "linear_end 'abc'; it must be a finite number"),
        ("timesteps", 1e9, "timesteps 1000000000.0; it must be a whole number"),
        ("scale_by_std", "yes", "scale_by_std 'yes'; it must be true or false"),
        ("image_size", 0, "image_size 0; give at least 1"),
        ("rescale_zero_snr", True, r"unknown key \S*rescale_zero_snr;"),
        ("split_input_params", {"ks": [128, 128]}, r"unknown key \S*split_input_params;"),
        ("scale_facter", 0.18, r"scale_facter.*did you mean scale_factor\?"),
    ],
)
def test_keys_that_change_the_mathematics_are_never_ignored(key, value, says, written, model_config):
    config = model_config()
    config.model.params[key] = value
    with pytest.raises(UserError, match=says) as caught:
        load_config(written(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_keys_of_training_are_taken(key, written, model_config):
    config = model_config()
    config.model.params[key] = None
    load_config(written(config))


def test_keys_elsewhere(written, model_config):
    config = model_config()
    config.optim = {"lr": 1}
    with pytest.raises(UserError, match="has the unknown key optim;"):
        load_config(written(config))
    config = model_config()
    config.model.params.unet_config.weights = "x"
    with pytest.raises(UserError, match=r"unknown key model\.params\.unet_config\.weights;"):
        load_config(written(config))
    config = model_config()
    config.model.params.unet_config.params.transformer_dpeth = 2
    with pytest.raises(UserError, match=r"unknown key transformer_dpeth; did you mean transformer_depth\?"):
        instantiate_from_config(config.model)
    config = model_config()
    config.model.params.unet_config.params.channel_mult = 2
    with pytest.raises(UserError, match="channel_mult 2; it must be a list"):
        instantiate_from_config(config.model)


def test_a_condition_that_would_be_concatenated(written, model_config):
    config = model_config("imagenet", cond_stage_config=CLASSES)
    del config.model.params.conditioning_key
    with pytest.raises(UserError, match=r"has no model\.params\.conditioning_key"):
        load_config(written(config))
    config.model.params.concat_mode = False
    load_config(written(config))


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("channels", 4, r"unet_config\.params\.in_channels 3, but latents have model\.params\.channels 4"),
        ("unet_config.params.out_channels", 6, r"out_channels 6, but latents"),
        ("first_stage_config.params.embed_dim", 4, r"embed_dim 4, but latents"),
        ("image_size", 7, "multiples of 2"),
        ("unet_config.params.context_dim", 16, r"context_dim 16, but the condition encoder returns vectors of 12"),
        ("unet_config.params.attention_resolutions", 0, "must be a list"),
        ("unet_config.params.num_heads", 0, "cannot run|do not fit"),
        ("first_stage_config.params.ddconfig.ch_mult", 3, "do not fit"),
        ("first_stage_config.params.ddconfig.out_ch", 1, "decodes to 1 channels"),
        ("cond_stage_config", "__is_unconditional__", "needs a context"),
    ],
)
def test_sizes_that_do_not_fit(where, value, says, model_config):
    config = model_config("imagenet", cond_stage_config=CLASSES)
    check_sizes(config, "config file x")
    OmegaConf.update(config.model.params, where, value)
    with pytest.raises(UserError, match=says) as caught:
        check_sizes(config, "config file x")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            load_config(path)


# ---------------------------------------------------------------------- schedule and holder


@pytest.mark.parametrize(
    ("file", "start", "end"),
    [
        ("latent-diffusion/lsun_bedrooms-ldm-vq-4", 0.0015, 0.0195),
        ("latent-diffusion/lsun_churches-ldm-kl-8", 0.0015, 0.0155),
        ("stable-diffusion/v1-inference", 0.00085, 0.012),
    ],
)
def test_schedule_is_linear_in_the_root_of_beta(file, start, end):
    schedule = build_schedule(load_config(REPOSITORY / "configs" / f"{file}.yaml").model.params)
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=PRODUCT_TOLERANCE, atol=0)
    linear = torch.cumprod(1 - torch.linspace(start, end, 1000, dtype=torch.float64), 0)  # planted
    assert not torch.allclose(schedule.alphas_cumprod, linear, rtol=PRODUCT_TOLERANCE)


def test_schedule_defaults():
    schedule = build_schedule({})
    assert schedule.num_train == 1000
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(1 - 1e-4)
    assert build_schedule({"timesteps": 50}).num_train == 50


@pytest.mark.parametrize(("name", "kind"), [("sqrt_linear", "linear"), ("sqrt", "sqrt"), ("cosine", "cosine")])
def test_other_schedules(name, kind):
    params = {"beta_schedule": name, "linear_start": 0.01, "linear_end": 0.02, "timesteps": 100}
    betas = make_beta_schedule(kind, 0.01, 0.02, 100)
    assert torch.equal(build_schedule(params).betas, betas.float())
    if name == "cosine":
        betas = make_beta_schedule(kind, 0.01, 0.02, 100, cosine_offset=0.1)
        assert torch.equal(build_schedule(params | {"cosine_s": 0.1}).betas, betas.float())
    assert float(build_schedule(params | {"rescale_betas_zero_snr": True}).alphas_cumprod[-1]) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("first_stage", ["vq", "kl"])
def test_latents_are_scaled(first_stage, model_config, first_stages, fill, relative):
    model = instantiate_from_config(model_config(first_stage=first_stages[first_stage], scale_factor=0.25).model)
    fill(model.first_stage_model.eval())
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.manual_seed(0)
    latents = model.encode(x)
    torch.manual_seed(0)
    plain = model.first_stage_model.encode(x)
    plain = plain if first_stage == "vq" else plain.sample()
    assert torch.equal(latents, plain * 0.25)
    assert torch.equal(model.decode(latents), model.first_stage_model.decode(plain))
    assert model.condition([1, 2]) is None
    assert model.network is model.model.diffusion_model
    assert "scale_factor" in model.state_dict()


def test_condition(model_config):
    stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 12, "n_classes": 5}}
    model = instantiate_from_config(model_config("imagenet", cond_stage_config=stage).model)
    context = model.condition([3, model.cond_stage_model.unconditional])
    assert context.shape == (2, 1, 12) and not context.requires_grad
    assert torch.equal(context[1, 0], model.cond_stage_model.embedding.weight[4])
