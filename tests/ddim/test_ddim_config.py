"""Model configs are read from YAML and checked before anything is built on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ddim.config import REQUIRED, build_schedule, load_config
from ddim.models.diffusion import Model
from qdiff.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yml"))
KEYS = [(section, key) for section, keys in REQUIRED.items() for key in keys]


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
    with pytest.raises(UserError, match=rf"model\.yml lacks {section}\.{key};"):
        load_config(written(tiny_config))


@pytest.mark.parametrize("section", sorted(REQUIRED))
def test_missing_sections_are_named(section, tiny_config, written):
    del tiny_config[section]
    with pytest.raises(UserError, match=rf"lacks {section}\."):
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


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "ch", "abc"), ("data", "image_size", 0), ("model", "ch_mult", [1, 0.5]), ("model", "ch", 40)],
)
def test_numbers_that_no_network_can_have_are_refused(section, key, value, tiny_config, tmp_path):
    tiny_config[section][key] = value
    OmegaConf.save(tiny_config, tmp_path / "config.yml")
    with pytest.raises(UserError, match=key):
        load_config(tmp_path / "config.yml")
