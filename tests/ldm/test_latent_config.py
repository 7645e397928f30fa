"""Configs of latent models: what they may name, how they extend each other, and the schedule they describe."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

import ldm.config
from ldm.config import REPOSITORY, is_latent_config, load_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.schedule import build_schedule
from ldm.util import ALLOWED_TARGETS, instantiate_from_config
from qdiff.errors import UserError

# Relative, of ᾱ: published code rounds betas to float32.
PRODUCT_TOLERANCE = 1e-7

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
    with pytest.raises(UserError, match=r"not among the classes|no target"):
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
    assert is_latent_config(config)
    assert isinstance(instantiate_from_config(config.model), LatentDiffusion)
    assert not is_latent_config(OmegaConf.create({"model": {"ch": 32}}))
    assert not is_latent_config(OmegaConf.create({}))


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
        (f"model: {{target: {HOLDER}}}", "lacks model.params.unet_config"),
        (f"model: {{target: {HOLDER}, params: null}}", "lacks model.params.unet_config"),
        (f"model: {{target: {HOLDER}, params: {{unet_config: 3}}}}", "lacks model.params.unet_config"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
        ("base: 3", "3 does not exist"),
    ],
)
def test_bad_files(text, says, written):
    with pytest.raises(UserError, match=says) as caught:
        load_config(written(text))
    assert "\n" not in str(caught.value)


def test_file_that_lacks_a_part(written, model_config):
    for part in ("unet_config", "first_stage_config"):
        for spoil in (
            lambda c, part=part: c.model.params.pop(part),
            lambda c, part=part: c.model.params[part].pop("params"),
            lambda c, part=part: c.model.params[part].pop("target"),
        ):
            config = model_config()
            spoil(config)
            with pytest.raises(UserError, match=f"lacks model.params.{part}"):
                load_config(written(config))
        config = model_config()
        config.model.params[part].target = "os.system"
        with pytest.raises(UserError, match=r"names the class os\.system, which is not allowed"):
            load_config(written(config))


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
