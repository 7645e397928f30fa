"""First stages: autoencoders between images and latents, with the parameter names of the released checkpoints.

Source: Rombach et al. 2022, section 3.1 and appendix G. Training losses are in `ldm.training`; a ``lossconfig`` in a
released YAML file is accepted but not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder


class DiagonalGaussian:
    """The normal distribution with diagonal covariance that a KL encoder predicts.

    Args:
        parameters: [N, 2C, h, w]: means, then log variances (clamped to [−30, 20]).
    """

    def __init__(self, parameters: Tensor) -> None:
        self.mean, log_variance = parameters.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-30.0, 20.0)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return mean + std·noise, [N, C, h, w]; fresh noise if none is given."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """Return the divergence from the standard normal distribution in nats, [N]."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.sum(dim=(1, 2, 3))


class VectorQuantizer(nn.Module):
    """Replaces every position's vector with the nearest codebook entry (van den Oord et al. 2017)."""

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_embed, 1.0 / n_embed)

    def indices(self, z: Tensor) -> Tensor:
        """Return the index of the nearest entry at every position of z [N, D, h, w], int64 [N, h, w]."""
        n, _, h, w = z.shape
        flat = rearrange(z, "n d h w -> (n h w) d")
        codes = self.embedding.weight
        # |z − e|² without |z|², which is the same for all entries
        distances = codes.square().sum(dim=1) - 2.0 * flat @ codes.t()
        return distances.argmin(dim=1).view(n, h, w)

    def forward(self, z: Tensor) -> Tensor:
        """[N, D, h, w] → [N, D, h, w]."""
        return rearrange(self.embedding(self.indices(z)), "n h w d -> n d h w").contiguous()


class FirstStage(nn.Module):
    """The common base of both first stages: encoder, decoder, and 1×1 convolutions around the latent.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        embed_dim: channels of the latent.
    """

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        factor = 2 if ddconfig["double_z"] else 1
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"] * factor, embed_dim * factor, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.embed_dim = embed_dim
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)

    def decode(self, z: Tensor) -> Tensor:
        """Latent [N, embed_dim, h, w] → image [N, 3, h·f, w·f], nominally in [−1, 1]."""
        return self.decoder(self.post_quant_conv(z))


class VQModelInterface(FirstStage):
    """The vector-quantized first stage as diffusion uses it: latents are quantized before they are decoded.

    Args:
        n_embed: number of codebook entries.
        lossconfig, ckpt_path, remap, monitor, image_key: keys of training configs; not used.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        n_embed: int,
        lossconfig: Any = None,
        ckpt_path: str | None = None,
        remap: str | None = None,
        monitor: str | None = None,
        image_key: str = "image",
    ) -> None:
        super().__init__(ddconfig, embed_dim)
        self.quantize = VectorQuantizer(n_embed, embed_dim)

    def encode(self, x: Tensor) -> Tensor:
        """Image [N, 3, H, W] in [−1, 1] → latent [N, embed_dim, H/f, W/f], not yet quantized."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantize(z))

    def reconstruct_with_loss(self, x: Tensor, commitment: float = 0.25) -> tuple[Tensor, Tensor]:
        """Return the reconstruction, with straight-through gradients at the codebook, and the codebook's loss."""
        z = self.encode(x)
        chosen = self.quantize(z)
        loss = F.mse_loss(chosen, z.detach()) + commitment * F.mse_loss(z, chosen.detach())
        return super().decode(z + (chosen - z).detach()), loss


class AutoencoderKL(FirstStage):
    """The first stage whose encoder predicts a normal distribution over latents.

    Args:
        lossconfig, ckpt_path, monitor, image_key: keys of training configs; not used.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        lossconfig: Any = None,
        ckpt_path: str | None = None,
        monitor: str | None = None,
        image_key: str = "image",
    ) -> None:
        super().__init__(ddconfig, embed_dim)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Image [N, 3, H, W] in [−1, 1] → distribution of the latent [N, embed_dim, H/f, W/f]."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def reconstruct_with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction from a sampled latent, and the KL divergence per latent value in nats."""
        posterior = self.encode(x)
        return self.decode(posterior.sample()), posterior.kl().mean() / posterior.mean[0].numel()
