"""The counting command: every family from its config alone, tables and JSON, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from thorough import thorough_except

SCRIPT = "count_cost"
REPOSITORY = Path(__file__).parents[2]
CIFAR10 = ("--config", REPOSITORY / "configs" / "cifar10.yml")
LDM, DIT = REPOSITORY / "models" / "ldm", REPOSITORY / "models" / "dit_digits"
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--split")
# options, input, context, parameters of the UNet
FAMILIES = {
    "bedroom": (
        ("--like", "sample_diffusion_ldm", "-r", LDM / "lsun_beds256", "--seed", 1),
        ([3, 64, 64], None, 274_056_163),
    ),
    "church": (
        ("--like", "sample_diffusion_ldm", "-r", LDM / "lsun_churches256", "--seed", 1),
        ([4, 32, 32], None, 294_966_916),
    ),
    "imagenet": (
        ("--like", "sample_diffusion_ldm_imagenet", "--config", LDM / "cin256" / "config.yaml"),
        ([3, 64, 64], [1, 512], 400_920_579),
    ),
    "sd": (
        ("--like", "txt2img", "--config", LDM / "stable-diffusion-v1" / "config.yaml"),
        ([4, 64, 64], [77, 768], 859_520_964),
    ),
    "sd 256": (
        ("--like", "txt2img", "--config", LDM / "stable-diffusion-v1" / "config.yaml", "--H", 256),
        ([4, 32, 64], [77, 768], 859_520_964),
    ),
}


def counted(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    yield
    assert list(tmp_path.iterdir()) == []  # nothing downloaded, nothing written


@pytest.mark.slow
@pytest.mark.parametrize("family", thorough_except(FAMILIES, "bedroom", "sd"))
def test_full_size_models_without_weights(family, call):
    options, (image, context, parameters) = FAMILIES[family]
    outcome = call(SCRIPT, *options, "--json", "--layers", 1)
    result = counted(outcome)
    assert (result["float"]["image_shape"], result["float"]["context_shape"]) == (image, context)
    assert result["float"]["parameters"] == parameters and result["float"]["size_bytes"] == 4 * parameters
    assert result["float"]["batch"] == 1
    assert "quantized" not in result and result["quant"] is None


@pytest.mark.slow
def test_cifar10_as_json(call):
    result = counted(call(SCRIPT, *CIFAR10, *W4A8, "--json", "--layers", 3, "--by", "bops"))
    assert result["float"]["bops"] == 1024 * result["float"]["macs"]
    assert result["quantized"]["macs"] == result["float"]["macs"]
    assert result["quantized"]["size_bytes"] < result["float"]["size_bytes"] / 7
    assert result["quant"]["weight_bits"] == 4 and result["quant"]["act_bits"] == 8
    bops = [layer["bops"] for layer in result["heaviest"]]
    assert len(bops) == 3 and bops == sorted(bops, reverse=True)
    by_size = counted(call(SCRIPT, *CIFAR10, *W4A8, "--json", "--layers", 3))["heaviest"]
    assert [layer["name"] for layer in by_size] != [layer["name"] for layer in result["heaviest"]]


@pytest.mark.slow
def test_table(call):
    outcome = call(SCRIPT, *CIFAR10, *W4A8, "--layers", 2, "--batch_size", 7, "--cali_st", 20)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "one call for one sample" in lines[0] and "guidance" not in outcome.out
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["float"] == ["35,746,307", "142.99", "6.222", "6371.2"]
    assert rows["quantized"][0] == "35,746,307" and float(rows["quantized"][1]) == pytest.approx(17.9, rel=0.02)
    assert len(lines) == 8  # title, totals and their heading, an empty line, layers and their heading
    assert lines[-1].split()[1:3] == ["Conv2d", "4/8"]


@pytest.mark.slow
def test_a_diffusers_pipeline(call):
    pytest.importorskip("diffusers")
    result = counted(call(SCRIPT, "--like", "sample_pipeline", DIT, *W4A8[:-1], "--json"))
    assert result["float"]["parameters"] == 1_209_124 and result["float"]["image_shape"] == [4, 8, 8]
    assert result["quantized"]["bops"] < result["float"]["bops"] / 25


def test_guided_models_say_that_a_step_costs_twice(call):
    outcome = call(SCRIPT, "--like", "txt2img", "--layers", 0)
    assert outcome.code == 0, outcome.err
    assert "a pair of samples" in outcome.out and "context [" in outcome.out
    assert "the bundled model" in outcome.err
    assert "heaviest" not in outcome.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--layers", -1), "--layers"),
        (("--by", "name"), "--by"),
        (("--quant_act",), "--ptq"),
        (("--ptq", "--weight_bit", 9), "--weight_bit"),
        (("--config", "none.yml"), "none.yml"),
        (("--like", "train_ddim"), "--like"),
        (("--device", "cpu"), "--device"),
    ],
    ids=lambda value: " ".join(str(v) for v in value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence(options, says, call):
    assert says in call(SCRIPT, *CIFAR10, *options).error_line()
