"""Model configs are read from YAML and checked before anything is built on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ddim.config import REQUIRED, SECTIONS, build_schedule, check_training, load_config, parameterization
from ddim.models.diffusion import Model
from qdiff.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yml"))
KEYS = [(section, name) for section in REQUIRED for name, key in SECTIONS[section].items() if key.required]


@pytest.fixture
def written(tiny_config, tmp_path):
    """``written(config)`` saves a config (by default the tiny one) and returns its path."""

    def write(config=tiny_config) -> Path:
        OmegaConf.save(config, tmp_path / "model.yml")
        return tmp_path / "model.yml"

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_build_a_network_and_a_schedule(path):
    config = load_config(path)
    with torch.device("meta"):
        network = Model(config)
    assert network.conv_in.in_channels == config.data.channels
    assert build_schedule(config).num_train == config.diffusion.num_diffusion_timesteps
    assert config.pretrained.file and config.pretrained.extractor


def test_read_as_an_attribute_tree(written):
    config = load_config(written())
    assert config.model.ch_mult == [1, 1] and config.data.image_size == 8


def test_schedule_follows_the_config(tiny_config):
    tiny_config.diffusion.num_diffusion_timesteps = 7
    schedule = build_schedule(tiny_config)
    assert schedule.num_train == 7
    assert schedule.betas[0] == pytest.approx(0.0001) and schedule.betas[-1] == pytest.approx(0.02)
    tiny_config.diffusion.beta_schedule = "cubic"
    with pytest.raises(UserError, match="cubic"):
        build_schedule(tiny_config)


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_missing_key_is_named(section, key, tiny_config, written):
    del tiny_config[section][key]
    with pytest.raises(UserError, match=rf"model\.yml has no {section}\.{key};"):
        load_config(written(tiny_config))


@pytest.mark.parametrize("section", sorted(REQUIRED))
def test_missing_sections_are_named(section, tiny_config, written):
    del tiny_config[section]
    with pytest.raises(UserError, match=rf"has no {section}\."):
        load_config(written(tiny_config))


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "just words", "data: 3\nmodel: 4", b"\xff\xfe\x00", "\t- x"])
def test_other_files_are_one_sentence(content, tmp_path):
    path = tmp_path / "model.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_names_what_there_is(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cats.yml").write_text("")
    monkeypatch.chdir(tmp_path)
    for path in ("configs/dogs.yml", "configs"):
        with pytest.raises(UserError, match="does not exist") as caught:
            load_config(path)
        assert path in str(caught.value) and "cats.yml" in str(caught.value)


def changed(config, section, key, value, tmp_path):
    config.setdefault(section, {})
    config[section][key] = value
    OmegaConf.save(config, tmp_path / "config.yml")
    return tmp_path / "config.yml"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "ch", "abc"),
        ("model", "ch", True),
        ("model", "ch_mult", [1, 0.5]),
        ("model", "ch_mult", []),
        ("model", "ch", 40),
        ("model", "attn_resolutions", 0),
        ("model", "resamp_with_conv", "yes please"),
        ("model", "type", "bayesian"),
        ("model", "var_type", "learned"),
        ("data", "image_size", 0),
        ("data", "rescaled", 1),
        ("diffusion", "beta_end", "abc"),
        ("diffusion", "beta_end", float("nan")),
        ("diffusion", "parameterization", "score"),
        ("diffusion", "num_diffusion_timesteps", None),
        ("sampling", "batch_size", 1e9),
        ("optim", "optimizer", "SGD"),
    ],
)
def test_values_that_no_network_can_have_are_refused(section, key, value, tiny_config, tmp_path):
    with pytest.raises(UserError, match=key) as caught:
        load_config(changed(tiny_config, section, key, value, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key"),
    [("data", "image_mean"), ("model", "num_heads"), ("diffusion", "rescale_zero_snr"), ("optim", "momentum")],
)
def test_keys_that_nobody_reads_are_named(section, key, tiny_config, tmp_path):
    with pytest.raises(UserError, match=rf"unknown key {section}\.{key};"):
        load_config(changed(tiny_config, section, key, 1, tmp_path))


def test_sections_that_nobody_reads_are_named(tiny_config, written):
    tiny_config.difusion = {}
    with pytest.raises(UserError, match=r"has the unknown key difusion; did you mean diffusion\?"):
        load_config(written(tiny_config))


def test_one_range_of_images(tiny_config, tmp_path):
    tiny_config.data.rescaled = True
    with pytest.raises(UserError, match="both"):
        load_config(changed(tiny_config, "data", "logit_transform", True, tmp_path))


def test_what_the_network_predicts(tiny_config):
    assert parameterization(tiny_config).value == "eps"
    tiny_config.diffusion.parameterization = "v"
    assert parameterization(tiny_config).value == "v"


def test_schedules_of_latent_diffusion_and_without_terminal_signal(tiny_config, written):
    tiny_config.diffusion.beta_schedule = "cosine"
    assert float(build_schedule(load_config(written())).alphas_cumprod[500]) == pytest.approx(0.4923, abs=1e-3)
    tiny_config.diffusion.rescale_betas_zero_snr = True
    bars = build_schedule(load_config(written())).alphas_cumprod
    assert float(bars[-1]) == 0.0 and float(bars[500]) == pytest.approx(0.4923, abs=1e-3)


def test_training_needs_its_sections(tiny_config):
    digits = load_config(Path(__file__).parents[2] / "configs" / "digits.yml")
    check_training(digits, "config file x")
    with pytest.raises(UserError, match=r"config file x has no training\.batch_size"):
        check_training(tiny_config, "config file x")
    del digits.optim.grad_clip
    with pytest.raises(UserError, match=r"has no optim\.grad_clip"):
        check_training(digits, "config file x")
