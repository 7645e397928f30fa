"""Make diffusers know the quantization method ``qdiff``, without importing diffusers before the user does."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_REGISTRY = "diffusers.quantizers.auto"  # the module whose two dicts hold the quantization methods
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
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
    # This module enters its own class, because it may be what imports diffusers and be half loaded now.
    importlib.import_module("qdiff.diffusers_backend.config")


def _quantizer(*args: Any, **keywords: Any) -> Any:
    from qdiff.diffusers_backend.quantizer import QDiffQuantizer

    return QDiffQuantizer(*args, **keywords)


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
        _register(module)
