"""Tiny random pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import TEXT, TOKENS, controlnet, dit, flux, text_unet, unet
from torch import Tensor

PROMPTS = ["a b", "b", "a"]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(**changes: Any) -> Any:
    """Images [N, 1, 8, 8] from noise."""
    torch.manual_seed(0)
    return quiet(diffusers.DDIMPipeline(unet(**changes), DDIMScheduler()))


def vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1).eval()


def text_encoder() -> dict[str, Any]:
    """A CLIP encoder of one layer, and a tokenizer of two words."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
    )
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def stable_diffusion(kind: str = "StableDiffusionPipeline", prediction: str = "epsilon", **parts: Any) -> Any:
    """Stable Diffusion of a kind, with v-prediction if asked."""
    torch.manual_seed(0)
    parts = {"unet": text_unet(), "vae": vae(), **text_encoder(), "feature_extractor": None, **parts}
    scheduler = DDIMScheduler(prediction_type=prediction, steps_offset=1, clip_sample=False)
    return quiet(getattr(diffusers, kind)(**parts, scheduler=scheduler, safety_checker=None))


def with_controlnet() -> Any:
    torch.manual_seed(3)
    return stable_diffusion("StableDiffusionControlNetPipeline", controlnet=controlnet())


def class_conditional() -> Any:
    """DiT over 10 classes."""
    torch.manual_seed(0)
    return quiet(diffusers.DiTPipeline(dit(), vae(), DDIMScheduler()))


def flux_without_encoders() -> Any:
    """FLUX, which gets encoded prompts."""
    torch.manual_seed(0)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return quiet(diffusers.FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, transformer=flux(), **nothing))


def encoded_prompts(count: int = 2) -> dict[str, Tensor]:
    """What `flux_without_encoders` takes instead of prompts."""
    generator = torch.Generator().manual_seed(4)
    return {
        "prompt_embeds": torch.randn(count, TOKENS, TEXT, generator=generator),
        "pooled_prompt_embeds": torch.randn(count, 6, generator=generator),
    }


def images(pipe: Any, count: int = 2, **options: Any) -> Tensor:
    """Return what a pipeline makes from fixed seeds in two steps, before it is decoded if it is."""
    options = {"num_inference_steps": 2, "output_type": "latent" if hasattr(pipe, "vae") else "np", **options}
    if not hasattr(pipe, "tokenizer") and not hasattr(pipe, "labels"):
        options["batch_size"] = count
    made = pipe(**options, generator=[torch.Generator().manual_seed(i) for i in range(count)]).images
    return torch.as_tensor(made)
