"""Who may import whom: imports go downwards, and no part of qdiff knows a model family or a script."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# From the top: a room imports from those below it, and within itself.
LAYERS = (
    ("scripts",),
    ("qdiff.benchmark",),
    ("qdiff.cli",),
    ("qdiff.report",),
    ("qdiff.diffusers_backend",),
    ("qdiff.api",),
    ("qdiff.evaluation",),
    ("qdiff.methods",),
    ("qdiff.calibration", "qdiff.deploy", "qdiff.cost"),
    ("qdiff.checkpoint",),
    ("qdiff",),  # the engine: what lies at the root
    ("ldm",),
    ("ddim",),
    ("qdiff.pipeline",),
    ("qdiff.sampling", "qdiff.kernels", "qdiff.tracing"),
    ("qdiff.config",),
    ("qdiff.ranges",),  # whose estimators a config names
    ("qdiff.functional",),
    ("qdiff.io", "qdiff.machine"),
    ("qdiff.interface",),
    ("qdiff.errors",),
)
ALLOWED = {
    ("qdiff.functional", "qdiff.kernels.switch"),  # a flag; the kernels themselves are built on the arithmetic
}


def room(module: str) -> str:
    parts = module.split(".")
    named = ".".join(parts[:2])
    return named if any(named in rooms for rooms in LAYERS) else parts[0]


def rank(module: str) -> int:
    """Position from the top."""
    return next(i for i, rooms in enumerate(LAYERS) if room(module) in rooms)


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward(module: str, source: str) -> list[str]:
    """Return what a module imports from above it, or from its neighbours."""
    ours = [name for name in imports(source) if name.split(".")[0] in ("qdiff", "ddim", "ldm", "scripts")]
    here = rank(module)
    return [
        name
        for name in ours
        if (
            (rank(name) < here or (rank(name) == here and room(name) != room(module))) and (module, name) not in ALLOWED
        )
        # Families know one thing about each other: latent diffusion is built on DDIM's parts.
        or (room(module) == "ddim" and room(name) == "ldm")
        # Nothing in qdiff knows a family.
        or (module.startswith("qdiff") and room(name) in ("ddim", "ldm"))
    ]


MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("qdiff", "ddim", "ldm", "scripts")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    if path != REPOSITORY / "qdiff" / "__init__.py"  # the front, which names what lies in all rooms
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    assert upward(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("qdiff.quant_model", "from qdiff.calibration.run import CalibrationRun"),
        ("qdiff.calibration.run", "import qdiff.methods.registry"),
        ("qdiff.methods.linear", "from qdiff.cli.options.ptq import PtqPlan"),
        ("qdiff.deploy.runtimes", "from qdiff.calibration.walk import walk"),
        ("qdiff.cli.script", "def f():\n    from ddim.pipeline import DdimPipeline"),
        ("ddim.config", "from ldm.config import load_config"),
        ("ldm.config", "from qdiff.cli.options.parser import Parser"),
    ],
)
def test_a_planted_import_is_found(module, planted):
    assert len(upward(module, planted)) == 1
