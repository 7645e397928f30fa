"""Images and the range that a network was trained on: each way back undoes the way there."""

from __future__ import annotations

import pytest
import torch

from ddim.datasets.transform import from_network_range, to_network_range

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4, dtype=torch.float64).view(2, 3, 4, 4)
RANGES = {
    "rescaled": ({}, (-1.0, 1.0)),
    "plain": ({"rescaled": False}, (0.0, 1.0)),
    "logit": ({"rescaled": False, "logit_transform": True}, (-13.8155, 13.8155)),
}


@pytest.mark.parametrize("name", RANGES)
def test_there_and_back(name):
    data, (low, high) = RANGES[name]
    x_0 = to_network_range(IMAGES, data)
    assert float(x_0.min()) == pytest.approx(low, abs=1e-3) and float(x_0.max()) == pytest.approx(high, abs=1e-3)
    torch.testing.assert_close(from_network_range(x_0, data), IMAGES, rtol=0, atol=1e-5)


def test_the_logit_is_that_of_the_share_of_white():
    middle = torch.zeros(1, 1, 1, 2, dtype=torch.float64) + torch.tensor([0.0, 0.5])
    x_0 = to_network_range(middle, RANGES["logit"][0]).flatten().tolist()
    assert x_0 == pytest.approx([0.0, 1.0986], abs=1e-4)  # log(0.75/0.25)


@pytest.mark.parametrize("rescaled", [True, False])
def test_dequantization_adds_less_than_a_grey_level(rescaled):
    levels = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 127.5 - 1.0
    torch.manual_seed(0)
    spread = to_network_range(levels, {"rescaled": rescaled, "uniform_dequantization": True})
    share = (spread + 1) / 2 if rescaled else spread
    # Level k of 255 becomes a draw from [k/256, (k + 1)/256).
    assert torch.equal((share * 256).floor(), ((levels + 1) * 127.5).round())
    assert len(share.unique()) > 1000
    noisy = to_network_range(levels, {"rescaled": rescaled, "gaussian_dequantization": True})
    difference = (noisy - levels) / 2 if rescaled else noisy - (levels + 1) / 2
    assert float(difference.std()) == pytest.approx(0.01, rel=0.1)


def test_flips_are_of_whole_images_and_of_half_of_them():
    images = IMAGES[:1].expand(400, -1, -1, -1)
    torch.manual_seed(0)
    made = to_network_range(images, {"random_flip": True})
    same = (made == images).flatten(1).all(1)
    assert torch.equal(made[~same], images[~same].flip(-1)) and 150 < int(same.sum()) < 250
    assert torch.equal(to_network_range(images, {}), images)
