"""Modulation at its edges: a state that is cleared, and samplers of one step."""

from __future__ import annotations

import pytest
from modulated_runs import FOLDER, MODULATED
from run_checks import manifest, succeeded

SCRIPT = "sample_diffusion_ddim"


@pytest.mark.slow
def test_a_cleared_state_can_be_calibrated(call, tiny, tmp_path):
    options = (*tiny.options, "--timesteps", 2, "--max_images", 1, *MODULATED)
    succeeded(call(SCRIPT, *options, "--modulate_ablation", "cleared-state", FOLDER, tmp_path / "run"))
    counted = manifest(tmp_path / "run")["activation_quantizers"]
    assert len(counted["silent"]) == counted["total"] > 20


def test_a_sampler_of_one_step_has_nothing_to_modulate(call, tiny, tmp_path):
    options = (*tiny.options, "--timesteps", 1, "--max_images", 1, *MODULATED, "--cali_st", 1)
    assert "--modulate" in call(SCRIPT, *options, FOLDER, tmp_path / "run").error_line()
    assert list(tmp_path.iterdir()) == []


def test_a_sampler_of_one_step_has_no_pairs(call, tiny, tmp_path):
    asked = ("--generate", "residual", "--cali_st", 1, "--cali_n", 2, "--cali_data_path", tmp_path / "a.pt")
    line = call(SCRIPT, *tiny.options, "--timesteps", 1, *asked).error_line()
    assert "--timesteps" in line or "--cali_st 0" not in line
