"""``--target_bits`` from the command line: what is measured and chosen, kept, continued and used by other runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from families import SCRIPTS
from run_checks import succeeded
from safetensors.torch import load_file, save_file
from script_device import ON_DEVICE
from structural_similarity import SSIM_TOLERANCE, ssim

from qdiff.calibration import sensitivity
from qdiff.calibration.run import init_weights
from qdiff.cli import mixed_precision
from qdiff.cli.options.parser import Parser
from qdiff.cli.planned_recording import first_image
from qdiff.config import QuantConfig
from qdiff.evaluation.fidelity import mean_ssim
from qdiff.io.images import to_uint8
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.wrapping import layer_places

SCRIPT = "sample_diffusion_ddim"
SAMPLER = ("--timesteps", 2, "--max_images", 1, "--seed", 3)
PTQ = ("--ptq", "--weight_bit", 4, "--quant_act", "--method", "linear", "--cali_st", 2, "--cali_n", 2)
MIXED = ("--target_bits", 4.5, "--candidate_bits", "3,8", "--target_act_bits", 7, "--candidate_act_bits", "6,8")


def read(path):
    return json.loads(path.read_text())


def refused(outcome):
    """Return the last line of a command that began to work."""
    assert outcome.code == 2
    return outcome.err.splitlines()[-1]


@pytest.mark.slow
def test_widths_are_chosen_kept_and_used_again(call, tiny, tmp_path, monkeypatch):
    words = (*tiny.options, *SAMPLER, *PTQ, *MIXED)
    measured, measure = [], mixed_precision.layer_sensitivity

    def counting(network, name, *rest):
        measured.append(name)
        if stop and len(measured) == stop:
            raise KeyboardInterrupt
        return measure(network, name, *rest)

    monkeypatch.setattr(mixed_precision, "layer_sensitivity", counting)
    stop = 20
    call(SCRIPT, *words, "-l", tmp_path / "run")
    kept = read(tmp_path / "run" / "sensitivities.json")
    assert len(kept["weights"]) + len(kept["activations"]) == 19
    stop = None
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    assert len(measured) == len(set(measured)) * 2 + 1, "a layer is measured once for each operand, unless interrupted"
    run, widths = read(tmp_path / "run" / "run.json"), read(tmp_path / "run" / "widths.json")
    assert widths["mean_bits"] <= 4.5
    # 31.5 per MAC of layers, 64 per MAC of attention's products
    assert 31 < run["cost"]["bops"] / run["cost"]["macs"] < 32
    assert {bits[:2] for bits in widths["layer_bits"].values()} == {"W3", "W8"}
    assert run["config"]["ptq"]["mixed"]["target"] == 4.5 and run["seconds"]["sensitivities"] > 0

    measured.clear()  # another target on the same sensitivities
    again = (*words, "--target_bits", 5, "--sensitivities", tmp_path / "run" / "sensitivities.json")
    succeeded(call(SCRIPT, *again, "-l", tmp_path / "more"))
    more = read(tmp_path / "more" / "widths.json")
    assert measured == [] and 4.5 < more["mean_bits"] <= 5
    assert read(tmp_path / "more" / "run.json")["cost"]["size_bytes"] > run["cost"]["size_bytes"]

    other = (*again, "--seed", 4, "-l", tmp_path / "other")
    assert refused(call(SCRIPT, *other)) == (
        "error: the sensitivities were measured on another calibration set; leave out --sensitivities, or choose "
        "another --logdir"
    )
    assert (
        "other settings (widths)" in call(SCRIPT, *again, "--candidate_bits", "4,5", "-l", tmp_path / "o").error_line()
    )
    changed = call(SCRIPT, *words, "--target_bits", 5, "-l", tmp_path / "run").error_line()
    assert "target" in changed

    checkpoint = tmp_path / "run" / "quantized.safetensors"
    plain = (*tiny.options, *SAMPLER, *PTQ[:4], "--cali_ckpt", checkpoint, "-l", tmp_path / "loaded")
    assert f"give --layer_bits {checkpoint}" in call(SCRIPT, *plain, "--layer_bits", "none").error_line()
    succeeded(call(SCRIPT, *plain))  # with the file's widths
    assert read(tmp_path / "loaded" / "run.json")["noise_error"] == run["noise_error"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--target_bits", 9), "--target_bits is 9; give a mean width from 2 to 8"),
        (("--candidate_bits", "2,4"), "--candidate_bits needs a mean width; add --target_bits"),
        (("--target_bits", 4, "--candidate_bits", "2,x"), "--candidate_bits is 2,x"),
        (("--target_bits", 4, "--candidate_act_bits", "4,8"), "--candidate_act_bits needs --target_act_bits"),
        (("--target_bits", 4, "--sensitivities", "nowhere.json"), "--sensitivities nowhere.json does not exist"),
        (("--target_act_bits", 8, "--modulate"), "--target_act_bits measures activations, not their changes"),
        (("--target_bits", 4, "--cali_ckpt", "x.safetensors"), "--target_bits chooses widths before a calibration"),
        (("--target_bits", 2, "--layer_bits", "conv_in=W8"), "a mean of 2 bits cannot be reached"),
    ],
)
def test_bad_options_are_one_sentence(words, says, call, tiny, tmp_path):
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, *PTQ, *words, "-l", tmp_path / "run")
    assert says in outcome.error_line()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"settings": {}, "weights": {"conv_in": {"a": 1}}, "activations": {}}'])
def test_damaged_sensitivities(text, call, tiny, tmp_path):
    (tmp_path / "s.json").write_text(text)
    words = (*PTQ, *MIXED, "--sensitivities", tmp_path / "s.json", "-l", tmp_path / "run")
    assert "s.json holds no sensitivities" in call(SCRIPT, *tiny.options, *SAMPLER, *words).error_line()


@pytest.mark.slow
def test_images_are_compared_if_asked(call, tiny, tmp_path, monkeypatch):
    """The tiny model's images are smaller than a window of SSIM, so equal pixels are counted instead."""
    compared = []

    def alike(images, float_images):
        assert images.shape == float_images.shape == (3, 1, 8, 8)
        compared.append(float((images == float_images).float().mean()))
        return compared[-1]

    layers = [name for name, tensor in load_file(tiny.weights).items() if tensor.dim() > 1]
    (tmp_path / "widths.yaml").write_text(
        "".join(f"{n.removesuffix('.weight')}: W8\n" for n in layers[6:])
    )  # 6 are left
    words = (*tiny.options, *SAMPLER, *PTQ, "--target_bits", 7.99, "--candidate_bits", "2,8", "--sensitivity", "ssim")
    words = (*words, "--sensitivity_samples", 3, "--layer_bits", tmp_path / "widths.yaml")
    assert "too small for SSIM" in refused(call(SCRIPT, *words, "-l", tmp_path / "small"))
    monkeypatch.setattr(mixed_precision, "mean_ssim", alike)
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    found = read(tmp_path / "run" / "sensitivities.json")
    assert found["settings"]["measure"] == sensitivity.Measure.SSIM.value
    values = [value for widths in found["weights"].values() for value in widths.values()]
    assert sorted(values) == sorted(compared) and min(values) < max(values)
    assert len(values) == 12 and read(tmp_path / "run" / "widths.json")["mean_bits"] <= 7.99


