"""scripts/sample_pipeline.py and scripts/quantize_pipeline.py on a small pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qdiff.errors import UserError

pytest.importorskip("diffusers")

import export
import quantize_pipeline
import sample_pipeline
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

WIDTHS = ["--weight_bit", "4", "--quant_act", "--act_bit", "8", "--split"]
CALIBRATION = ["--steps", "4", *WIDTHS, "--cali_st", "2", "--cali_n", "2"]
LEARNING = ["--cali_iters", "1", "--cali_iters_a", "1", "--cali_batch_size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **blocks,
    )
    path = tmp_path_factory.mktemp("pipeline") / "small"
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(path)
    return path


def images_of(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run / "img").glob("*.png"))]


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory) -> tuple[Path, Path]:
    """A quantized pipeline, and the run folder of its calibration."""
    out, run = tmp_path_factory.mktemp("out") / "quantized", tmp_path_factory.mktemp("out") / "run"
    quantize_pipeline.main([str(folder), "--out", str(out), *CALIBRATION, *LEARNING, "-l", str(run), "--device", "cpu"])
    return out, run


@pytest.mark.slow
def test_a_quantized_folder_gives_the_images_of_the_run(folder, quantized, tmp_path):
    out, run = quantized
    sampling = ["-n", "3", "--batch_size", "2", "--device", "cpu", "--steps", "4"]
    sample_pipeline.main([str(folder), *sampling, "-l", str(tmp_path / "float")])
    sample_pipeline.main([str(out), *sampling, "-l", str(tmp_path / "small")])
    checkpoint = ["--ptq", *CALIBRATION, "--cali_ckpt", str(run / "quantized.safetensors"), "--resume"]
    sample_pipeline.main([str(folder), *sampling, *checkpoint, "-l", str(tmp_path / "ptq")])
    assert images_of(tmp_path / "small") == images_of(tmp_path / "ptq") != images_of(tmp_path / "float")
    manifest = json.loads((tmp_path / "ptq" / "run.json").read_text())
    assert manifest["activation_quantizers"]["silent"] == [] and manifest["network_calls"] == 4


def test_other_programs_get_the_names_of_the_component(folder, quantized, tmp_path, capsys):
    checkpoint = ["--ptq", *WIDTHS, "--cali_ckpt", str(quantized[1] / "quantized.safetensors")]
    with pytest.raises(SystemExit) as stopped:
        out = ["--format", "comfyui", "--out", str(tmp_path / "weights.safetensors")]
        export.main(["--like", "sample_pipeline", str(folder), *checkpoint, *out])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "conv_in (a convolution); time_embedding.linear_1 (8 input channels" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough  # test_modiff_scripts
def test_modulation_is_closer_to_float_at_low_widths(folder, tmp_path):
    """Each batch of a pipeline's loop is one trajectory, so layers quantize the changes between its steps."""
    sampling = ["-n", "3", "--batch_size", "2", "--device", "cpu", "--steps", "20"]
    widths = ["--ptq", "--cali_st", "2", "--cali_n", "2", "--quant_mode", "dynamic", "--method", "linear"]
    widths += ["--weight_bit", "8", "--quant_act", "--act_bit", "4"]
    errors = {}
    for name, options in {"plain": [], "modulated": ["--modulate"]}.items():
        sample_pipeline.main([str(folder), *sampling, *widths, *options, "-l", str(tmp_path / name)])
        manifest = json.loads((tmp_path / name / "run.json").read_text())
        errors[name] = manifest["noise_error"]["mse"]
        assert len(images_of(tmp_path / name)) == 3
    assert errors["modulated"] < 0.5 * errors["plain"]


@pytest.mark.slow
def test_it_is_fitted_again_on_its_own_samples(folder, tmp_path):
    naive = ["--method", "linear", "--w_range", "max", "--a_range", "max", "--refit", "1", "--device", "cpu"]
    run, out = tmp_path / "run", tmp_path / "out"
    quantize_pipeline.main([str(folder), "--out", str(out), *CALIBRATION, *naive, "-l", str(run)])
    in_float, own = (torch.load(run / f"calibration_data{of}.pt", weights_only=True)["xs"] for of in ("", "-refit1"))
    assert torch.equal(in_float[0], own[0]) and float((in_float[1] - own[1]).abs().max()) > 1e-3
    assert "refits on the quantized network's own samples: 1" in (out / "unet" / "README.md").read_text()


def test_an_interrupted_sampling_continues(folder, tmp_path):
    command = [str(folder), "-n", "3", "--steps", "2", "--device", "cpu", "-l", str(tmp_path)]
    sample_pipeline.main(command)
    before = images_of(tmp_path)
    (tmp_path / "img" / "00001.png").unlink()
    sample_pipeline.main(command)
    assert images_of(tmp_path) == before and len(before) == 3


