"""Files have the permissions of the user's umask, whoever writes them."""

from __future__ import annotations

import json
import logging
import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qdiff.cli.run_folder import RunFolder
from qdiff.io.files import written_whole
from qdiff.io.images import save_png
from qdiff.report.page import TableResults, write_page


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def by_safetensors(path):
    save_file({"a": torch.zeros(2)}, path)


def by_numpy(path):
    with path.open("wb") as file:
        np.savez(file, arr_0=np.zeros(2))


def by_torch(path):
    torch.save({"a": torch.zeros(2)}, path)


def by_onnx(path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), str(path))


def by_hand(path):
    path.write_text(json.dumps({}))


WRITERS = {
    "quantized.safetensors": by_safetensors,
    "samples.npz": by_numpy,
    "calibration_data.pt": by_torch,
    "model.onnx": by_onnx,
    "run.json": by_hand,
}


@pytest.mark.parametrize("name", WRITERS)
def test_written_files_have_the_permissions_of_the_umask(name, umask, tmp_path):
    path = tmp_path / "folder" / name
    with written_whole(path) as temporary:
        assert not temporary.exists()
        WRITERS[name](temporary)
    assert mode(path) == 0o666 & ~umask
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_without_it_a_safetensors_file_would_be_its_owners_alone(tmp_path):
    """Planted: the writer by itself; where it heeds the umask some day, nothing here is needed for it."""
    before = os.umask(0o022)
    try:
        by_safetensors(tmp_path / "quantized.safetensors")
    finally:
        os.umask(before)
    assert mode(tmp_path / "quantized.safetensors") == 0o600


def test_the_files_of_a_run(umask, tmp_path):
    run = RunFolder(tmp_path / "run", {}, 1)
    run.open()
    with run.logged():
        logging.getLogger("qdiff").warning("a line")
    run.save_images([0], np.zeros((1, 8, 8, 3), dtype=np.uint8))
    run.finish(save_npz=True)
    written = {p.name: mode(p) for p in run.path.rglob("*") if p.is_file()}
    assert written == dict.fromkeys(["run.json", "run.log", "00000.png", "grid.png", "samples.npz"], 0o666 & ~umask)
    assert mode(run.images) == 0o777 & ~umask


def test_pages_and_pictures(umask, tmp_path):
    row = {
        "label": "float",
        "method": "float",
        "weight_bits": 32,
        "act_bits": 32,
        "split": False,
        "images": 1,
        "fid": 4,
    }
    write_page(tmp_path / "table.html", TableResults("A table", rows=[row]))
    save_png(np.zeros((8, 8, 1), dtype=np.uint8), tmp_path / "a.png")
    assert {p.name: mode(p) for p in tmp_path.iterdir()} == dict.fromkeys(["table.html", "a.png"], 0o666 & ~umask)


def test_a_training_checkpoint(umask, tmp_path):
    import pytorch_lightning as pl
    from fsspec.implementations import local

    local.get_umask.cache_clear()  # it reads the umask once in a process

    class Task(pl.LightningModule):
        def configure_optimizers(self):
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)

    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(Task())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    local.get_umask.cache_clear()
    assert mode(tmp_path / "last.ckpt") == 0o666 & ~umask
