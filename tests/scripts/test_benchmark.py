"""scripts/benchmark.py: what it measures of tiny networks, and what it notes."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch
from benchmark_processes import SMALL, HereProcess
from ddim_runs import W4A8
from exact_runtimes import require_runtimes
from run_checks import succeeded
from thorough import thorough_except

from ddim.config import load_config
from ddim.models.diffusion import Model
from qdiff.benchmark import run
from qdiff.benchmark.files import FLOAT_ONNX, ONNX, Job, write_checkpoints, write_onnx
from qdiff.benchmark.variants import VARIANTS, open_variant
from qdiff.quant_layer import QuantModule

require_runtimes()

SCRIPT, STEPS, BATCH = "benchmark", 4, 3
SHORT = ("--batch", BATCH, "--repeats", 2, "--threads", 1)
# Compiled code of the tiny network takes longer than all of these tests.
RUNNABLE = [name for name in VARIANTS if name != "float-compile"]
# Relative L2: float sums in another order, which moves a value over a rounding edge here and there; from each other
# and from float, networks of so few bits are an order of magnitude further away.
W4A8_RANDOM = ("--random", "--weight_bit", 4)
FLOAT_TOLERANCE, ROUNDING_TOLERANCE = 1e-5, 2e-2


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Run the tasks of the benchmark's processes in this one."""
    HereProcess.forget()
    monkeypatch.setattr(run, "FreshProcess", HereProcess)
    return HereProcess


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.yml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(job, name)``: what `write_onnx` writes of `SMALL` with random weights, made once for each config."""
    folder = tmp_path_factory.mktemp("exported")

    def write(job, name):
        kept = folder / (name if name == FLOAT_ONNX else str(hash(job.plan.quant)))
        if not kept.is_dir():
            write_onnx(job, name)
            kept.mkdir()
            for file in job.folder.glob(f"{name.removesuffix('.onnx')}*.onnx"):
                shutil.copy(file, kept)
        for file in kept.iterdir():
            shutil.copy(file, job.folder)

    return write


@pytest.fixture
def measured(call, small, tmp_path, monkeypatch, exported):
    """``measured(*options, config=SMALL)``: rows by variant, everything else that was written, and the outcome."""

    monkeypatch.setattr(run, "write_onnx", exported)

    def made(*options, model=("--config", small, "--timesteps", STEPS)):
        words = (*model, *SHORT, *options)
        outcome = succeeded(call(SCRIPT, *words, "--out", tmp_path / "out.json"))
        found = json.loads((tmp_path / "out.json").read_text())
        return {row["variant"]: row for row in found.pop("rows")}, found, outcome

    made.config = small
    return made


@pytest.fixture(scope="session")
def checkpoint(linear_run):
    return linear_run / "quantized.safetensors"


@pytest.fixture
def calibrated(tiny):
    """The tiny model and options that its `checkpoint` was made with, for `measured`."""
    options = ("--config", tiny.config, "--timesteps", STEPS, "--ckpt", tiny.weights)
    return {"model": (*options, *W4A8, "--quant_mode", "linear")}


def names(*variants: str) -> tuple[str, str]:
    return "--runtimes", ",".join(variants)


@pytest.mark.slow
def test_sampling_with_random_weights(measured, here):
    rows, about, outcome = measured(*W4A8_RANDOM, "--measure", "sampling", *names(*RUNNABLE))
    assert list(rows) == RUNNABLE and not any(row["note"] for row in rows.values())
    for row in rows.values():
        assert row["calls"] == STEPS and row["ratio"]["middle"] > 0
        assert row["images_per_s"] == pytest.approx(BATCH / row["seconds"]["middle"])
        assert (row["kept"], row["peak"], row["imports"]) == (2_000_000, 5_000_000, 1_000_000)
    assert rows["float"]["ratio"] == {"low": 1, "middle": 1, "high": 1}
    assert {name for name, row in rows.items() if row["own_ratio"]} == {"onnxruntime", "openvino"}
    sizes = {name: row["file_bytes"] for name, row in rows.items()}
    network = Model(load_config(measured.config))
    floats = 4 * sum(p.numel() for p in network.parameters())
    assert floats < sizes["float"] == sizes["float-channels-last"] < floats + 20_000  # the header
    assert sizes["simulated"] == sizes["torch"] == sizes["torch-int8"] < 0.2 * floats
    assert sizes["openvino-float"] == sizes["onnxruntime-float"] > sizes["openvino"] == sizes["onnxruntime"]
    # Twice in turn, all of them open at the same time.
    assert here.tasks[-2 * len(RUNNABLE) :] == ["take_turn"] * 2 * len(RUNNABLE)
    assert here.most_open == len(RUNNABLE) and here.open == 0
    assert (about["quant"], about["calls"], about["model"]) == ("W4A8", STEPS, "small, random weights")
    assert outcome.out.splitlines()[-1].endswith(f"{' '.join(names(*RUNNABLE))}`")
    assert "--random --weight_bit 4" in about["command"] and "out.json" not in about["command"]


@pytest.mark.slow
def test_memory_and_files_alone_need_one_process_at_a_time(measured, here):
    rows, _, outcome = measured("--random", "--repeats", 0, *names("float", "simulated", "torch"))
    assert here.most_open == 1 and "take_turn" not in here.tasks
    assert all(row["kept"] and row["file_bytes"] and row["seconds"] is None for row in rows.values())
    assert outcome.out.startswith("| variant | memory kept ↓ | memory peak ↓ | file ↓ |\n")


@pytest.mark.slow
@pytest.mark.parametrize("variants", thorough_except([("torch",), ("float", "torch")], ("torch",)), ids=" ".join)
def test_a_calibrated_checkpoint_by_real_processes(variants, measured, monkeypatch, calibrated, checkpoint, tmp_path):
    from qdiff.benchmark.fresh_process import FreshProcess

    monkeypatch.setattr(run, "FreshProcess", FreshProcess)
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- table t -->\nold\n<!-- end of table t -->\nafter\n")
    words = ("--cali_ckpt", checkpoint, *names(*variants), "--document", document, "--table", "t")
    rows, _, outcome = measured(*words, **calibrated)
    assert rows["torch"]["file_bytes"] == checkpoint.stat().st_size and tuple(rows) == variants
    for row in rows.values():
        assert 0 < row["kept"] <= row["peak"] < 200e6 < row["imports"] and row["calls"] == 1
        assert row["images_per_s"] is None and row["seconds"]["middle"] > 0 and not row["note"]
    first = document.read_text()
    assert first == f"before\n<!-- table t -->\n{outcome.out.strip()}\n<!-- end of table t -->\nafter\n"


@pytest.mark.slow
def test_repeated_the_document_has_one_table(measured, tmp_path):
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- table t -->\n<!-- end of table t -->\nafter\n")
    words = ("--random", *names("simulated"), "--repeats", 0, "--document", document, "--table", "t")
    texts = []
    for _ in range(2):
        measured(*words)
        texts.append(re.sub(r"\d+", "#", document.read_text()))  # the load differs, and memory may
    assert texts[0] == texts[1] and texts[0].count("| variant |") == 1 and "doc.md" not in texts[0]
    assert texts[0].startswith("before\n") and texts[0].endswith("\nafter\n")


@pytest.mark.slow
def test_a_published_checkpoint_is_written_anew(measured, tiny, checkpoint, calibrated, tmp_path):
    from qdiff import QuantModel, load_checkpoint, save_checkpoint
    from qdiff.checkpoint.metadata import read_config
    from qdiff.io.tensor_files import read_float_tensors

    network = Model(load_config(tiny.config))
    network.load_state_dict(read_float_tensors(tiny.weights))
    qnn = QuantModel(network, read_config(checkpoint))
    load_checkpoint(qnn, checkpoint)
    save_checkpoint(qnn, tmp_path / "published.pth", format="published")
    words = ("--cali_ckpt", tmp_path / "published.pth", "--repeats", 0, *names("torch"))
    rows, *_ = measured(*words, **calibrated)
    # What a run says of itself stands in its own file alone.
    assert abs(rows["torch"]["file_bytes"] - checkpoint.stat().st_size) < 2000
    assert (tmp_path / "published.pth").stat().st_size > 3 * rows["torch"]["file_bytes"]


# --- What the variants compute


def job_of(call, monkeypatch, folder, *options) -> Job:
    """Return what a command would measure, its checkpoints written."""
    jobs = []
    monkeypatch.setattr(run, "measure", lambda job, variants: jobs.append(job) or [])
    succeeded(call(SCRIPT, *options))
    job = Job(jobs[0].script, jobs[0].args, jobs[0].plan, folder)
    write_checkpoints(job)
    return job


def relative(out, expected) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.slow
@torch.no_grad()
def test_every_variant_computes_the_network_that_it_names(call, small, exported, monkeypatch, tmp_path):
    job = job_of(call, monkeypatch, tmp_path, "--config", small, *SHORT, *W4A8_RANDOM)
    for name in (FLOAT_ONNX, ONNX):
        exported(job, name)
    out = {name: VARIANTS[name].open(job)(*job.inputs) for name in RUNNABLE}
    assert torch.equal(out["torch"], out["simulated"])
    for name in RUNNABLE:
        like = "float" if "float" in name else "simulated"
        assert relative(out[name], out[like]) < (FLOAT_TOLERANCE if like == "float" else ROUNDING_TOLERANCE), name
    assert relative(out["simulated"], out["float"]) > 3 * ROUNDING_TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_conditions_are_encoded_before(call, latent, monkeypatch, tmp_path):
    """Sampling in a variant's process gives the latents that the family gives, without its encoder."""
    files = latent("class")
    sampler = ("--like", "sample_diffusion_ldm_imagenet", "--ddim_steps", STEPS, "--scale", 2.0)
    options = (*sampler, "--config", files.config, "--ckpt", files.weights, *SHORT)
    monkeypatch.setattr("qdiff.benchmark.files.load_checkpoint", lambda qnn, path, probe=None: initialised(qnn))
    job = job_of(call, monkeypatch, tmp_path, *options, "--measure", "sampling", "--ptq", "--cali_ckpt", files.weights)
    there = job.pipeline()
    there.load(torch.device("cpu"))
    wanted = there.sample(there.network, range(BATCH))
    model = job.pipeline()
    assert not hasattr(model, "model")
    model.encoded = job.conditions
    found = model.sample(VARIANTS["float"].open(job), range(BATCH))
    assert torch.equal(found, wanted)
    model.encoded = tuple(c.flip(0) for c in job.conditions)
    assert not torch.equal(model.sample(VARIANTS["float"].open(job), range(BATCH)), wanted)
    assert open_variant(job, "float").turn()[1] == STEPS


