"""The recording command: the published format, evenly spaced steps, the same samples that a run would record."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.samples import load_recording

SCRIPT = "collect_calibration"

# Absolute, of values around 1: a convolution may sum in another order for another batch size.
BATCH_TOLERANCE = 1e-5


def test_published_format(call, tiny, tmp_path):
    out = tmp_path / "new" / "data.pt"
    outcome = call(SCRIPT, *tiny.options, "--timesteps", 10, "--cali_st", 5, "--cali_n", 6, "--out", out)
    assert outcome.code == 0, outcome.err
    assert str(out) in outcome.out
    recording = load_recording(out)
    assert recording["xs"].shape == (5, 6, 1, 8, 8) and recording["xs"].dtype == torch.float32
    # 10 of 1000 steps are 0, 100 … 900; every second from the noisiest on.
    assert recording["ts"].tolist() == [[t] * 6 for t in (900, 700, 500, 300, 100)]
    assert torch.isfinite(recording["xs"]).all()
    assert len(recording["xs"].flatten(0, 1).flatten(1).unique(dim=0)) == 30
    assert [p.name for p in out.parent.iterdir()] == ["data.pt"]


@pytest.mark.slow
@pytest.mark.parametrize(("spacing", "kept"), [((), [900, 600, 300]), (("--cali_spacing", "ends"), [900, 400, 0])])
def test_spacing(spacing, kept, call, tiny, tmp_path):
    words = ("--timesteps", 10, "--cali_st", 3, "--cali_n", 2)
    assert call(SCRIPT, *tiny.options, *words, *spacing, "--out", tmp_path / "a.pt").code == 0
    like = (*tiny.options, *words, "--generate", "raw", "--cali_data_path", tmp_path / "b.pt")
    assert call("sample_diffusion_ddim", *like, *spacing).code == 0
    for name in ("a.pt", "b.pt"):
        assert load_recording(tmp_path / name)["ts"][:, 0].tolist() == kept


@pytest.mark.slow
def test_batches_and_repetition_change_nothing_but_the_seed_does(call, tiny, tmp_path):
    options = (*tiny.options, "--timesteps", 4, "--cali_st", 2, "--cali_n", 5, "--out", tmp_path / "a.pt")
    made = []
    for more in (("--batch_size", 5), ("--batch_size", 5), ("--batch_size", 2), ("--seed", 9)):
        assert call(SCRIPT, *options, *more).code == 0
        made.append(torch.load(tmp_path / "a.pt", weights_only=True)["xs"])
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=0)
    assert float((made[2] - made[0]).abs().max()) < BATCH_TOLERANCE
    assert float((made[3] - made[0]).abs().max()) > BATCH_TOLERANCE  # planted: another seed


@pytest.mark.slow
def test_a_run_records_the_same(call, tiny, tmp_path):
    common = (*tiny.options, "--timesteps", 4, "--seed", 3, "--batch_size", 2, "--cali_st", 2, "--cali_n", 3)
    assert call(SCRIPT, *common, "--out", tmp_path / "a.pt").code == 0
    run = ("--max_images", 1, "--ptq", "--quant_mode", "linear", "-l", tmp_path / "run")
    assert call("sample_diffusion_ddim", *common, *run).code == 0
    there = torch.load(tmp_path / "run" / "calibration_data.pt", weights_only=True)
    here = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(there["xs"], here["xs"]) and torch.equal(there["ts"], here["ts"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--cali_st", 5), "--cali_st 1 to 4"),
        (("--cali_st", 0), "--cali_st 1 to 4"),
        (("--cali_n", 0), "--cali_n"),
        (("--cali_n", -2), "--cali_n"),
        (("--batch_size", 0), "--batch_size"),
        (("--ckpt", "none"), "none does not exist"),
        (("--max_images", 3), "--max_images"),
        (("--out", "/proc/data.pt"), "/proc/data.pt cannot be written"),
    ],
    ids=lambda value: " ".join(str(v) for v in value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence(options, says, call, tiny, tmp_path):
    fixed = ("--timesteps", 4, "--cali_st", 2, "--cali_n", 2, "--out", tmp_path / "new" / "a.pt")
    assert says in call(SCRIPT, *tiny.options, *fixed, *options).error_line()
    assert list(tmp_path.iterdir()) == []


def test_folder_is_no_output_file(call, tiny, tmp_path):
    assert (
        str(tmp_path) in call(SCRIPT, *tiny.options, "--timesteps", 4, "--cali_st", 2, "--out", tmp_path).error_line()
    )
