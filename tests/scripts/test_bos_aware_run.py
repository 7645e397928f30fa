"""``--bos_aware`` from the command line: calibrated, loaded, counted, and refused before any work."""

from __future__ import annotations

import json

import pytest
from latent_models import FEW, W4A8
from run_checks import image_bytes, manifest, succeeded

LINEAR = (*W4A8, "--quant_mode", "linear", *FEW)
SAMPLER = ("--ddim_steps", 2, "--seed", 7, "--scale", 2.0, "--n_samples", 2, "--max_images", 2, "--skip_grid")
TEXT = ("--prompt", "a handwritten three", *SAMPLER)


@pytest.mark.slow
def test_calibrated_loaded_and_counted(call, small_latent, tmp_path):
    options, run = (*small_latent("text").options, *TEXT), tmp_path / "run"
    succeeded(call("txt2img", *options, *LINEAR, "--bos_aware", "-l", run))
    written, checkpoint = manifest(run), run / "quantized.safetensors"
    assert written["config"]["ptq"]["quant"]["bos_aware"] is True
    loaded = (*options, *W4A8, "--cali_ckpt", checkpoint)
    succeeded(call("txt2img", *loaded, "--bos_aware", "--runtime", "torch", "-l", tmp_path / "loaded"))
    assert image_bytes(tmp_path / "loaded") == image_bytes(run)
    assert "add --bos_aware" in call("txt2img", *loaded, "-l", tmp_path / "other").error_line()
    config = small_latent("text").config
    model = ("--like", "txt2img", "--config", config, "--ddim_steps", 2, *W4A8, "--json")
    with_it, without = (
        json.loads(succeeded(call("count_cost", *model, *words)).out)["quantized"] for words in (("--bos_aware",), ())
    )
    assert with_it["bops"] == written["cost"]["bops"] < without["bops"]
    assert with_it["size_bytes"] == written["cost"]["size_bytes"] > without["size_bytes"]


def test_an_encoder_that_looks_in_both_directions_is_refused_before_any_work(call, small_latent, tmp_path, monkeypatch):
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder

    encode = FrozenCLIPEmbedder.forward
    both = lambda self, texts: encode(self, texts).flip(1).cumsum(1)  # noqa: E731, from the last token on
    monkeypatch.setattr(FrozenCLIPEmbedder, "forward", both)
    outcome = call("txt2img", *small_latent("text").options, *TEXT, *LINEAR, "--bos_aware", "-l", tmp_path / "run")
    assert "the first token of the context is not the same for all samples" in outcome.error_line()
    assert not (tmp_path / "run").exists()


def test_readers_that_all_stay_in_float_are_refused_before_any_work(call, small_latent, tmp_path):
    readers = (f"middle_block.1.transformer_blocks.0.attn2.{name}=W32A32" for name in ("to_k", "to_v"))
    words = (*LINEAR, "--bos_aware", "--layer_bits", ",".join(readers), "-l", tmp_path / "run")
    outcome = call("txt2img", *small_latent("text").options, *TEXT, *words)
    assert "no layer that is quantized reads a context of tokens" in outcome.error_line()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "kind", "has"),
    [
        ("sample_diffusion_ldm_imagenet", "class", "has a context of one token"),
        ("sample_diffusion_ddim", None, "takes no context"),
    ],
)
def test_models_without_texts_are_refused(script, kind, has, call, tiny, small_latent, tmp_path):
    options = tiny.options if kind is None else small_latent(kind).options
    outcome = call(script, *options, *LINEAR, "--bos_aware", "--dry-run", "-l", tmp_path / "run")
    assert f"{has}; leave it out" in outcome.error_line()


def test_without_ptq_it_is_told(call, small_latent, tmp_path):
    outcome = call("txt2img", *small_latent("text").options, *TEXT, "--bos_aware", "--dry-run", "-l", tmp_path / "run")
    assert "--bos_aware has no effect" in succeeded(outcome).err


@pytest.mark.thorough
def test_chosen_widths_and_resumed_weights(call, small_latent, tmp_path):
    """Sensitivities are measured without the first token, and activations calibrated for loaded weights."""
    options, run = (*small_latent("text").options, *TEXT), tmp_path / "run"
    mixed = ("--target_bits", 4, "--candidate_bits", "3,4,8", "--sensitivity", "probe", "--sensitivity_samples", 4)
    succeeded(call("txt2img", *options, *LINEAR, "--bos_aware", *mixed, "-l", run))
    checkpoint = run / "quantized.safetensors"
    weights = (*W4A8, "--layer_bits", run / "widths.json", "--resume_w", "--cali_ckpt", checkpoint, *FEW, "--bos_aware")
    succeeded(call("txt2img", *options, *weights, "-l", tmp_path / "again"))
    assert manifest(tmp_path / "again")["config"]["ptq"]["action"] == "activations"