@pytest.mark.slow
def test_images_are_those_of_the_sampler_and_the_seed(call, tiny, tmp_path, monkeypatch):
    """Sensitivities by images serve no run with another sampler, also where the calibration set is the same file."""
    rows, measured, sample = [], [], Pipeline.sample

    def watched(pipeline, network, images, *rest, **more):
        rows.append(images)
        return sample(pipeline, network, images, *rest, **more)

    def alike(images, float_images):
        measured.append(list(rows[-1]))
        return float((images == float_images).float().mean())

    monkeypatch.setattr(Pipeline, "sample", watched)
    monkeypatch.setattr(mixed_precision, "mean_ssim", alike)
    layers = [name.removesuffix(".weight") for name, t in load_file(tiny.weights).items() if t.dim() > 1]
    (tmp_path / "widths.yaml").write_text("".join(f"{name}: W8\n" for name in layers[6:]))  # 6 are left
    words = (*tiny.options, *SAMPLER, *PTQ, "--target_bits", 7.99, "--candidate_bits", "2,8", "--sensitivity", "ssim")
    words = (*words, "--sensitivity_samples", 2, "--layer_bits", tmp_path / "widths.yaml", "--cali_seed", 5)
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    assert measured == 12 * [[first_image(5), first_image(5) + 1]]  # those that are recorded

    again = (*words, "--cali_data_path", tmp_path / "run" / "calibration_data.pt")
    again = (*again, "--sensitivities", tmp_path / "run" / "sensitivities.json", "--max_images", 2)
    for changes, told in (
        (("--timesteps", 4), "sampled"),
        (("--eta", 0.5), "sampled"),
        (("--seed", 4), "noise"),
        (("--cali_seed", 6), "first"),
    ):
        outcome = call(SCRIPT, *again, *changes, "-l", tmp_path / "other")
        assert f"other settings ({told})" in outcome.error_line(), changes
    kept = tiny.weights.read_bytes()
    save_file({name: 2 * t for name, t in load_file(tiny.weights).items()}, tiny.weights)
    assert "other settings (weights)" in call(SCRIPT, *again, "-l", tmp_path / "other").error_line()
    tiny.weights.write_bytes(kept)
    measured.clear()
    succeeded(call(SCRIPT, *again, "-l", tmp_path / "again"))
    assert measured == [] and read(tmp_path / "again" / "widths.json") == read(tmp_path / "run" / "widths.json")


