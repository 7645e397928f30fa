"""What latent diffusion needs and diffusers does not have: a UNet with a narrow stem, and class conditions.

Folders written with them name this module; import it before ``DiffusionPipeline.from_pretrained`` loads one:

    from ldm.diffusers_networks import ClassConditionalLDMPipeline

    pipeline = ClassConditionalLDMPipeline.from_pretrained("runs/digits_class")
    images = pipeline([3, 7], num_inference_steps=20).images
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class LatentUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` with two freedoms of latent diffusion's UNet, for models that the class itself cannot express.

    Args:
        stem_channels: channels of the first convolution and of the timestep's sines and cosines; None takes those of
            the first level, ``block_out_channels[0]``, as the class itself does.
        num_attention_heads: heads of every attention; None takes the width of a head, ``attention_head_dim``.
        kwargs: arguments of ``UNet2DModel``.
    """

    def __init__(self, stem_channels: int | None = None, num_attention_heads: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs | ({"time_embedding_dim": 4 * stem_channels} if stem_channels else {}))
        self.register_to_config(stem_channels=stem_channels, num_attention_heads=num_attention_heads)
        if stem_channels is not None:
            self._narrow_stem(stem_channels)
        if num_attention_heads is not None:
            for module in self.modules():
                if isinstance(module, Attention):
                    module.heads = module.sliceable_head_dim = num_attention_heads
                    module.scale = (module.inner_dim // num_attention_heads) ** -0.5

    def _narrow_stem(self, channels: int) -> None:
        config, width = self.config, self.config.block_out_channels[0]

        def resnet(inputs: int) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels=inputs,
                out_channels=width,
                temb_channels=4 * channels,
                dropout=config.dropout,
                groups=config.norm_num_groups,
                eps=config.norm_eps,
                non_linearity=config.act_fn,
                time_embedding_norm=config.resnet_time_scale_shift,
            )

        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.time_proj = Timesteps(channels, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(channels, 4 * channels)
        # The blocks that read the stem: the first, and the last, to which it is a skip connection.
        self.down_blocks[0].resnets[0] = resnet(channels)
        self.up_blocks[-1].resnets[-1] = resnet(width + channels)


def _signature(own: Any, base: Any) -> inspect.Signature:
    """Return the signature of a constructor with the parameters of another in place of ``kwargs``."""
    mine, others = inspect.signature(own).parameters, inspect.signature(base).parameters
    return inspect.Signature([*(p for name, p in mine.items() if name != "kwargs"), *list(others.values())[1:]])


# Diffusers reads from it which keys a config may have.
LatentUNet2DModel.__init__.__signature__ = _signature(LatentUNet2DModel.__init__, UNet2DModel.__init__)


class ClassEmbedder(ModelMixin, ConfigMixin):
    """One learned vector per class, as the context of a ``UNet2DConditionModel``; the last class means "no class".

    Args:
        num_classes: number of classes, including "no class".
        embedding_dim: width of the vector.
    """

    @register_to_config
    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels [N] → context [N, 1, embedding_dim]."""
        return self.embedding(labels)[:, None]


class ClassConditionalLDMPipeline(DiffusionPipeline):
    """Class-conditional latent diffusion with classifier-free guidance (Rombach et al. 2022, appendix).

    Args:
        vqvae: decodes latents; its ``scaling_factor`` multiplied them before training.
        unet: reads the class by cross attention.
        class_embedder: classes → context.
        scheduler: any scheduler of diffusers.
    """

    model_cpu_offload_seq = "class_embedder->unet->vqvae"

    def __init__(
        self, vqvae: VQModel, unet: UNet2DConditionModel, class_embedder: ClassEmbedder, scheduler: DDIMScheduler
    ) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, class_embedder=class_embedder, scheduler=scheduler)
        self.labels = {str(number): number for number in range(class_embedder.config.num_classes - 1)}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image per label.

        Args:
            class_labels: N classes.
            guidance_scale: 1 evaluates only the condition.
            num_inference_steps: steps of the scheduler.
            eta: η of DDIM; schedulers without η ignore it.
            generator: source of the starting noise, and of the noise of steps.
            latents: the starting noise [N, C, h, w] instead.
            output_type: ``pil``, ``np`` ([N, H, W, 3] in [0, 1]) or ``pt`` ([N, 3, H, W] in [0, 1]).
            return_dict: False returns a tuple.
        """
        device, side = self._execution_device, self.unet.config.sample_size
        labels = torch.as_tensor(class_labels, dtype=torch.long, device=device)
        guides = guidance_scale != 1.0
        if guides:
            nothing = torch.full_like(labels, self.class_embedder.config.num_classes - 1)
            labels = torch.cat([nothing, labels])
        context = self.class_embedder(labels)
        if latents is None:
            shape = (len(class_labels), self.unet.config.in_channels, side, side)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        latents = latents.to(device) * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = self.scheduler.scale_model_input(torch.cat([latents, latents]) if guides else latents, t)
            predicted = self.unet(inputs, t, encoder_hidden_states=context).sample
            if guides:
                without, with_ = predicted.chunk(2)
                predicted = without + guidance_scale * (with_ - without)
            latents = self.scheduler.step(predicted, t, latents, **options).prev_sample
        images = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
