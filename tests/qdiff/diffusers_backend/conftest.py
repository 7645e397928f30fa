"""Folders of tiny pipelines that several tests load."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory) -> Path:
    """A float DDIM pipeline."""
    from pipelines import ddim

    folder = tmp_path_factory.mktemp("float")
    ddim().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory) -> Path:
    """The same pipeline in W4A8."""
    from pipelines import ddim

    import qdiff
    from qdiff.calibration.run import CalibrationRun

    folder, pipe = tmp_path_factory.mktemp("quantized"), ddim()
    options = {"samples": 4, "steps": 2, "num_inference_steps": 2, "run": CalibrationRun(show_progress=False)}
    qdiff.quantize_pipeline(pipe, qdiff.QuantConfig(4, 8), "linear", **options)
    pipe.save_pretrained(folder)
    return folder
