"""diffusers knows the backend, whichever of the two is imported first, and only if qdiff is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("diffusers")

# What both import is loaded first, and each order runs in a process of its own from there.
PROGRAM = """
import json, os, sys
import huggingface_hub, torch, transformers
config = json.load(open(sys.argv[1]))["quantization_config"]

def diffusers_first():
    from diffusers.quantizers.auto import DiffusersAutoQuantizer  # which from_pretrained asks
    try:
        DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
    except ValueError as error:
        print(error)
    assert not any(name.startswith("qdiff") for name in sys.modules)
    import qdiff
    print(DiffusersAutoQuantizer.from_config(config, pre_quantized=True).quantization_config.quant_config.weight_bits)

def qdiff_first():
    import qdiff
    assert not any(name.startswith("diffusers") for name in sys.modules)
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
        found = DiffusersAutoQuantizer.from_config(given, pre_quantized=True)
        print(found.quantization_config.quant_config.weight_bits)

for order in (diffusers_first, qdiff_first):
    print(order.__name__, flush=True)
    if (child := os.fork()) == 0:
        order()
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def printed(quantized_folder: Path) -> dict[str, list[str]]:
    """What each order of imports prints."""
    command = [sys.executable, "-c", PROGRAM, str(quantized_folder / "unet" / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, first, second = done.stdout.replace("qdiff_first", "diffusers_first").split("diffusers_first\n")
    return {"diffusers first": first.splitlines(), "qdiff first": second.splitlines()}


def test_diffusers_first(printed):
    """Without qdiff, diffusers says that it does not know the method; after ``import qdiff`` it does."""
    message, bits = printed["diffusers first"]
    assert message.startswith("Unknown quantization type, got qdiff - supported types are:") and bits == "4"


def test_qdiff_first(printed):
    """A config may be made before diffusers is imported; where diffusers is missing, an error says what to install."""
    missing = "quantized pipelines need the library diffusers, which is not installed"
    assert printed["qdiff first"] == [*[f'{missing}; run pip install "qdiff[diffusers]"'] * 2, "3", "4"]


def test_importing_qdiff_loads_neither():
    code = "import qdiff, sys; sys.exit(bool({'diffusers', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
