"""Training data of the bundled latent models."""
