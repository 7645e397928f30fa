"""Noise schedules and timestep selection."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import DiffusionSchedule, make_beta_schedule, select_timesteps


def test_linear_is_linear_in_beta():
    betas = make_beta_schedule("linear", 1e-4, 0.02, 1000)
    assert betas.dtype == torch.float64 and betas.shape == (1000,)
    np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)


@pytest.mark.parametrize("kind", ["quad", "scaled_linear"])
def test_quad_is_linear_in_the_root_of_beta(kind):
    betas = make_beta_schedule(kind, 0.0015, 0.0195, 1000)
    np.testing.assert_allclose(np.diff(betas.sqrt()), (0.0195**0.5 - 0.0015**0.5) / 999, rtol=1e-9)
    assert betas[0].item() == pytest.approx(0.0015) and betas[-1].item() == pytest.approx(0.0195)


def test_const_jsd_sigmoid():
    assert make_beta_schedule("const", 0.1, 0.3, 4).tolist() == [0.3] * 4
    assert make_beta_schedule("jsd", 0.1, 0.3, 4).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    sigmoid = make_beta_schedule("sigmoid", 0.1, 0.3, 5)
    assert sigmoid[2].item() == pytest.approx(0.2)  # the middle of the logistic
    assert sigmoid[0].item() == pytest.approx(0.1 + 0.2 / (1 + np.exp(6)))
    assert (sigmoid + sigmoid.flip(0)).tolist() == pytest.approx([0.4] * 5)


def test_cosine_is_that_of_the_improved_ddpm():
    bars = DiffusionSchedule(make_beta_schedule("cosine", 0.1, 0.3, 1000)).alphas_cumprod
    s = 0.008
    for t in (0, 499, 900):
        cosines = (np.cos((u + s) / (1 + s) * np.pi / 2) for u in ((t + 1) / 1000, 0.0))
        assert float(bars[t]) == pytest.approx((next(cosines) / next(cosines)) ** 2, rel=1e-6)
    assert make_beta_schedule("cosine", 0.1, 0.3, 1000).max() == 0.999
    later = make_beta_schedule("cosine", 0.1, 0.3, 1000, cosine_offset=0.1)
    assert float(later[0]) > 2 * float(make_beta_schedule("cosine", 0.1, 0.3, 1000)[0])


def test_sqrt_is_the_root_of_linear():
    assert make_beta_schedule("sqrt", 0.04, 0.25, 3).tolist() == pytest.approx([0.2, 0.145**0.5, 0.5])


def test_zero_terminal_snr():
    betas = make_beta_schedule("scaled_linear", 0.00085, 0.012, 1000)
    before, after = DiffusionSchedule(betas), DiffusionSchedule(betas, zero_terminal_snr=True)
    assert float(after.alphas_cumprod[-1]) == 0.0 < float(before.alphas_cumprod[-1])
    assert float(after.alphas_cumprod[0]) == pytest.approx(float(before.alphas_cumprod[0]), rel=1e-6)
    assert bool((after.alphas_cumprod[1:] < before.alphas_cumprod[1:]).all())
    # Shifted and scaled in √ᾱ: differences keep their proportions.
    falls = [-np.diff(s.alphas_cumprod.sqrt().numpy()) for s in (before, after)]
    np.testing.assert_allclose(falls[1][:990] / falls[0][:990], (falls[1] / falls[0])[0], rtol=1e-3)
    with pytest.raises(UserError, match="no signal"):
        after.steps([0, 999])
    with pytest.raises(UserError, match="one timestep"):
        DiffusionSchedule(betas[:1], zero_terminal_snr=True)


def test_alphas_cumprod_is_the_product_of_one_minus_beta():
    schedule = DiffusionSchedule(torch.tensor([0.5, 0.25, 0.5], dtype=torch.float64))
    assert schedule.alphas_cumprod.tolist() == [0.5, 0.375, 0.1875]
    assert schedule.betas.dtype == torch.float32 and schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.num_train == 3
    with pytest.raises(FrozenInstanceError):
        schedule.betas = torch.ones(3)


def test_steps_pair_each_timestep_with_the_next_less_noisy_one():
    schedule = DiffusionSchedule(torch.tensor([0.5, 0.25, 0.5]))
    assert schedule.steps([0, 0, 2]) == [(2, 0.1875, 0.5), (0, 0.5, 0.5), (0, 0.5, 1.0)]
    assert schedule.steps([1, 2], final_alpha_bar=0.5) == [(2, 0.1875, 0.375), (1, 0.375, 0.5)]


def test_uniform_strides_by_the_whole_quotient():
    assert select_timesteps("uniform", 4, 1000) == [0, 250, 500, 750]
    assert select_timesteps("uniform", 1, 1000) == [0]
    assert select_timesteps("uniform", 1000, 1000) == list(range(1000))
    assert len(select_timesteps("uniform", 300, 1000)) == 334  # as published
    assert select_timesteps("uniform", 4, 1000, offset=1) == [1, 251, 501, 751]


def test_quad_is_quadratic_and_keeps_its_repeats():
    assert select_timesteps("quad", 5, 1000) == [0, 50, 200, 450, 800]
    assert select_timesteps("quad", 100, 1000)[:6] == [0, 0, 0, 0, 1, 2]
    assert select_timesteps("quad", 5, 1000, offset=1) == [1, 51, 201, 451, 801]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_beta_schedule("cubic", 0.1, 0.2, 10), "sigmoid"),
        (lambda: make_beta_schedule("linear", 0.1, 0.2, 0), "at least 1"),
        (lambda: make_beta_schedule("linear", 0.0, 0.2, 10), "beta_start"),
        (lambda: make_beta_schedule("linear", 0.1, 1.2, 10), "beta_end"),
        (lambda: make_beta_schedule("quad", -0.1, 0.2, 10), "beta_start"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, float("nan")])), "beta_start"),
        (lambda: DiffusionSchedule(torch.zeros(0)), "beta_start"),
        (lambda: select_timesteps("cubic", 10, 1000), "uniform or quad"),
        (lambda: select_timesteps("uniform", 0, 1000), "from 1 to 1000"),
        (lambda: select_timesteps("quad", 1001, 1000), "from 1 to 1000"),
        (lambda: select_timesteps("uniform", 1000, 1000, offset=1), "divides 1000"),
        (lambda: select_timesteps("uniform", 3, 1000, offset=1), "divides 1000"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, 0.2])).steps([]), "within 0 … 1"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, 0.2])).steps([1, 0]), "ascending"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, 0.2])).steps([0, 2]), "within 0 … 1"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, 0.2])).steps([-1, 1]), "within 0 … 1"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, 1.0])).steps([0, 1]), "timestep 1"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, 0.2])).steps([0, 1], 0.5), "final_alpha_bar"),
        (lambda: DiffusionSchedule(torch.tensor([0.1, 0.2])).steps([0, 1], 1.5), "final_alpha_bar"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_fix(call, says):
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
