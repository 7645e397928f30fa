"""Hundreds of damaged files: a command works with finite results, or refuses in one sentence."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from ddim_runs import DATA, SAMPLER, SCRIPT, W4A8
from digit_sets import digits, write_folder
from mutations import mutated_bytes, mutated_tensors, mutated_tree
from run_checks import manifest, pixels
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

SECONDS = 20  # for one case: nothing that is refused takes as long

ONE = ("--timesteps", 1, "--max_images", 1, "--seed", 7)
LINEAR = (*W4A8, *DATA, "--quant_mode", "linear")
LOADED = (*W4A8, "--cali_ckpt")
SHORT = ("--cali_st", 1, "--cali_n", 2, "--cali_iters", 1, "--cali_iters_a", 1, "--cali_batch_size", 2)
COCO = {"annotations": [{"image_id": i, "id": 9 - i, "caption": f"the digit {i}"} for i in range(4)]}
TABLE = {
    "title": "T",
    "config": "configs/digits.yml",
    "script": "scripts/sample_diffusion_ddim.py",
    "options": "--config configs/digits.yml --max_images 3 --seed=1",
    "calibration": {"script": "scripts/collect_calibration.py", "options": "--cali_st 2"},
    "rows": [
        {"label": "float", "published": {"fid": 3.0}},
        {"label": "W4", "options": "--ptq --weight_bit 4"},
        {"label": "W{w}", "grid": {"w": [2, 3]}, "options": "--ptq --weight_bit {w}"},
    ],
}


@dataclass(frozen=True)
class Sources:
    """What is mutated: whole files, made once."""

    tiny: object
    latent: Callable
    native: Path
    published: Path
    pickled: Path
    recording: Path
    float_run: Path
    quantized_run: Path
    interrupted: Path
    images: Path


@pytest.fixture(scope="module")
def sources(tiny, latent, call, float_run, linear_run, tmp_path_factory) -> Sources:
    from ddim.config import load_config
    from ddim.models.diffusion import Model
    from qdiff import QuantConfig, QuantModel, load_checkpoint
    from qdiff.calibration.journal import CalibrationJournal
    from qdiff.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("sources")
    network = Model(load_config(tiny.config))
    network.load_state_dict(load_file(tiny.weights))
    qnn = QuantModel(network, QuantConfig(weight_bits=4, act_bits=8, split_shortcut=True))
    load_checkpoint(qnn, linear_run / "quantized.safetensors")
    save_checkpoint(qnn, folder / "published.pth", format="published")
    torch.save(load_file(tiny.weights), folder / "float.pth")
    with pytest.MonkeyPatch.context() as patch:  # as a kill before the last step leaves it
        patch.setattr(CalibrationJournal, "discard", lambda self: None)
        assert call(SCRIPT, *tiny.options, *ONE, *W4A8, *SHORT, "-l", folder / "interrupted").code == 0
    (folder / "interrupted" / "quantized.safetensors").unlink()
    return Sources(
        tiny,
        latent,
        linear_run / "quantized.safetensors",
        folder / "published.pth",
        folder / "float.pth",
        linear_run / "calibration_data.pt",
        float_run,
        linear_run,
        folder / "interrupted",
        write_folder(folder / "images", digits(0, 4)),
    )


# --- Kinds: write a mutated file into a folder; return the script, its options, and the run folder that it makes


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def float_bytes(rng, sources, folder):
    source = rng.choice([sources.tiny.weights, sources.pickled])
    path = written(folder / source.name, mutated_bytes(source.read_bytes(), rng))
    return SCRIPT, ("--config", sources.tiny.config, "--ckpt", path, *ONE), True


def float_tensors(rng, sources, folder):
    state, path = mutated_tensors(load_file(sources.tiny.weights), rng), folder / "float"
    save_file(state, path) if rng.random() < 0.5 else torch.save(state, path)
    return SCRIPT, ("--config", sources.tiny.config, "--ckpt", path, *ONE), True


def quantized_bytes(rng, sources, folder):
    source = rng.choice([sources.native, sources.published])
    path = written(folder / source.name, mutated_bytes(source.read_bytes(), rng))
    return SCRIPT, (*sources.tiny.options, *ONE, *LOADED, path), True


def native_tensors(rng, sources, folder):
    from safetensors import safe_open

    with safe_open(sources.native, "pt") as file:
        metadata = dict(file.metadata())
    path = folder / "native.safetensors"
    save_file(mutated_tensors(load_file(sources.native), rng), path, metadata)
    return SCRIPT, (*sources.tiny.options, *ONE, *LOADED, path), True


def native_metadata(rng, sources, folder):
    from safetensors import safe_open

    with safe_open(sources.native, "pt") as file:
        metadata = dict(file.metadata())
    name = rng.choice(sorted(metadata))
    try:
        metadata[name] = json.dumps(mutated_tree(json.loads(metadata[name]), rng)[0])
    except (ValueError, IndexError):  # a plain word, or a list of nothing
        metadata[name] = rng.choice(["", "{", "null", "abc"])
    save_file(load_file(sources.native), folder / "native.safetensors", metadata)
    return SCRIPT, (*sources.tiny.options, *ONE, *LOADED, folder / "native.safetensors"), True


def published_tensors(rng, sources, folder):
    state = torch.load(sources.published, weights_only=True)
    torch.save(mutated_tensors(state, rng), folder / "published.pth")
    return SCRIPT, (*sources.tiny.options, *ONE, *LOADED, folder / "published.pth"), True


def recordings(rng, sources, folder):
    path = folder / "recording.pt"
    if rng.random() < 0.4:
        written(path, mutated_bytes(sources.recording.read_bytes(), rng))
    else:
        torch.save(mutated_tensors(torch.load(sources.recording, weights_only=True), rng), path)
    return SCRIPT, (*sources.tiny.options, *ONE, *LINEAR, "--cali_data_path", path), True


def ddim_configs(rng, sources, folder):
    tree, _ = mutated_tree(yaml.safe_load(sources.tiny.config.read_text()), rng)
    (folder / "config.yml").write_text(yaml.safe_dump(tree))
    return SCRIPT, ("--config", folder / "config.yml", "--ckpt", sources.tiny.weights, *ONE), True


def config_bytes(rng, sources, folder):
    path = written(folder / "config.yml", mutated_bytes(sources.tiny.config.read_bytes(), rng))
    return SCRIPT, ("--config", path, "--ckpt", sources.tiny.weights, *ONE), True


def latent_configs(rng, sources, folder):
    kind = rng.choice(["unconditional", "unconditional", "class", "text"])
    files = sources.latent(kind)
    tree, _ = mutated_tree(yaml.safe_load(files.config.read_text()), rng)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    if kind == "unconditional":
        (folder / "model.safetensors").symlink_to(files.weights)
        return "sample_diffusion_ldm", ("-r", folder, "-n", 1, "-c", 1, "--seed", 1), True
    script = {"class": "sample_diffusion_ldm_imagenet", "text": "sample_txt2img"}[kind]
    model = ("--config", folder / "config.yaml", "--ckpt", files.weights)
    return script, (*model, "--n_samples", 1, "--ddim_steps", 1, "--seed", 1), True


def run_states(rng, sources, folder):
    run = rng.choice([sources.float_run, sources.quantized_run])
    shutil.copytree(run, folder / "run")
    (folder / "run" / "img" / "00001.png").unlink()
    if rng.random() < 0.3:
        written(folder / "run" / "run.json", mutated_bytes((run / "run.json").read_bytes(), rng))
    else:
        (folder / "run" / "run.json").write_text(json.dumps(mutated_tree(manifest(run), rng)[0]))
    more = LINEAR if run == sources.quantized_run else ()
    return SCRIPT, (*sources.tiny.options, *SAMPLER, *more), True


def run_files(rng, sources, folder):
    """Images, the checkpoint, the recording and the finished units of a run that goes on."""
    source = sources.float_run if rng.random() < 0.5 else sources.interrupted
    shutil.copytree(source, folder / "run")
    names = ("run.json", "run.log", "grid.png", "samples.npz")
    path = rng.choice([p for p in sorted((folder / "run").rglob("*")) if p.is_file() and p.name not in names])
    path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    more = (*ONE, *W4A8, *SHORT) if source == sources.interrupted else SAMPLER
    return SCRIPT, (*sources.tiny.options, *more), True


def evaluated_images(rng, sources, folder):
    from PIL import Image

    shutil.copytree(sources.images, folder / "images")
    path = folder / "images" / "00002.png"
    change = rng.choice(["bytes", "bytes", "mode", "size", "folder", "format"])
    if change == "bytes":
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    elif change == "folder":
        path.unlink()
        path.mkdir()
    else:
        image = Image.open(path)
        if change == "mode":
            image = image.convert(rng.choice(["1", "L", "LA", "P", "RGBA", "I", "F", "CMYK"]))
        if change == "size":
            image = image.resize((rng.randrange(1, 40), rng.randrange(1, 40)))
        image.save(path, format="TIFF" if change == "format" or image.mode in ("F", "CMYK") else "PNG")
    return "evaluate", (folder / "images", "--metrics", "isc", "--extractor", "digits-classifier", "--no-cache"), False


def evaluated_arrays(rng, sources, folder):
    np.savez(folder / "whole.npz", digits(0, 3))
    path = written(folder / "samples.npz", mutated_bytes((folder / "whole.npz").read_bytes(), rng))
    return "evaluate", (path, "--metrics", "isc", "--extractor", "digits-classifier", "--no-cache"), False


def prompts(rng, sources, folder):
    path = folder / "captions.json"
    if rng.random() < 0.5:
        path.write_text(json.dumps(mutated_tree(COCO, rng)[0]))
    else:
        path = path.with_suffix(rng.choice([".json", ".txt"]))
        path.write_bytes(mutated_bytes(json.dumps(COCO).encode(), rng))
    return "txt2img", (*sources.latent("text").options, "--from-file", path, "--ddim_steps", 4, "--dry-run"), False


def tables(rng, sources, folder):
    path = folder / "table.yaml"
    if rng.random() < 0.2:
        path.write_bytes(mutated_bytes(yaml.safe_dump(TABLE).encode(), rng))
    else:
        path.write_text(yaml.safe_dump(mutated_tree(TABLE, rng)[0]))
    return "reproduce", (path, "--dry-run"), False


# Values of a wrong kind from reports, and others like them, by the config's entry.
REPORTED = (
    *(("model.attn_resolutions", 0), ("diffusion.beta_end", "abc"), ("sampling.batch_size", 1e9)),
    *(("model.attn_resolutions", None), ("diffusion.beta_start", [0.1]), ("sampling.batch_size", "4")),
    *(("model.ch_mult", "12"), ("model.resamp_with_conv", "no"), ("data.channels", 1.0), ("sampling.batch_size", 0)),
)


def reported_configs(rng, sources, folder):
    tree = yaml.safe_load(sources.tiny.config.read_text())
    entry, value = REPORTED[rng.number]
    section, key = entry.split(".")
    tree[section][key] = value
    (folder / "config.yml").write_text(yaml.safe_dump(tree))
    return SCRIPT, ("--config", folder / "config.yml", "--ckpt", sources.tiny.weights, *ONE), True


KINDS = {
    float_bytes: 10,
    float_tensors: 12,
    quantized_bytes: 10,
    native_tensors: 10,
    native_metadata: 10,
    published_tensors: 6,
    recordings: 8,
    ddim_configs: 40,
    reported_configs: len(REPORTED),
    config_bytes: 6,
    latent_configs: 36,
    run_states: 10,
    run_files: 6,
    evaluated_images: 12,
    evaluated_arrays: 8,
    prompts: 8,
    tables: 30,
}


def cases():
    for kind, count in KINDS.items():
        for number in range(count):
            marks = [] if number % 3 == 0 or kind is reported_configs else [pytest.mark.thorough]
            yield pytest.param(kind, number, id=f"{kind.__name__}-{number}", marks=marks)


@pytest.fixture
def soon():
    """A case that never ends is a failure."""

    def too_long(*_):
        raise AssertionError(f"not refused within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("kind", "number"), cases())
def test_a_damaged_file_is_used_or_refused(kind, number, call, sources, soon, tmp_path, monkeypatch):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qdiff.cli.held_out.IMAGES", 2)
    rng = Random(f"{kind.__name__} {number}")
    rng.number = number
    script, options, makes_run = kind(rng, sources, tmp_path)
    outcome = call(script, *options, *(("-l", tmp_path / "run") if makes_run else ()))
    if outcome.code == 2:
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and outcome.err.splitlines()[-1] == errors[0], outcome.err
        assert len(errors[0]) < 1000
        return
    assert outcome.code == 0
    if makes_run:
        made = manifest(tmp_path / "run")
        assert made["status"] == "finished" and len(pixels(tmp_path / "run")) == made["num_images"]
        assert np.isfinite(made.get("noise_error", {}).get("mse", 0.0))
