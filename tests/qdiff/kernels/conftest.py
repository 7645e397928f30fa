"""Triton's interpreter runs a kernel on CPU tensors; its compiler needs no GPU either."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = Path(__file__).parents[3] / "qdiff" / "kernels"


def load(file: Path, interpreted: bool) -> ModuleType:
    """Return a copy of a module whose kernels are interpreted or compiled."""
    triton = pytest.importorskip("triton", reason="needs Triton, which this build of PyTorch does not bring")
    spec = importlib.util.spec_from_file_location(f"{file.stem}_{'interpreted' if interpreted else 'compiled'}", file)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled():
    """``compiled(name)``: a module of `qdiff.kernels` as a GPU would run it."""
    return lambda name: load(KERNELS / f"{name}.py", False)


@pytest.fixture(scope="session")
def interpreted():
    """``interpreted(name)``: the module with kernels that run on CPU tensors."""
    return lambda name: load(KERNELS / f"{name}.py", True)


@pytest.fixture
def with_fault(tmp_path):
    """``with_fault(name, old, new)``: the same, with one piece of its source replaced."""

    def planted(name: str, old: str, new: str) -> ModuleType:
        source = (KERNELS / f"{name}.py").read_text()
        assert source.count(old) == 1
        (tmp_path / f"{name}.py").write_text(source.replace(old, new))
        return load(tmp_path / f"{name}.py", True)

    return planted


@pytest.fixture(scope="session")
def ptx():
    """``ptx(kernel, signature, constants)``: what a kernel compiles to for a GPU of 2020 (compute capability 8.0)."""

    def compiled(kernel, signature, constants) -> str:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        signature = signature | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        return compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False}).asm["ptx"]

    return compiled
