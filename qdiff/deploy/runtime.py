"""The interface of a runtime, which computes the network while sampling."""

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
"""Computes a model's outputs, in order, from its inputs by name."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Computes a `QuantModel` in torch.

    Attributes:
        name: value of ``--runtime``.
        help: what it does, as part of a sentence.
        packs: quantized weights stay packed (`QuantModel.pack_weights`); False dequantizes them once.
        multiplies_integers: layers multiply integers; False simulates quantization in float.
        takes_weight_cache: ``--weight_cache`` may be given.
    """

    name: str
    help: str = ""
    packs: bool = True
    multiplies_integers: bool = False
    takes_weight_cache: bool = False

    def check(self, quant: QuantConfig | None) -> None:
        """Raise a `UserError` if the runtime is not installed, or cannot run such a network.

        Args:
            quant: None for a float network.
        """
        if self.packs and quant is None:
            raise UserError(f"--runtime {self.name} needs quantized weights; add --ptq, or leave --runtime out")
        if self.multiplies_integers:
            check_integer_products(quant)

    def prepare(self, qnn: QuantModel, cache_bytes: int = 0) -> None:
        """Convert the weights of a network permanently to the form that the runtime computes with.

        Args:
            cache_bytes: size of the cache of dequantized weights.
        """
        if self.packs and qnn.config.weight_bits is not None:
            qnn.pack_weights(cache_bytes, integer=self.multiplies_integers)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Runtime):
    """Runs an exported model (`qdiff.deploy.onnx_network.OnnxNetwork`) on the CPU.

    Attributes:
        package: the package of the ``deploy`` extra that it imports.
        changes: returns, for the limits of exact products, the changes that rewrite a model for the runtime's integer
            kernels.
        open: returns a rewritten model as a function that runs with a number of threads.
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