@torch.no_grad()
def sampled(words, quant=None, name=None, bits=None):
    """Return images of the calibration stream uint8 [3, H, W, C]; weights of one layer, if any, have a width."""
    script, parser = SCRIPTS[SCRIPT], Parser(None)
    script.add_options(parser)
    args = parser.parse_args([str(word) for word in words])
    args.batch_size = 2
    pipeline = script.pipeline_of(args)
    pipeline.load(torch.device(ON_DEVICE[1]))
    network, quantized = pipeline.network, contextlib.nullcontext()
    if name is not None:
        others = {other: "W32" for other in layer_places(network) if other != name}
        network = QuantModel(network, replace(quant, weight_bits=bits, act_bits=None, layer_bits=others))
        init_weights(network)
        quantized = network.quantized()
    with quantized:
        latents = [pipeline.sample(network, rows, calibration=True) for rows in (range(2), range(2, 3))]
    return to_uint8(pipeline.to_images(torch.cat(latents)))


@pytest.mark.slow
def test_images_are_compared_by_ssim(call, one_level_wide, tmp_path, monkeypatch):
    """What is kept for a width is SSIM by its definition, of the images of a network with one layer of this width."""
    compared = []

    def watched(*images):
        compared.append([each.permute(0, 2, 3, 1).numpy() for each in images])
        return mean_ssim(*images)

    monkeypatch.setattr(mixed_precision, "mean_ssim", watched)
    layers = [n.removesuffix(".weight") for n, tensor in load_file(one_level_wide.weights).items() if tensor.dim() > 1]
    measured = ("conv_in", "mid.block_1.conv2")
    (tmp_path / "widths.yaml").write_text("".join(f"{name}: W8A8\n" for name in layers if name not in measured))
    model, both = (*one_level_wide.options, *SAMPLER), ("--target_bits", 7.99, "--candidate_bits", "2,8")
    both = (*both, "--target_act_bits", 7.99, "--candidate_act_bits", "2,8")
    words = (*model, "--batch_size", 2, *PTQ, *both, "--layer_bits", tmp_path / "widths.yaml")
    succeeded(call(SCRIPT, *words, "--sensitivity", "ssim", "--sensitivity_samples", 3, "-l", tmp_path / "run"))
    found = read(tmp_path / "run" / "sensitivities.json")
    weights, activations = (list(found[name].values()) for name in ("weights", "activations"))
    assert list(found["weights"]) == list(found["activations"]) == list(measured)
    # A range of an activation is observed in a run of its own, before the one that counts.
    pairs = [*compared[:4], *compared[5::2]]
    for kept, (a, b) in zip((v for widths in (*weights, *activations) for v in widths.values()), pairs, strict=True):
        assert kept == pytest.approx(ssim(a, b), abs=SSIM_TOLERANCE)
        assert abs(kept - ssim(a, b, sigma=1.6)) > SSIM_TOLERANCE  # planted: a window that is a little wider

    model = ("--config", one_level_wide.config, "--ckpt", one_level_wide.weights, *SAMPLER[:2], *SAMPLER[4:])
    in_float, quant = sampled(model), QuantConfig.from_dict(found["settings"]["quant"])
    for name in measured:
        for bits in (2, 8):
            value = ssim(sampled(model, quant, name, bits), in_float)
            assert found["weights"][name][str(bits)] == pytest.approx(value, abs=SSIM_TOLERANCE)
            assert abs(found["weights"][name][str(10 - bits)] - value) > SSIM_TOLERANCE  # planted: the other width


def test_without_ptq_it_has_no_effect(call, tiny, tmp_path):
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, "--target_bits", 4, "-l", tmp_path / "run")
    succeeded(outcome)
    assert "--target_bits has no effect" in outcome.err


@pytest.mark.slow
def test_all_layers_are_measured_at_once_if_asked(call, one_level, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_precision, "layer_sensitivity", lambda *_: 1 / 0)
    words = (*one_level.options, *SAMPLER, *PTQ, *MIXED, "--sensitivity", "probe")
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    widths, kept = read(tmp_path / "run" / "widths.json"), read(tmp_path / "run" / "sensitivities.json")
    assert widths["mean_bits"] <= 4.5 and widths["mean_act_bits"] <= 7
    assert {bits[:2] for bits in widths["layer_bits"].values()} == {"W3", "W8"}
    assert kept["settings"]["samples"] == 128 and kept["settings"]["measure"] == "probe"
    assert all(values["3"] < values["8"] for values in kept["weights"].values() if values["8"] < 100)
    other = (*words, "--sensitivity", "sqnr", "--sensitivities", tmp_path / "run" / "sensitivities.json")
    assert "other settings (measure, samples)" in call(SCRIPT, *other, "-l", tmp_path / "other").error_line()
