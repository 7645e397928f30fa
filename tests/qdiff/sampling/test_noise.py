"""The noise of an image depends on (seed, image number) alone."""

from __future__ import annotations

import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import ImageNoise

SHAPE = (3, 4, 4)


def draws(seed: int, indices, count: int = 3, **kwargs) -> torch.Tensor:
    """[count, N, *SHAPE]"""
    noise = ImageNoise(seed, indices, SHAPE, **kwargs)
    return torch.stack([noise.draw() for _ in range(count)])


def test_independent_of_the_batch():
    together = draws(7, range(5))
    for i in range(5):
        assert torch.equal(draws(7, [i])[:, 0], together[:, i])
    assert torch.equal(draws(7, [4, 1]), together[:, [4, 1]])


def test_same_seed_same_noise_other_seed_other_noise():
    assert torch.equal(draws(7, [0, 1]), draws(7, [0, 1]))
    assert not torch.equal(draws(7, [0, 1]), draws(8, [0, 1]))
    assert not torch.equal(draws(7, [1]), draws(8, [0]))  # seed + index would be a bad mix


def test_the_stream_stays_what_it_was():
    """Images made with an earlier release must come out again."""
    first = ImageNoise(1234, [0, 49_999], (4,)).draw()
    expected = [
        [-0.5477899, -0.0379545, -0.2936670, -1.7664659],
        [0.5008259, 0.3689997, -0.1142090, -1.4301406],
    ]
    assert torch.allclose(first, torch.tensor(expected), rtol=0, atol=1e-6)


def test_large_seeds_do_not_spill_into_the_index():
    assert not torch.equal(draws(2**32 + 5, [0]), draws(5, [1]))
    # nor are they cut to 32 bits, as torch's CPU generator cuts them
    assert not torch.equal(draws(2**32 + 5, [0]), draws(5, [0]))


def test_draws_are_standard_normal_and_uncorrelated():
    x = torch.stack([n.draw() for n in [ImageNoise(0, range(20), (4000,))] for _ in range(2)])  # [2, 20, 4000]
    rows = x.flatten(0, 1).double()  # 40 streams of 4000
    tolerance = 5 / 4000**0.5  # five standard errors of a mean or correlation
    assert rows.mean(dim=1).abs().max() < tolerance
    assert (rows.var(dim=1) - 1).abs().max() < tolerance * 2**0.5
    correlation = torch.corrcoef(rows) - torch.eye(40)
    assert correlation.abs().max() < tolerance


def test_shape_dtype_device():
    x = ImageNoise(0, [3, 9], SHAPE, device="cpu", dtype=torch.float64).draw()
    assert x.shape == (2, *SHAPE) and x.dtype == torch.float64 and x.device.type == "cpu"
    assert torch.equal(x.float(), draws(0, [3, 9], count=1)[0])
    assert ImageNoise(0, [], SHAPE).draw().shape == (0, *SHAPE)


@pytest.mark.parametrize(("seed", "indices", "says"), [(-1, [0], "seed"), (0, [2, -3], "image -3")])
def test_negative_numbers_are_refused(seed, indices, says):
    with pytest.raises(UserError, match=says):
        ImageNoise(seed, indices, SHAPE)