def test_a_written_folder_needs_only_diffusers_and_qdiff(quantized):
    pipe = DiffusionPipeline.from_pretrained(quantized[0])
    config = json.loads((quantized[0] / "unet" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qdiff" and config["weight_bits"] == 4
    assert pipe.unet.conv_in.packed.bits == 4 and "Q-Diffusion" in (quantized[0] / "unet" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is no pipeline of diffusers"),
        (["FOLDER", "--component", "vae"], "has no component vae; give --component one of unet"),
        (["FOLDER", "--scheduler", "NoScheduler"], "diffusers has no scheduler NoScheduler; give one of"),
        (["FOLDER", "--scheduler", "AmusedScheduler"], "AmusedScheduler cannot be made from"),
        (
            ["FOLDER", "--scheduler", "DDPMScheduler"],
            "DDIMPipeline takes DDIMScheduler in place of DDPMScheduler; give --scheduler DDIMScheduler",
        ),
        (["FOLDER", "--prompt", "a cat"], "DDIMPipeline takes no prompts; leave them out"),
        (["FOLDER", "--guidance_scale", "3"], "DDIMPipeline takes no guidance_scale; leave them out"),
        (["FOLDER", "--classes", "one"], "--classes is one; give numbers"),
        (["FOLDER", "--steps", "0"], "--steps is 0; give at least 1"),
        (["FOLDER", "-n", "0"], "--n_samples is 0; give at least 1"),
        (["FOLDER", "--ptq", "--weight_bit", "4", "--cali_st", "60"], "60"),
        (["FOLDER", "--ptq", *CALIBRATION, "--method", "tfmq-dm"], "of Denoiser is not known; give --no-temporal_unit"),
    ],
)
def test_bad_input_is_one_sentence(folder, arguments, sentence, tmp_path, capsys):
    given = [str(folder) if a == "FOLDER" else a for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        sample_pipeline.main([*given, "-l", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_scheduler_the_pipeline_replaces(folder, tmp_path, capsys):
    copied = shutil.copytree(folder, tmp_path / "copy")
    config = copied / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    words = [str(copied), "--device", "cpu", "--steps", "2", "-l", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        sample_pipeline.main(words)
    assert stopped.value.code == 2 and "in place of PNDMScheduler; give --scheduler DDIM" in capsys.readouterr().err
    sample_pipeline.main([*words, "--scheduler", "DDIMScheduler"])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["sampler"]["kind"] == "DDIMScheduler" and run["network_calls"] == 2


def test_an_existing_folder_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        quantize_pipeline.main([str(folder), "--out", str(tmp_path / "mine"), *CALIBRATION])
    assert stopped.value.code == 2 and "is not an empty folder; choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--max_shard_size", "nan"], "--max_shard_size is nan; give a size above 0 in KB, MB, GB or TB"),
        (["--max_shard_size", "0"], "--max_shard_size is 0; give"),
        (["--max_shard_size", "0.0GB"], "--max_shard_size is 0.0GB; give"),
        (["--max_shard_size=-1GB"], "--max_shard_size is -1GB; give"),
        (["--runtime", "torch"], "--runtime has no meaning here, where no images are sampled"),
        (["--weight_cache", "8"], "--weight_cache has no meaning here"),
        (["--onnx", "model.onnx"], "--onnx has no meaning here"),
        (["--save-npz"], "--save-npz has no meaning here"),
        (["--fused_kernels"], "--fused_kernels has no meaning here"),
        (["-l", "OUT/run"], "lies in --out"),
        (["-l", "OUT"], "lies in --out"),
    ],
)
def test_what_could_not_be_written_or_has_no_effect(folder, given, sentence, tmp_path, capsys):
    words = [str(folder), "--out", str(tmp_path / "out"), *CALIBRATION, "-l", str(tmp_path / "run")]
    words += [word.replace("OUT", str(tmp_path / "out")) for word in given]
    with pytest.raises(SystemExit) as stopped:
        quantize_pipeline.main([*words, "--dry-run"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_save_leaves_nothing_and_is_repeated(folder, quantized, tmp_path, monkeypatch):
    out, run = quantized
    again, save = tmp_path / "again", DDIMPipeline.save_pretrained
    words = [str(folder), "--out", str(again), *CALIBRATION, *LEARNING, "-l", str(run), "--device", "cpu"]

    def interrupted(pipeline, target, **options):
        save(pipeline, target, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(DDIMPipeline, "save_pretrained", interrupted)
        quantize_pipeline.main(words)
    assert stopped.value.code == 130 and list(tmp_path.iterdir()) == []
    quantize_pipeline.main([*words, "--max_shard_size", "500MB"])
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert all((out / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_a_dry_run_reads_no_weights(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    (copy / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text((folder / name).read_text())
    sample_pipeline.main([str(copy), "--dry-run", "--ptq", *CALIBRATION])
    config = json.loads(capsys.readouterr().out)
    assert config["pipeline"]["class"] == "DDIMPipeline" and config["ptq"]["quant"]["weight_bits"] == 4


def test_a_missing_weights_file_is_one_sentence(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        test_a_dry_run_reads_no_weights(folder, tmp_path, capsys)
        sample_pipeline.main([str(tmp_path / "copy"), "-l", str(tmp_path / "run"), "--device", "cpu"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "cannot be loaded" in error and "Traceback" not in error


def test_the_sentence_without_diffusers(monkeypatch):
    from families import SCRIPTS

    from qdiff.cli import script

    def missing(name: str):
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(script.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'pip install "qdiff\[diffusers\]"'):
        SCRIPTS["sample_pipeline"].pipeline_of(None)
