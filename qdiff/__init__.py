"""Post-training quantization of diffusion models."""

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel

__all__ = ["QuantConfig", "QuantModel", "UserError", "load_checkpoint", "save_checkpoint"]
