"""``--fused_kernels``: where it is refused, and that it is no part of what decides the images."""

from __future__ import annotations

import contextlib
import json
import shutil

from ddim_runs import SAMPLER, SCRIPT, W4A8
from run_checks import succeeded

OPTION = "--fused_kernels"


def test_refused_where_it_could_not_run_before_anything_else(call, tiny, tmp_path):
    for words, says in [
        ((), "not on a CUDA device"),
        (("--runtime", "onnxruntime"), "onnxruntime runs on the CPU"),
    ]:
        line = call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, OPTION, *words, "-l", tmp_path / "run").error_line()
        assert OPTION in line and says in line
    assert list(tmp_path.iterdir()) == []


def test_no_part_of_the_resolved_config(call, tiny):
    """Shown also where there is no GPU, as for every dry run."""
    outcomes = [call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, *o, "--dry-run") for o in ((), (OPTION,))]
    assert outcomes[0].code == outcomes[1].code == 0 and outcomes[0].out == outcomes[1].out
    others = call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, "--a_sym", "--dry-run")
    assert others.out != outcomes[0].out


def test_without_ptq_it_is_said_to_have_no_effect(call, tiny):
    assert OPTION in call(SCRIPT, *tiny.options, *SAMPLER, OPTION, "--dry-run").err


def test_noted_in_the_manifest_of_a_run_that_goes_on(call, tiny, calibrated_run, tmp_path, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def noted():
        entered.append("in")
        yield
        entered.append("out")

    monkeypatch.setattr("qdiff.cli.sample.check_available", lambda device: entered.append(device.type))
    monkeypatch.setattr("qdiff.cli.sample.fused", noted)
    folder, options = calibrated_run
    shutil.copytree(folder, tmp_path / "run")
    manifest = tmp_path / "run" / "run.json"
    assert json.loads(manifest.read_text())["fused_kernels"] is False
    first_batch = ["img/00000.png", "img/00001.png"]
    for image in first_batch:
        (tmp_path / "run" / image).unlink()
    succeeded(call(SCRIPT, *options, "--save-npz", OPTION, "-l", tmp_path / "run"))
    assert json.loads(manifest.read_text())["fused_kernels"] is True and entered == ["cpu", "in", "out"]
    assert all((tmp_path / "run" / image).read_bytes() == (folder / image).read_bytes() for image in first_batch)
