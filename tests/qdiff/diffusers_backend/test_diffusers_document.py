"""The Python of docs/diffusers.md runs, and does what the text says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from qdiff.modes import leaves

pytestmark = pytest.mark.slow

pytest.importorskip("diffusers")

REPOSITORY = Path(__file__).resolve().parents[3]
TEXT = (REPOSITORY / "docs" / "diffusers.md").read_text(encoding="utf-8")
SECTION = TEXT.split("## Quantize a pipeline")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The bundled model as a pipeline's folder."""
    from ddim.pipeline import DdimPipeline

    folder = tmp_path_factory.mktemp("document") / "digits"
    DdimPipeline(REPOSITORY / "configs" / "digits.yml").write_diffusers(folder)
    return folder


def test_the_blocks_run_in_order(digits, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copytree(digits, tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 3
    names: dict = {}
    exec(BLOCKS[0], names)
    quantized = names["pipe"].unet
    assert float(names["notes"]["noise_error"].split()[0]) < 0.02
    small = Path("runs/small/unet")
    assert (small / "README.md").is_file()
    size = (small / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.2 * (digits / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    exec(BLOCKS[1], names)
    assert names["pipe"].unet is not quantized and len(leaves(names["pipe"].unet)) == len(leaves(quantized))
    assert names["images"].shape == (2, 16, 16, 1) and np.isfinite(names["images"]).all()
    exec(BLOCKS[2], names)
    assert {layer.packed.bits for layer in leaves(names["pipe"].unet)} == {4}
