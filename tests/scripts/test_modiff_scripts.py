"""MoDiff from end to end on tiny models of three scripts: that changes are what is quantized, files, and bad input."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from modulated_runs import (
    BATCH,
    DYNAMIC,
    FOLDER,
    IMAGES,
    MODULATED,
    RECORDED,
    SCRIPTS,
    STEPS,
    assert_every_quantizer_sees_the_differences,
    psnr,
    watching,
)
from run_checks import image_bytes, lose_images, manifest, pixels, snapshot, succeeded
from script_device import ON_DEVICE
from thorough import thorough_except

from qdiff.calibration.samples import load_recording
from qdiff.io.tensor_files import read_safetensors

# dB, between runs that differ in the batch an image is in: sums round differently, and a value on a rounding edge of
# 4 bits then moves. 73 dB and more was seen; with one range per batch, where neighbours matter by design, 48.
SAME_IMAGES = 30.0
CALLS = {"ddim": STEPS, "ldm": STEPS, "text": STEPS + 1}  # PLMS begins with two calls
KINDS = pytest.mark.parametrize("kind", SCRIPTS)
MOSTLY_DDIM = pytest.mark.parametrize("kind", thorough_except(SCRIPTS, "ddim"))


@pytest.fixture(scope="module")
def options(tiny, latent):
    """``options(kind)``: model and sampler, five images in batches of three."""
    text = ("--ddim_steps", STEPS, "--seed", 7, "--plms", "--prompt", "two", "--n_samples", IMAGES, "--n_iter", 1)
    made = {
        "ddim": (*tiny.options, "--timesteps", STEPS, "--seed", 7, "--max_images", IMAGES),
        "ldm": (
            *("-r", latent("unconditional").weights, *ON_DEVICE),
            *("-c", STEPS, "-e", 0.5, "--seed", 7, "-n", IMAGES),
        ),
        "text": (*latent("text").options, *text),
    }
    return lambda kind: (*made[kind], "--batch_size", BATCH)


@pytest.fixture(scope="module")
def run(call, options, tmp_path_factory):
    """``run(kind, *more)``: the folder of a run, sampled once for all tests, and what was seen while it sampled."""
    folder, known = tmp_path_factory.mktemp("modiff"), {}

    def made(kind, *more):
        if (kind, more) not in known:
            place = folder / f"{kind}{len(list(folder.iterdir()))}"
            with watching() as watched:
                succeeded(call(SCRIPTS[kind], *options(kind), *more, FOLDER, place))
            known[kind, more] = place, watched
        return known[kind, more]

    return made


# --- The proof: changes are what is quantized, on every step after the first


@pytest.mark.slow
@KINDS
def test_quantizers_fire_on_every_later_step_and_see_the_difference(kind, run):
    """In every batch; a state that is cleared before every step, as published, fails the same check."""
    folder, watched = run(kind, *MODULATED, "--act_tensor")
    assert [len(batch[0].output) for batch in watched.batches] == [n * (1 + (kind == "text")) for n in (3, 2)]
    assert_every_quantizer_sees_the_differences(watched, CALLS[kind])
    assert manifest(folder)["activation_quantizers"]["silent"] == []


@pytest.fixture(scope="module")
def weights(run):
    """``weights(kind)``: a file with rounded weights, of a run without modulation."""
    return lambda kind: run(kind, *DYNAMIC, *RECORDED)[0] / "quantized.safetensors"


@pytest.mark.slow
@MOSTLY_DDIM
def test_a_cleared_state_fails_that_check(kind, run, weights):
    loaded = (*DYNAMIC, "--modulate", "--cali_ckpt", weights(kind))
    folder, watched = run(kind, *loaded, "--modulate_ablation", "cleared-state")
    assert len(watched.batches) == 2 and not any(c.seen for batch in watched.batches for c in batch)
    with pytest.raises(AssertionError, match=r"call 1: 0 of \d+ quantizers fire"):
        assert_every_quantizer_sees_the_differences(watched, CALLS[kind])
    counted = manifest(folder)["activation_quantizers"]
    assert len(counted["silent"]) == counted["total"] > 20


@pytest.mark.slow
def test_without_compensation_the_difference_is_to_the_last_input(run):
    _, watched = run("ddim", *MODULATED, "--modulate_ablation", "no-compensation")
    with pytest.raises(AssertionError, match="call 2"):  # the first change is the same
        assert_every_quantizer_sees_the_differences(watched, STEPS)
    for batch in watched.batches:
        for before, now in itertools.pairwise(batch):
            (a,), (b,) = before.inputs["conv_in"], now.inputs["conv_in"]
            assert torch.equal(now.seen["conv_in.act_quantizers.0"][0], b - a)


@pytest.mark.slow
@KINDS
def test_without_modulation_the_input_itself_is_quantized(kind, run):
    _, watched = run(kind, *DYNAMIC, *RECORDED)
    assert watched.modulated == {} and len(watched.batches) == 2
    assert all(call.seen for batch in watched.batches for call in batch)
    last = watched.batches[-1][-1]
    name = next(n.removesuffix(".act_quantizers.0") for n in last.seen if "conv_in" in n or "input_blocks.0.0" in n)
    assert torch.equal(last.seen[f"{name}.act_quantizers.0"][0], last.inputs[name][0])


# --- Images


OTHER_SAMPLERS = {
    "ddim dpm": ("ddim", ("--sample_type", "dpm_solver"), STEPS),
    "ldm dpm": ("ldm", ("--dpm", "-e", 1.0), STEPS),
    "text dpm": ("text", ("--dpm",), STEPS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_except(OTHER_SAMPLERS, "ddim dpm"))
def test_other_samplers(name, call, options, tmp_path):
    kind, more, calls = OTHER_SAMPLERS[name]
    words = [w for w in options(kind) if not (name == "text dpm" and w == "--plms")]
    with watching() as watched:
        succeeded(call(SCRIPTS[kind], *words, *more, *MODULATED, FOLDER, tmp_path / "run"))
    assert_every_quantizer_sees_the_differences(watched, calls)
    assert_images(tmp_path / "run", watched)
    assert "dpm_solver" in manifest(tmp_path / "run")["config"]["sampler"].values()


def assert_images(folder, watched):
    made = pixels(folder)
    assert len(made) == IMAGES and len(set(image_bytes(folder).values())) == IMAGES
    assert np.mean((made > 0) & (made < 255)) > 0.2  # not saturated
    assert all(torch.isfinite(call.output).all() for batch in watched.batches for call in batch)


@pytest.mark.slow
@MOSTLY_DDIM
def test_images_of_batches_of_different_size(kind, run):
    assert_images(*run(kind, *MODULATED, "--act_tensor"))
    if kind == "ddim":
        assert_images(*run(kind, *MODULATED))


@pytest.mark.slow
@MOSTLY_DDIM
def test_batch_size_does_not_change_images_with_one_range_a_sample(kind, run):
    sample = (*MODULATED, "--act_tensor")
    one, other = (run(kind, *sample, *more)[0] for more in ((), ("--batch_size", IMAGES)))
    assert psnr(one, other) > SAME_IMAGES


@pytest.mark.slow
def test_with_one_range_a_batch_it_does(run):
    """The check above sees what a neighbour does."""
    one, other = (run("ddim", *MODULATED, *more)[0] for more in ((), ("--batch_size", IMAGES)))
    sample = (*MODULATED, "--act_tensor")
    apart = (run("ddim", *sample, *more)[0] for more in ((), ("--batch_size", IMAGES)))
    assert psnr(one, other) < psnr(*apart)


@pytest.mark.slow
@MOSTLY_DDIM
def test_killed_run_makes_the_missing_images_again(kind, call, options, run, tmp_path):
    source, _ = run(kind, *MODULATED, "--act_tensor")
    command = (SCRIPTS[kind], *options(kind), *MODULATED, "--act_tensor", FOLDER)
    for name, lost in {"batch": (3, 4), **({"others": (1, 2, 4)} if kind == "text" else {})}.items():
        folder = tmp_path / name
        shutil.copytree(source, folder)
        lose_images(folder, *lost)
        outcome = succeeded(call(*command, folder))
        assert "calibrating" not in outcome.err and manifest(folder)["status"] == "finished"
        if name == "batch":
            assert image_bytes(folder) == image_bytes(source)
        assert psnr(folder, source) > SAME_IMAGES
    before = snapshot(folder)
    succeeded(call(*command, folder))
    assert snapshot(folder) == before


@pytest.mark.slow
@KINDS
def test_manifest(kind, run):
    found = manifest(run(kind, *MODULATED, "--act_tensor")[0])
    plan, error = found["config"]["ptq"], found["noise_error"]
    assert found["status"] == "finished" and found["config"]["method"] == "linear+modiff" and plan["method"] == "linear"
    quant = {"modulate": True, "act_dynamic": True, "act_scale_per": "sample", "act_bits": 4}
    assert quant.items() <= plan["quant"].items() and "changes" not in plan
    assert len(error["by_call"]) == CALLS[kind] and error["mse"] == pytest.approx(np.mean(error["by_call"]))
    assert 0 < error["mse"] < error["float_mean_square"]
    assert error["samples"] == 2 * CALLS[kind] * (1 + (kind == "text"))  # the doubled batch
    plain = manifest(run(kind, *DYNAMIC, *RECORDED)[0])
    assert "modulate" not in plain["config"]["ptq"]["quant"] and "by_call" not in plain["noise_error"]
    assert error["mse"] < plain["noise_error"]["mse"]  # what modulation is for


# --- --generate, and calibrating from it


@pytest.fixture(scope="module")
def recorded(call, options, tmp_path_factory):
    """``recorded(kind, what)``: a file that --generate wrote."""
    folder, known = tmp_path_factory.mktemp("recorded"), {}

    def made(kind, what):
        if (kind, what) not in known:
            known[kind, what] = folder / f"{kind}-{what}.pt"
            asked = ("--generate", what, "--cali_st", 2, "--cali_n", 3, "--cali_data_path", known[kind, what])
            succeeded(call(SCRIPTS[kind], *options(kind), *asked, FOLDER, folder / "run"))
        assert not (folder / "run").exists()
        return known[kind, what]

    return made


@MOSTLY_DDIM
def test_generate_writes_what_is_asked_for(kind, call, options, recorded, tmp_path):
    raw, residual = (load_recording(recorded(kind, what)) for what in ("raw", "residual"))
    shape = {"ddim": (1, 8, 8), "ldm": (3, 8, 8), "text": (4, 8, 8)}[kind]
    conditions = {"cs", "ucs"} if kind == "text" else set()
    assert set(raw) == {"xs", "ts"} | conditions and set(residual) == set(raw) | {"xs_prev", "ts_prev"}
    assert raw["xs"].shape == residual["xs"].shape == residual["xs_prev"].shape == (2, 3, *shape)
    assert raw["ts"].shape == residual["ts_prev"].shape == (2, 3)
    assert all(residual[key].shape == raw[key].shape for key in conditions)
    # PLMS goes to its second timestep, back to none before, and on: two calls may have one timestep.
    assert bool((residual["ts_prev"] >= residual["ts"]).all()) and bool((residual["ts_prev"] > residual["ts"]).any())
    moved = (residual["xs_prev"] - residual["xs"]).square().mean()
    assert 0 < moved < residual["xs"].square().mean()
    model = options(kind)
    if kind == "ddim":
        model = model[: model.index("--max_images")]
    elif kind == "ldm":
        model = model[: model.index("-n")]
    like = ("--like", SCRIPTS[kind], *model, "--batch_size", BATCH, "--cali_st", 2, "--cali_n", 3)
    succeeded(call("collect_calibration", *like, "--generate", "residual", "--out", tmp_path / "same.pt"))
    same = load_recording(tmp_path / "same.pt")
    assert set(same) == set(residual) and all(torch.equal(same[key], residual[key]) for key in same)


STATIC = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 4, "--modulate")
FEW = ("--cali_st", 2, "--cali_n", 3, "--cali_iters_a", 2, "--cali_batch_size", 4)


@pytest.mark.slow
@MOSTLY_DDIM
def test_changes_are_calibrated_from_it(kind, call, options, run, weights, recorded, tmp_path):
    resumed = (*STATIC, *FEW, "--resume_w", "--cali_ckpt", weights(kind))
    folder, watched = run(kind, *resumed, "--cali_data_path", recorded(kind, "residual"))
    assert_every_quantizer_sees_the_differences(watched, CALLS[kind])
    assert_images(folder, watched)
    found = manifest(folder)
    assert found["config"]["method"] == "modiff" and found["config"]["ptq"]["action"] == "activations"
    assert found["config"]["ptq"]["changes"]["iterations"] == 2 and found["reconstruction_errors"]
    assert len(found["noise_error"]["by_call"]) == CALLS[kind]
    there, here = read_safetensors(weights(kind)), read_safetensors(folder / "quantized.safetensors")
    assert all(torch.equal(there[key], here[key]) for key in there) and set(here) - set(there) == {
        "act_delta", "act_zero_point"
    }  # fmt: skip
    if kind != "ddim":
        return
    # The finished file gives the same images; and a run without a file records the same pairs.
    loaded = (*STATIC, "--cali_ckpt", folder / "quantized.safetensors")
    with watching():
        succeeded(call(SCRIPTS[kind], *options(kind), *loaded, FOLDER, tmp_path / "loaded"))
    assert image_bytes(tmp_path / "loaded") == image_bytes(folder)
    own, _ = run(kind, *resumed)
    assert image_bytes(own) == image_bytes(folder)
    pairs, given = load_recording(own / "calibration_data.pt"), load_recording(recorded(kind, "residual"))
    assert set(pairs) == set(given) and all(torch.equal(pairs[key], given[key]) for key in pairs)


# --- Bad input: exit code 2, one sentence, nothing left behind

REFUSED = {
    "modulate in float": (("--ptq", "--modulate"), ("--quant_act", "--modulate")),
    "modulate without ptq": (("--modulate",), ("--modulate", "--ptq")),
    "dynamic in float": (("--ptq", "--quant_mode", "dynamic"), ("--quant_act", "--quant_mode dynamic")),
    "two scales": ((*MODULATED, "--act_tensor", "--act_scale_per", "channel"), ("--act_tensor", "--act_scale_per")),
    "scale of static": ((*STATIC, "--act_tensor"), ("--act_tensor", "--quant_mode dynamic")),
    "penalty of extremes": ((*STATIC, "--cali_min_max", "--out_penalty", 1), ("--out_penalty", "--cali_min_max")),
    "all steps have none before": ((*STATIC, "--cali_st", 5), ("--cali_st 5", "or less")),
    "weights named twice": (("--model_dir", "{new}"), ("--ckpt", "--model_dir")),
    "generate nowhere": (("--generate", "raw"), ("--generate raw", "--cali_data_path")),
    "generate what": (("--generate", "all"), ("--generate",)),
    "generate quantized": (("--generate", "raw", "--ptq", "--cali_data_path", "{new}"), ("--generate", "--ptq")),
    "generate none": (("--generate", "raw", "--cali_n", 0, "--cali_data_path", "{new}"), ("--cali_n is 0",)),
    "generate too many": (
        ("--generate", "residual", "--cali_st", 5, "--cali_data_path", "{new}"),
        ("--cali_st 5", "or less"),
    ),
    "generate into nothing": (("--generate", "raw", "--cali_data_path", "/proc/a.pt"), ("/proc/a.pt", "written")),
    "raw data": ((*STATIC, *FEW, "--cali_data_path", "{raw}"), ("{raw}", "--generate residual")),
    "data is missing": ((*STATIC, *FEW, "--cali_data_path", "{new}"), ("{new}", "does not exist")),
    "weights alone": ((*STATIC, "--cali_ckpt", "{dynamic}"), ("{dynamic}", "--quant_mode dynamic")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence(name, call, options, run, recorded, tmp_path):
    words, says = REFUSED[name]
    dynamic = run("ddim", *MODULATED, "--act_tensor")[0] / "quantized.safetensors"
    places = {"new": tmp_path / "new" / "a.pt", "raw": recorded("ddim", "raw"), "dynamic": dynamic}
    filled = [str(w).format(**places) for w in words]
    line = call(SCRIPTS["ddim"], *options("ddim"), *filled, FOLDER, tmp_path / "run").error_line()
    assert all(word.format(**places) in line for word in says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ldm", "text"])
def test_bad_input_to_the_others(kind, call, options, tmp_path):
    for words, says in (REFUSED[name] for name in ("two scales", "generate quantized", "generate nowhere")):
        filled = [str(w).format(new=tmp_path / "new") for w in words]
        line = call(SCRIPTS[kind], *options(kind), *filled, FOLDER, tmp_path / "run").error_line()
        assert all(word in line for word in says)
    assert list(tmp_path.iterdir()) == []
