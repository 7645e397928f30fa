"""GRIP's own choice of widths from the command line."""

from __future__ import annotations

import json

import pytest
from run_checks import succeeded

from qdiff.cli import mixed_precision

SCRIPT = "sample_diffusion_ddim"
SAMPLER = ("--timesteps", 3, "--max_images", 1, "--seed", 3)
PTQ = ("--ptq", "--weight_bit", 4, "--quant_act", "--method", "grip", "--cali_st", 2, "--cali_n", 2)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_cost_is_that_of_uniform_widths(call, tiny, tmp_path):
    words = (*tiny.options, *SAMPLER, *PTQ)
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    succeeded(call(SCRIPT, *words, "--uniform_widths", "--layer_bits", "none", "-l", tmp_path / "uniform"))
    run, uniform = (read(tmp_path / name / "run.json") for name in ("run", "uniform"))
    assert not (tmp_path / "uniform" / "widths.json").exists() and "sensitivities" not in uniform["seconds"]
    assert 0.97 * uniform["cost"]["bops"] < run["cost"]["bops"] <= uniform["cost"]["bops"]
    assert run["cost"]["size_bytes"] < 1.02 * uniform["cost"]["size_bytes"]
    widths = read(tmp_path / "run" / "widths.json")
    assert 3.9 < widths["mean_bits"] <= 4 and len(set(widths["layer_bits"].values())) > 3
    assert run["cpu_seconds"]["sensitivities"] > 0
    found = read(tmp_path / "run" / "sensitivities.json")
    assert found["settings"]["measure"] == "trajectory"

    (tmp_path / "run" / "widths.json").unlink()  # as if it had been killed before: nothing is measured again
    (tmp_path / "run" / "quantized.safetensors").unlink()
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    assert read(tmp_path / "run" / "widths.json") == widths
    assert read(tmp_path / "run" / "sensitivities.json") == found

    loaded = (*tiny.options, *SAMPLER, *PTQ[:6], "--cali_ckpt", tmp_path / "run" / "quantized.safetensors")
    succeeded(call(SCRIPT, *loaded, "-l", tmp_path / "loaded"))
    assert read(tmp_path / "loaded" / "run.json")["noise_error"] == run["noise_error"]


@pytest.mark.slow
def test_modulated_runs_have_chosen_weights(call, tiny, tmp_path):
    words = (*tiny.options, *SAMPLER, *PTQ, "--act_bit", 8, "--quant_mode", "dynamic", "--modulate")
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    alike = ("--uniform_widths", "--layer_bits", "first=A16,last=A16")
    succeeded(call(SCRIPT, *words, *alike, "-l", tmp_path / "uniform"))
    run, uniform = (read(tmp_path / name / "run.json") for name in ("run", "uniform"))
    assert 0.97 * uniform["cost"]["bops"] < run["cost"]["bops"] <= uniform["cost"]["bops"]
    widths = read(tmp_path / "run" / "widths.json")
    assert widths["mean_act_bits"] is None and 3 < widths["mean_bits"] <= 4  # operations are the tighter bound
    chosen = widths["layer_bits"]
    assert chosen.pop("first") == chosen.pop("last") == "A16"
    assert len({bits.partition("A")[0] for bits in chosen.values()}) > 2
    assert [name for name, bits in chosen.items() if bits.endswith("A16")] == ["conv_in", "conv_out"]
    loaded = (*tiny.options, *SAMPLER, *PTQ[:6], *words[-5:], "--cali_ckpt", tmp_path / "run" / "quantized.safetensors")
    succeeded(call(SCRIPT, *loaded, "-l", tmp_path / "loaded"))
    assert read(tmp_path / "loaded" / "run.json")["noise_error"] == run["noise_error"]


def test_steps_without_a_range_are_told_before_anything_is_measured(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_precision, "trajectory_sensitivities", None)  # fails if it is called
    ranges = ("--act_ranges", "timestep", "--cali_spacing", "every", "--cali_st", 3)
    words = (*tiny.options, *SAMPLER, "--timesteps", 5, *PTQ, *ranges)
    outcome = call(SCRIPT, *words, "-l", tmp_path / "run")
    assert outcome.code == 2 and "ranges per timestep were calibrated at 3 timesteps" in outcome.err


@pytest.mark.slow
def test_a_seed_has_trajectories_of_its_own(call, tiny, tmp_path, monkeypatch):
    seen, measure = [], mixed_precision.trajectory_sensitivities

    def watching(pipeline, names, widths, config, images, generator, *rest, **more):
        seen.append((images[0], len(images), generator.initial_seed()))
        return measure(pipeline, names, widths, config, range(images[0], images[0] + 1), generator, *rest, **more)

    monkeypatch.setattr(mixed_precision, "trajectory_sensitivities", watching)
    words = (*tiny.options, *SAMPLER, *PTQ)
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "a"))
    succeeded(call(SCRIPT, *words, "--cali_seed", 7, "-l", tmp_path / "b"))
    assert seen[0] == (0, 16, 3) and seen[1][0] > 1 << 24 and seen[1][1:] == (16, 7)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--method", "gptq", "--uniform_widths"),
            "--uniform_widths has no meaning with GPTQ, which chooses no widths",
        ),
        (("--weight_bit", 9), "9"),
    ],
)
def test_bad_options_are_one_sentence(words, says, call, tiny, tmp_path):
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, *PTQ, *words, "-l", tmp_path / "run")
    assert says in outcome.error_line()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(), ("--uniform_widths",)])
def test_a_given_recording_that_ends_early_is_told_once(widths, call, tiny, tmp_path):
    file = tmp_path / "every.pt"
    sampled = (*tiny.options, *SAMPLER, "--timesteps", 5, "--cali_st", 3, "--cali_n", 2)
    succeeded(call(SCRIPT, *sampled, "--generate", "raw", "--cali_data_path", file))
    outcome = call(SCRIPT, *sampled, *PTQ[:6], *widths, "--cali_data_path", file, "-l", tmp_path / "run")
    assert succeeded(outcome).err.count("every.pt ends at timestep 400, but sampling goes on to 0") == 1
