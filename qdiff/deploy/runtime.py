"""What a runtime is: what computes the network while sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qdiff.config import QuantConfig
from qdiff.deploy.exactness import check_exact
from qdiff.deploy.onnx_export import check_exportable, import_extra, import_onnx
from qdiff.deploy.onnx_lowering import ProductLimits
from qdiff.deploy.onnx_rewriting import Change
from qdiff.errors import UserError
from qdiff.kernels.integer_matmul import check_integer_products
from qdiff.quant_model import QuantModel

if TYPE_CHECKING:
    import onnx

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
"""Computes a model's outputs, in their order, of its inputs by name."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Computes a `QuantModel` in torch.

    Attributes:
        name: of ``--runtime``.
        help: what it does, in half a sentence.
        packs: quantized weights stay packed (`QuantModel.pack_weights`); False dequantizes them once.
        multiplies_integers: layers multiply integers; nothing else than simulation where this is False.
        takes_weight_cache: ``--weight_cache`` has a meaning.
    """

    name: str
    help: str = ""
    packs: bool = True
    multiplies_integers: bool = False
    takes_weight_cache: bool = False

    def check(self, quant: QuantConfig | None) -> None:
        """Raise a `UserError` where this is not installed, or cannot run such a network.

        Args:
            quant: None for a float network.
        """
        if self.packs and quant is None:
            raise UserError(f"--runtime {self.name} is for quantized weights; add --ptq, or leave --runtime out")
        if self.multiplies_integers:
            check_integer_products(quant)

    def prepare(self, qnn: QuantModel, cache_bytes: int = 0) -> None:
        """Bring the weights of a network into the form that this computes with, for good.

        Args:
            cache_bytes: of dequantized weights to keep.
        """
        if self.packs and qnn.config.weight_bits is not None:
            qnn.pack_weights(cache_bytes, integer=self.multiplies_integers)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Runtime):
    """Runs an exported model (`qdiff.deploy.onnx_network.OnnxNetwork`) on the CPU.

    Attributes:
        package: what is imported for it, of the ``deploy`` extra.
        changes: of products' limits, how a model is rewritten into what the runtime's integer kernels take.
        open: returns a rewritten model as a function, computed with a number of threads.
    """

    package: str
    changes: Callable[[ProductLimits], Mapping[str, Change]]
    open: Callable[[onnx.ModelProto, int], Run]

    def check(self, quant: QuantConfig | None) -> None:
        import_onnx()
        import_extra(self.package)
        if quant is None:
            return
        check_exportable(quant)
        if quant.act_bits is not None:
            check_exact(self)