def initialised(qnn) -> None:
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)


@pytest.mark.slow
def test_latent_models_without_conditions_sample_with_random_weights(measured, latent):
    like = ("--like", "sample_diffusion_ldm", "-r", latent("unconditional").folder, "--seed", 1, "-c", STEPS)
    rows, about, _ = measured("--random", "--measure", "sampling", *names("float", "torch"), model=like)
    assert [row["calls"] for row in rows.values()] == [STEPS] * 2 and about["calls"] == STEPS


@pytest.mark.slow
def test_one_call_needs_no_encoder(measured, latent):
    model = ("--like", "txt2img", "--config", latent("text").config, "--ddim_steps", STEPS)
    rows, *_ = measured("--random", *names("float", "torch"), model=model)
    assert all(row["seconds"] and row["calls"] == 1 for row in rows.values())


# --- Modulation


MODULATED = ("--random", "--modulate", "--weight_bit", 4, "--act_bit", 4, "--measure", "sampling")


@pytest.mark.thorough  # test_onnx_modulated: of three layers
def test_modulated_networks_sample(measured):
    rows, about, _ = measured(*MODULATED, *names("simulated", "torch", "torch-int8", "onnxruntime", "openvino"))
    assert about["quant"] == "W4A4 modulated" and [row["calls"] for row in rows.values()] == [STEPS] * 5
    plain, *_ = measured(*W4A8_RANDOM, *names("openvino"))
    # The first step's model lies in a file of its own, with weights of its own.
    assert rows["onnxruntime"]["file_bytes"] == rows["openvino"]["file_bytes"] > 1.7 * plain["openvino"]["file_bytes"]


