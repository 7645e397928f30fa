"""Make diffusers know the quantization method ``qdiff``, without importing diffusers before the user does."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_REGISTRY = "diffusers.quantizers.auto"  # the module whose two dicts hold the quantization methods
_CONFIG = "qdiff.diffusers_backend.config"
METHOD = "qdiff"


def register_when_imported() -> None:
    """Register the backend now if diffusers is loaded, otherwise as soon as it is.

    Importing diffusers here would load torch, which `qdiff.cli.passive_waiting` must precede, and would be slow for
    who does not use it.
    """
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register(registry: ModuleType) -> None:
    from qdiff.diffusers_backend.config import QDiffConfig

    registry.AUTO_QUANTIZER_MAPPING[METHOD] = _make_quantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QDiffConfig


def _make_quantizer(config: Any, **keywords: Any) -> Any:
    """Return the backend for a component; a function, because its module imports the registry itself."""
    from qdiff.diffusers_backend.quantizer import QDiffQuantizer

    return QDiffQuantizer(config, **keywords)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds diffusers' registry as Python would, and has the backend registered once it is loaded."""

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if _CONFIG not in sys.modules:  # otherwise it is being imported, imports diffusers, and registers at its end
            _register(module)
