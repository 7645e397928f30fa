"""diffusers knows the backend, whichever of the two is imported first, and only if qdiff is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("diffusers")


def python(code: str, *arguments: object) -> str:
    """Run a program in a process of its own and return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ = """
import json, sys
config = json.load(open(sys.argv[1]))["quantization_config"]
"""


def test_diffusers_first(quantized_folder):
    """Without qdiff, diffusers says that it does not know the method; after ``import qdiff`` it does."""
    printed = python(
        READ
        + """
from diffusers.quantizers.auto import DiffusersAutoQuantizer  # which from_pretrained asks
try:
    DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
except ValueError as error:
    print(error)
assert not any(name.startswith("qdiff") for name in sys.modules)
import qdiff
print(DiffusersAutoQuantizer.from_config(config, pre_quantized=True).quantization_config.quant_config.weight_bits)
""",
        quantized_folder / "unet" / "config.json",
    )
    first, second = printed.splitlines()
    assert first.startswith("Unknown quantization type, got qdiff - supported types are:") and second == "4"


def test_qdiff_first(quantized_folder):
    """``import qdiff`` loads neither diffusers nor torch; a config may be made before diffusers is imported.

    Where diffusers is missing, what needs it says what to install.
    """
    printed = python(
        READ
        + """
import qdiff
assert not {"diffusers", "torch"} & set(sys.modules)
sys.modules["diffusers"] = None
qdiff.QuantConfig(4)
for name in ("QDiffConfig", "quantize_pipeline"):
    try:
        getattr(qdiff, name)
    except qdiff.UserError as error:
        print(error)
del sys.modules["diffusers"]
made = qdiff.QDiffConfig(weight_bits=3)
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, DiffusersAutoQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["qdiff"] is qdiff.QDiffConfig is type(made)
for given in (made, config):
    print(DiffusersAutoQuantizer.from_config(given, pre_quantized=True).quantization_config.quant_config.weight_bits)
""",
        quantized_folder / "unet" / "config.json",
    )
    missing = "quantized pipelines need the library diffusers, which is not installed"
    assert printed.splitlines() == [*[f'{missing}; run pip install "qdiff[diffusers]"'] * 2, "3", "4"]
