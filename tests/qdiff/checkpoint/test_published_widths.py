"""Published files do not store the widths of activations: what they show of them, and what it costs to look."""

from __future__ import annotations

import pytest
import torch
from golden_cases import ALL_CASES, GoldenCase
from omegaconf import OmegaConf
from thorough import thorough_except

from qdiff.checkpoint import load_checkpoint, published_widths, save_checkpoint
from qdiff.errors import UserError

pytestmark = pytest.mark.slow

ACTIVE_CASES = tuple(name for name in ALL_CASES if GoldenCase(name).options["act_bits"] is not None)
# The share of ε that a wrong width costs, and that a right one may cost, in the squared norm.
BAD, GOOD = 0.05, 0.02


@pytest.fixture
def tiny_config(tiny_config):
    """Two channels a norm group: with one, the norm takes out what the time embedding adds."""
    return OmegaConf.merge(tiny_config, {"model": {"ch": 64}})


def noise(*shapes, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x, *context = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    return x, torch.full((2,), 500), *context


def tiny_probe():
    return noise((1, 8, 8))


def probe_of(case):
    x, _, *context = case.inputs
    return lambda: noise(x.shape[1:], *(c.shape[1:] for c in context))


@torch.no_grad()
def share(qnn, given):
    """How much of ε activations alone cost."""
    wanted = qnn(*given)
    with qnn.quantized(weights=False):
        return float((qnn(*given) - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("name", ACTIVE_CASES)
def test_right_files_of_the_papers_code_load(name):
    case = GoldenCase(name)
    load_checkpoint(case.wrapped(), case.path, probe=probe_of(case))


@pytest.mark.parametrize(
    ("name", "changes", "option"),
    [
        ("ddim_w4a8_split", {"act_bits": 6}, "--act_bit"),
        ("ddim_w4a8_split", {"act_bits": 7}, "--act_bit"),
        ("ddim_w4a8_split", {"act_bits": 16}, "--act_bit"),
        pytest.param("bedroom_w4a8", {"act_bits": 4}, "--act_bit", marks=pytest.mark.thorough),
        pytest.param("church_w8a8", {"act_bits": 16}, "--act_bit", marks=pytest.mark.thorough),
        pytest.param("wide_imagenet_w4a8_split", {"act_bits": 10}, "--act_bit", marks=pytest.mark.thorough),
        ("sd_w4a8_sm16_split", {"softmax_bits": 8}, "--sm_abit"),
        pytest.param("wide_sd_w8a8_sym", {"softmax_bits": 4}, "--sm_abit", marks=pytest.mark.thorough),
        pytest.param("wide_sd_w8a8_sym", {"act_bits": 6, "softmax_bits": 4}, "--act_bit", marks=pytest.mark.thorough),
    ],
)
def test_other_widths_are_refused_by_the_error_of_eps(name, changes, option):
    case = GoldenCase(name)
    qnn = case.wrapped(**changes)
    load_checkpoint(qnn, case.path)  # the step sizes alone say nothing …
    cost = share(qnn, probe_of(case)())
    assert cost > BAD or changes.get("act_bits", 0) > 8
    with pytest.raises(UserError, match=rf"about (7|8|16) bits for .*change {option}$") as caught:
        load_checkpoint(case.wrapped(**changes), case.path, probe=probe_of(case))
    assert str(case.path) in str(caught.value) and "\n" not in str(caught.value)
    right = case.wrapped()
    load_checkpoint(right, case.path)
    assert share(right, probe_of(case)()) < GOOD


@pytest.mark.parametrize("name", [n for n in ACTIVE_CASES if "sm16" not in n])
def test_softmax_steps_too_wide_for_their_width_are_refused_unprobed(name):
    """Both signed ones (DDIM, transformer blocks) and unsigned ones; nothing is run for it."""
    case = GoldenCase(name)
    with pytest.raises(UserError, match=r"act_quantizer_w has steps of at most \d+ bits .*, not 16; change --sm_abit"):
        load_checkpoint(case.wrapped(softmax_bits=16), case.path)


RIGHT = [(4, 4, False, "max"), (4, 4, True, "mse"), (4, 6, False, "max"), (4, 8, True, "max"), (8, 8, False, "max")]


@pytest.mark.parametrize("right", thorough_except(RIGHT, RIGHT[1], RIGHT[4]), ids=str)
def test_our_files_load_under_their_widths_alone(right, calibrated, wrap, tmp_path):
    weight_bits, bits, symmetric, act_range = right
    config = {
        "weight_bits": weight_bits,
        "act_bits": bits,
        "act_symmetric": symmetric,
        "act_range": act_range,
        "softmax_bits": 8 if symmetric else 16,
    }
    save_checkpoint(calibrated(**config), tmp_path / "q.pth", format="published")
    load_checkpoint(wrap(**config), tmp_path / "q.pth", probe=tiny_probe)
    for other in {4, 6, 8, 16} - {bits}:
        with pytest.raises(UserError, match="change --act_bit"):
            load_checkpoint(wrap(**{**config, "act_bits": other}), tmp_path / "q.pth", probe=tiny_probe)


def test_symmetric_files_of_eda_dm_load(calibrated, wrap, tmp_path):
    """Their search puts all levels on one side of 0 where the data are: such quantizers have z ≠ 0 in the file."""
    config = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "act_range": "search"}
    made, loaded = calibrated(**config), wrap(**config)
    save_checkpoint(made, tmp_path / "q.pth", format="published")
    load_checkpoint(loaded, tmp_path / "q.pth", probe=tiny_probe)
    middles = [float(q.zero_point) == 2**7 for q in made.act_quantizers().values() if not q.unsigned]
    assert any(middles) and not all(middles)
    for name, quantizer in loaded.act_quantizers().items():
        if not quantizer.unsigned:  # softmax outputs become signed there, with twice the step size
            assert torch.equal(quantizer.zero_point, made.act_quantizers()[name].zero_point)


def test_both_widths_are_looked_at_apart(calibrated, wrap, tmp_path):
    config = {"weight_bits": 4, "act_bits": 8, "softmax_bits": 16}
    save_checkpoint(calibrated(**config), tmp_path / "q.pth", format="published")
    with pytest.raises(UserError, match="change --sm_abit"):
        load_checkpoint(wrap(**{**config, "softmax_bits": 8}), tmp_path / "q.pth", probe=tiny_probe)


class Counted:
    def __init__(self, qnn):
        self.calls = 0
        qnn.model.register_forward_hook(self)

    def __call__(self, *_):
        self.calls += 1


def test_looking_costs_few_calls_and_leaves_no_trace(calibrated, wrap, held_out, run_quantized, tmp_path):
    source, path = calibrated(weight_bits=4, act_bits=8, act_symmetric=True), tmp_path / "q.pth"
    save_checkpoint(source, path, format="published")
    config = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True}
    looked, unseen = wrap(**config), wrap(**config)
    counted = Counted(looked)
    load_checkpoint(looked, path, probe=tiny_probe)
    load_checkpoint(unseen, path)
    assert counted.calls == 1
    assert set(looked.silent_quantizers()) == set(looked.act_quantizers())  # what never fires is still found
    assert torch.equal(run_quantized(looked, held_out), run_quantized(unseen, held_out))
    wrong = wrap(**{**config, "act_bits": 6})
    counted = Counted(wrong)
    with pytest.raises(UserError):
        load_checkpoint(wrong, path, probe=tiny_probe)
    assert counted.calls <= 4
    assert {(q.bits, int(q.zero_point)) for q in wrong.act_quantizers().values() if not q.unsigned} == {(6, 32)}
    assert all(q.observer is None for q in wrong.act_quantizers().values())


def test_nothing_is_run_where_there_is_nothing_to_find(calibrated, wrap, tmp_path):
    def probe():
        raise AssertionError("probed")

    config = {"weight_bits": 4, "act_bits": 8}
    save_checkpoint(calibrated(**config), tmp_path / "q.pth", format="published")
    save_checkpoint(calibrated(**config), tmp_path / "q")
    load_checkpoint(wrap(**config), tmp_path / "q", probe=probe)  # a native file stores its widths
    load_checkpoint(wrap(**config), tmp_path / "q.pth", activations=False, probe=probe)
    load_checkpoint(wrap(weight_bits=4, act_bits=6, act_dynamic=True), tmp_path / "q.pth", probe=probe)
    load_checkpoint(wrap(weight_bits=4, act_bits=6, act_dynamic=True, modulate=True), tmp_path / "q.pth", probe=probe)
    load_checkpoint(wrap(weight_bits=4), tmp_path / "q.pth", probe=tiny_probe)
    with pytest.raises(AssertionError, match="probed"):
        load_checkpoint(wrap(**config), tmp_path / "q.pth", probe=probe)


def test_planted_without_the_error_of_eps_it_loads(calibrated, wrap, monkeypatch, tmp_path):
    save_checkpoint(calibrated(weight_bits=4, act_bits=8, act_symmetric=True), tmp_path / "q.pth", format="published")
    monkeypatch.setattr(published_widths, "HARMFUL", 1e9)
    qnn = wrap(weight_bits=4, act_bits=6, act_symmetric=True)
    load_checkpoint(qnn, tmp_path / "q.pth", probe=tiny_probe)
    assert share(qnn, tiny_probe()) > BAD
