"""Latent diffusion and Stable Diffusion: UNet, first stages, conditioning, sampling and training."""
