"""The file of a noise correction: every bit comes back, and it serves only what it was collected for."""

from __future__ import annotations

import json

import pytest
import torch

from qdiff.calibration.correction_file import check_use, describe_use, read_correction, write_correction
from qdiff.calibration.noise_pairs import NoisePairs
from qdiff.calibration.noise_regression import Kind, Per, fit_correction
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule

SCHEDULE = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 0.02, 1000))
SAMPLER = Sampler(SCHEDULE, (1, 4, 4), SamplerOptions("ddim", 4, eta=0.5), seed=5)


def fitted_to(times, channels=1):
    torch.manual_seed(0)
    maps = [[torch.randn(2, channels, 4, 4) for _ in times] for _ in range(2)]
    return fit_correction(Kind.D2, Per.CHANNEL, NoisePairs(tuple(times), *maps))


@pytest.fixture
def written(tmp_path):
    fitted, use = fitted_to(SAMPLER.visited()), describe_use(SAMPLER, QuantConfig(2), "abc", "float32")
    write_correction(tmp_path / "c.json", fitted, use, {"kind": "d2", "samples": 3})
    return tmp_path / "c.json", fitted, use


def test_a_file_is_what_was_written(written):
    path, fitted, use = written
    found, held, origin = read_correction(path)
    assert found.times == fitted.times and origin == {"kind": "d2", "samples": 3}
    for name in ("scale", "shift", "error_std"):
        assert torch.equal(getattr(found, name), getattr(fitted, name)), "every bit"
    check_use(path, found, held, use, SAMPLER)
    assert sorted(p.name for p in path.parent.iterdir()) == ["c.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.update(format="other"), "its format is not"),
        (lambda held: held.pop("shift"), "'shift'"),
        (lambda held: held["shift"].pop(), "shift of shape"),
        (lambda held: held["scale"].__setitem__(0, [float("nan")]), "scale that is not finite"),
        (lambda held: held["error_std"].__setitem__(0, [-1.0]), "error_std that is negative"),
        (lambda held: held.update(scale="text"), "damaged"),
        (lambda held: held.update({"for": 3}), "damaged"),
    ],
)
def test_damaged_files(change, message, written):
    path, _, _ = written
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match=message):
        read_correction(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "null", '{"format": 3}', "\x00"])
def test_other_files(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match="is not a noise correction"):
        read_correction(tmp_path / "c.json")
    with pytest.raises(UserError, match="does not exist"):
        read_correction(tmp_path / "none.json")


def test_it_is_for_what_it_was_collected_with(written):
    path, fitted, use = written
    for name, value in (
        ("eta", 0.0),
        ("steps", 5),
        ("scale", 2.0),
        ("sampler", "plms"),
        ("weight_bits", 4),
        ("precision", "float16"),
    ):
        with pytest.raises(UserError, match=f"with {name} .*, not {value}"):
            check_use(path, fitted, use, {**use, name: value}, SAMPLER)
    with pytest.raises(UserError, match="for another quantized checkpoint"):
        check_use(path, fitted, use, {**use, "checkpoint": "other"}, SAMPLER)
    # Entries that were cut out of an otherwise fitting file, or are too many.
    times = SAMPLER.visited()
    with pytest.raises(UserError, match="has no entry for timestep 250"):
        check_use(path, fitted_to([*times[:2], times[3]]), use, use, SAMPLER)
    with pytest.raises(UserError, match="has 5 entries for 4 network calls"):
        check_use(path, fitted_to([*times, 0.0]), use, use, SAMPLER)
    with pytest.raises(UserError, match="is for 3 channels, not 1"):
        check_use(path, fitted_to(times, channels=3), use, use, SAMPLER)


def test_how_ranges_were_chosen_does_not_matter():
    chosen = [QuantConfig(4, act_range=kind) for kind in ("max", "mse")]
    assert describe_use(SAMPLER, chosen[0], "", "float32") == describe_use(SAMPLER, chosen[1], "", "float32")


def test_widths_of_layers_matter_whoever_chose_them(written):
    path, fitted, _ = written
    chosen = QuantConfig(2, layer_bits={"conv_in": "W8", "conv_out": "W3"})
    use, uniform = (
        describe_use(SAMPLER, chosen, "abc", "float32"),
        describe_use(SAMPLER, QuantConfig(2), "abc", "float32"),
    )
    check_use(path, fitted, json.loads(json.dumps(use)), use, SAMPLER)
    for found, wanted in ((use, uniform), (uniform, use)):
        with pytest.raises(UserError, match=r"was collected with layer_widths \{.*\}, not \{"):
            check_use(path, fitted, found, wanted, SAMPLER)


def test_an_older_file_says_only_which_widths_were_given(written):
    """Those that were chosen are missing in it; its checkpoint has them."""
    path, fitted, _ = written
    use = describe_use(SAMPLER, QuantConfig(2, layer_bits={"conv_in": "W8", "conv_out": "W3"}), "abc", "float32")
    older = {name: value for name, value in use.items() if name != "layer_widths"}
    for given in ({}, {"layer_bits": {"conv_in": "W8"}}):
        check_use(path, fitted, {**older, **given}, use, SAMPLER)
        with pytest.raises(UserError, match="for another quantized checkpoint"):
            check_use(path, fitted, {**older, **given}, {**use, "checkpoint": "other"}, SAMPLER)


def test_an_older_file_does_not_say_its_precision(written):
    path, fitted, use = written
    older = {name: value for name, value in use.items() if name != "precision"}
    for precision in ("float16", "float32"):
        check_use(path, fitted, older, {**use, "precision": precision}, SAMPLER)
