"""Sizes of a config that do not fit each other are one sentence, found without weights."""

from __future__ import annotations

import pytest

from ddim.sizes import check_sizes
from qdiff.errors import UserError


def test_sizes_that_fit(tiny_config):
    check_sizes(tiny_config, "config file x")


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("data", "channels", 3, r"data\.channels 3 and model\.in_channels 1"),
        ("model", "out_ch", 2, r"model\.out_ch 2"),
        ("data", "image_size", 9, "multiple of 2"),
        ("model", "ch", 32 * 10**14, "cannot run"),
    ],
)
def test_sizes_that_do_not_fit(section, key, value, says, tiny_config):
    tiny_config[section][key] = value
    with pytest.raises(UserError, match=says) as caught:
        check_sizes(tiny_config, "config file x")
    assert "config file x" in str(caught.value) and "\n" not in str(caught.value)


def test_what_torch_says_is_one_sentence(tiny_config, monkeypatch):
    def forward(*_):
        raise RuntimeError("shapes do not fit\n  at line 3\n")

    monkeypatch.setattr("ddim.models.diffusion.Model.forward", forward)
    with pytest.raises(UserError, match=r"cannot run \(shapes do not fit\); correct data\.image_size"):
        check_sizes(tiny_config, "config file x")
