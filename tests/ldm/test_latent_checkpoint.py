"""Latent checkpoints: averaged weights, what is ignored, what is refused, and both kinds of file."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoint import SCHEDULE, build_without_weights, load_latent_diffusion
from ldm.data.captions import all_captions, write_tokenizer
from ldm.util import instantiate_from_config
from qdiff.checkpoint import save_checkpoint
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod

UNET = "model.diffusion_model."
CLASSES = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 12, "n_classes": 5}}


@pytest.fixture
def config(model_config):
    return model_config()


@pytest.fixture
def state(config, fill):
    """The state dict of a model with random weights, as a released file holds it."""
    return dict(fill(instantiate_from_config(config.model)).state_dict())


@pytest.fixture
def write(tmp_path):
    """``write(state, "zip" or "safetensors")``: a checkpoint file."""

    def written(state, form="zip"):
        path = tmp_path / ("model.ckpt" if form == "zip" else "model.safetensors")
        if form == "zip":
            torch.save({"state_dict": state, "global_step": 3}, path)
        else:
            save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
        return path

    return written


def averages(state, factor=2.0):
    """``model_ema.*`` of the UNet: its names without dots."""
    unet = {n: v for n, v in state.items() if n.startswith("model.")}
    made = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": v * factor for n, v in unet.items()}
    return made | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def assert_holds(model, state):
    there = model.state_dict()
    assert there.keys() == state.keys()
    wrong = [n for n in there if not torch.equal(there[n], state[n].float())]
    assert not wrong


def refuses(config, path, match):
    with pytest.raises(UserError, match=match) as caught:
        load_latent_diffusion(config, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_every_weight_arrives(form, config, state, write):
    model = load_latent_diffusion(config, str(write(state, form)))
    assert_holds(model, state)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    z, t = torch.randn(1, 3, 4, 4), torch.tensor([5])
    assert torch.isfinite(model.network(z, t)).all() and model.decode(z).shape == (1, 3, 16, 16)


def test_building_without_weights_takes_no_memory(config):
    model = build_without_weights(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert float(model.scale_factor) == 1.0


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_half_precision_files_become_float32(form, config, state, write):
    halved = {k: v.half() for k, v in state.items()}
    model = load_latent_diffusion(config, write(halved, form))
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert_holds(model, halved)


WRAPPED = {
    "the whole in parallel": lambda n: f"module.{n}",
    "its UNet": lambda n: n.replace(UNET, f"{UNET}module."),
    "what holds the UNet": lambda n: n.replace("model.diffusion_model.", "model.module.diffusion_model."),
    "some names": lambda n: f"module.{n}" if n.startswith(UNET) else n,
    "compiled": lambda n: n.replace(UNET, f"{UNET}_orig_mod."),
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_names_of_wrapped_models(form, how, config, state, write):
    wrapped = {WRAPPED[how](n): v for n, v in (state | averages(state)).items()}
    assert_holds(
        load_latent_diffusion(config, write(wrapped, form)),
        {n: v * (2.0 if n.startswith(UNET) else 1.0) for n, v in state.items()},
    )


# ---------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize("use_ema", [True, False, None])
def test_averages_take_the_place_of_weights(use_ema, config, state, write):
    if use_ema is not None:
        config.model.params.use_ema = use_ema
    model = load_latent_diffusion(config, write(state | averages(state)))
    factor = 1.0 if use_ema is False else 2.0
    assert_holds(model, {n: v * (factor if n.startswith(UNET) else 1.0) for n, v in state.items()})


def test_partial_averages_are_refused(config, state, write):
    some = averages(state)
    del some["model_ema.diffusion_modelout2weight"]
    path = write(state | some)
    refuses(config, path, r"averages only some.*1 are missing, e\.g\. model\.diffusion_model\.out\.2\.weight.*use_ema")
    config.model.params.use_ema = False
    assert_holds(load_latent_diffusion(config, path), state)


def test_averages_of_another_shape_are_refused(config, state, write):
    some = averages(state)
    some["model_ema.diffusion_modelout2bias"] = torch.zeros(7)
    refuses(config, write(state | some), r"1 tensors of another shape \(e\.g\. model\.diffusion_model\.out\.2\.bias")


def test_counters_alone_are_no_averages(config, state, write):
    counters = {n: v for n, v in averages(state).items() if n in ("model_ema.decay", "model_ema.num_updates")}
    assert_holds(load_latent_diffusion(config, write(state | counters)), state)


# ---------------------------------------------------------------------- what is ignored


def test_leftovers_are_ignored_and_reported(config, state, write, caplog):
    leftovers = dict.fromkeys(SCHEDULE, torch.zeros(3)) | {
        "first_stage_model.loss.logvar": torch.zeros(1),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        **averages(state),
    }
    with caplog.at_level(logging.INFO, logger="qdiff"):
        model = load_latent_diffusion(config, write(state | leftovers))
    assert model.state_dict().keys() == state.keys()
    (message,) = [r.message for r in caplog.records if "ignored" in r.message]
    assert f"ignored {len(leftovers)} tensors" in message
    counted = f"{len(averages(state))} model_ema, {len(SCHEDULE)} schedule, 2 first_stage_model, 1 cond_stage_model"
    assert counted in message


def test_nothing_ignored_is_not_reported(config, state, write, caplog):
    with caplog.at_level(logging.INFO, logger="qdiff"):
        load_latent_diffusion(config, write(state))
    assert not [r for r in caplog.records if "ignored" in r.message]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"{UNET}out.2.weight", "missing"),
        ("first_stage_model.quantize.embedding.weight", "missing"),
        (f"{UNET}input_blocks.9.0.weight", "unexpected"),
        ("first_stage_model.more", "unexpected"),
        ("lossless", "unexpected"),
        (f"{UNET}time_embed.0.bias", "of another shape"),
    ],
)
def test_misfits_name_a_tensor(name, what, config, state, write):
    if what == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(3)
    refuses(config, write(state), rf"1 tensors {what} \(e\.g\. {name}\); give the config and the weights of one model")


def test_other_kinds_of_checkpoint_are_refused(config, tiny_network, make_unet, tmp_path):
    torch.save(tiny_network.state_dict(), tmp_path / "ddim.pth")
    save_file(tiny_network.state_dict(), tmp_path / "ddim.safetensors")
    qnn = QuantModel(make_unet("bedroom"), QuantConfig(weight_bits=8))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(RangeMethod.MIN_MAX)
    save_checkpoint(qnn, tmp_path / "q.safetensors")
    save_checkpoint(qnn, tmp_path / "q.pth", format="published")
    for path in sorted(tmp_path.iterdir()):
        refuses(config, path, r"not a latent diffusion checkpoint \(it has no model\.diffusion_model\.\*\)")


def test_damaged_and_missing_files(config, state, write, tmp_path):
    refuses(config, tmp_path / "none.ckpt", "does not exist")
    for form in ("zip", "safetensors"):
        path = write(state, form)
        path.write_bytes(path.read_bytes()[:-3000])
        refuses(config, path, "damaged or truncated|damaged, truncated")


# ---------------------------------------------------------------------- scale factor and conditions


def test_scale_factor(config, state, write):
    state["scale_factor"] = torch.tensor(0.7)
    assert float(load_latent_diffusion(config, write(state)).scale_factor) == pytest.approx(0.7)
    del state["scale_factor"]  # released files have none where it is in the config
    config.model.params.scale_factor = 0.18215
    assert float(load_latent_diffusion(config, write(state)).scale_factor) == pytest.approx(0.18215)
    config.model.params.scale_by_std = True
    refuses(config, write(state), "no scale_factor")


def test_class_embeddings_come_with_the_file(model_config, fill, write):
    config = model_config("imagenet", cond_stage_config=CLASSES)
    state = dict(fill(instantiate_from_config(config.model)).state_dict())
    assert_holds(load_latent_diffusion(config, write(state)), state)
    del state["cond_stage_model.embedding.weight"]
    refuses(config, write(state), r"1 tensors missing \(e\.g\. cond_stage_model\.embedding\.weight\)")


@pytest.mark.slow
def test_text_encoders_come_with_the_file_or_from_their_folder(model_config, fill, write, tmp_path):
    folder = tmp_path / "encoder"
    write_tokenizer(folder, all_captions(), 160, 8)
    architecture = {"vocab_size": 160, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1}
    architecture |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 1}
    torch.manual_seed(3)
    pretrained = CLIPTextModel(CLIPTextConfig(**architecture))
    pretrained.save_pretrained(folder)
    stage = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": str(folder)}}
    config = model_config("sd", cond_stage_config=stage)
    state = dict(fill(instantiate_from_config(config.model)).state_dict())
    prefix = "cond_stage_model.transformer.text_model."
    released = state | {f"{prefix}embeddings.position_ids": torch.arange(8)[None]}
    model = load_latent_diffusion(config, write(released))
    assert_holds(model, state)
    assert model.condition(["seven"]).shape == (1, 8, 12)

    without = {n: v for n, v in state.items() if not n.startswith("cond_stage_model.")}
    weights = getattr(pretrained, "text_model", pretrained).state_dict()
    expected = without | {prefix + n: v for n, v in weights.items()}
    assert_holds(load_latent_diffusion(config, write(without)), expected)

    del state[f"{prefix}final_layer_norm.bias"]  # some of it is not enough
    refuses(config, write(state), rf"1 tensors missing \(e\.g\. {prefix}final_layer_norm\.bias\)")