@pytest.mark.slow
def test_what_has_no_onnx_form_is_noted_and_the_others_are_measured(measured):
    variants = names("float", "torch", "onnxruntime", "openvino-float")
    rows, *_ = measured(*MODULATED, "--quant_mode", "dynamic", "--act_scale_per", "channel", *variants)
    assert "integer products cannot use one range per channel" in rows["onnxruntime"]["note"]
    assert rows["onnxruntime"]["seconds"] is rows["onnxruntime"]["file_bytes"] is None
    assert all(rows[name]["seconds"] and not rows[name]["note"] for name in ("float", "torch", "openvino-float"))


# --- What cannot run is noted


def test_a_missing_package(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    rows, _, outcome = measured("--random", *names("float", "openvino"))
    assert "onnxscript is not installed; pip install '.[deploy]'" in rows["openvino"]["note"]
    assert rows["float"]["seconds"] and "| openvino | not measured: onnxscript is not" in outcome.out


def test_a_variant_that_computes_something_else(measured, monkeypatch):
    from qdiff.benchmark import variants

    def planted(factor):
        def opened(job):
            network = job.float_network()
            return lambda *inputs: factor * network(*inputs)

        return opened

    monkeypatch.setitem(VARIANTS, "simulated", variants.Variant(variants.NATIVE, planted(2.0)))
    monkeypatch.setitem(VARIANTS, "float", variants.Variant(variants.FLOAT, planted(float("nan"))))
    rows, *_ = measured("--random", *names("float", "simulated", "torch"))
    assert "its results are wrong (relative error nan against float)" in rows["float"]["note"]
    assert "against the simulation)" in rows["simulated"]["note"] and rows["simulated"]["file_bytes"] is None
    assert rows["torch"]["seconds"] and rows["torch"]["ratio"] is None


def test_a_variant_that_breaks(measured, monkeypatch):
    def broken(self):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(QuantModule, "release_float_weight", broken)
    rows, *_ = measured("--random", *names("simulated", "float"))
    assert rows["simulated"]["note"] == "RuntimeError: no kernel" and rows["simulated"]["kept"] is None
    assert rows["float"]["seconds"] and rows["float"]["note"] == ""
