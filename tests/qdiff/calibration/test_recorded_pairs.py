"""Recordings with the step before each sample: what is taken from them, and what the network was fed at every call."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.recording import record_calls
from qdiff.calibration.samples import load_recording, network_calls, save_recording, select_pairs, select_samples
from qdiff.errors import UserError
from qdiff.sampling import guided

SHAPE = (2, 4, 4)
STEPS, COUNT = 10, 6


def recording(conditional=False, guided=True):
    """Every sample carries its (step, number) in its values; the step before is half a step away."""
    xs = torch.zeros(STEPS, COUNT, *SHAPE)
    xs += torch.arange(STEPS)[:, None, None, None, None] * 100 + torch.arange(COUNT)[None, :, None, None, None]
    ts = torch.arange(STEPS)[:, None].expand(STEPS, COUNT).clone()
    made = {"xs": xs, "ts": ts, "xs_prev": xs - 50, "ts_prev": ts + 0.5}
    if conditional:
        made["cs"] = torch.ones(STEPS, COUNT, 3, 5) * torch.arange(COUNT)[:, None, None]
        if guided:
            made["ucs"] = -torch.ones(STEPS, COUNT, 3, 5)
    return made


def test_a_pair_is_the_step_before_and_the_step():
    chosen = select_pairs(recording(), steps=3, per_step=2, image_shape=SHAPE)
    x, t = chosen.inputs
    assert len(chosen) == 6 and x.shape == (6, 2, *SHAPE) and t.shape == (6, 2)
    assert x[:, 1, 0, 0, 0].tolist() == [0, 1, 300, 301, 600, 601]
    assert x[:, 0, 0, 0, 0].tolist() == [-50, -49, 250, 251, 550, 551]
    assert t.tolist() == [[0.5, 0]] * 2 + [[3.5, 3]] * 2 + [[6.5, 6]] * 2
    plain = select_samples(recording(), 3, 2, SHAPE)
    assert all(
        torch.equal(pair[:, 1].float(), now.float()) for pair, now in zip(chosen.inputs, plain.inputs, strict=True)
    )


@pytest.mark.parametrize("halves", [1, 2])
def test_both_steps_of_a_pair_have_its_condition(halves):
    made = recording(conditional=True, guided=halves == 2)
    x, t, context = select_pairs(made, 2, 3, SHAPE, conditional=True).inputs
    assert x.shape[:2] == t.shape == context.shape[:2] == (6 * halves, 2)
    assert torch.equal(context[:, 0], context[:, 1]) and context[:6, 0, 0, 0].tolist() == [0, 1, 2] * 2
    if halves == 2:
        assert bool((context[6:] == -1).all()) and torch.equal(x[:6], x[6:]) and torch.equal(t[:6], t[6:])


@pytest.mark.parametrize("missing", [("xs_prev", "ts_prev"), ("xs_prev",), ("ts_prev",)])
def test_a_recording_without_the_steps_before(missing):
    made = {key: values for key, values in recording().items() if key not in missing}
    with pytest.raises(UserError, match="--generate residual") as caught:
        select_pairs(made, 2, 2, SHAPE, source="some.pt")
    assert "some.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert len(select_samples(made, 2, 2, SHAPE)) == 4  # it does for anything else


@pytest.mark.parametrize(
    ("key", "damage", "per_step", "says"),
    [
        ("xs_prev", lambda v: v[:, :, :1], 3, r"shape \(1, 4, 4\) but the network takes \(2, 4, 4\)"),
        ("xs_prev", lambda v: v[:, :2], 3, "one timestep per sample|3 is more than the 2 samples"),
        ("ts_prev", lambda v: v[:, :2], 3, "one timestep per sample"),
        ("ts_prev", lambda v: v[..., None], 3, "one timestep per sample"),
        ("both", lambda v: v[:, :2], 3, "3 is more than the 2 samples"),
        ("both", lambda v: v[:, :2], None, "one previous step per sample"),
    ],
)
def test_steps_before_of_another_shape(key, damage, per_step, says):
    keys = ("xs_prev", "ts_prev") if key == "both" else (key,)
    with pytest.raises(UserError, match=says):
        select_pairs({**recording(), **{k: damage(recording()[k]) for k in keys}}, 2, per_step, SHAPE)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 11}, "--cali_st 10 or less"),
        ({"per_step": 7}, "--cali_n 6 or less"),
        ({"image_shape": (3, 4, 4)}, r"takes \(3, 4, 4\)"),
        ({"conditional": True}, "no conditions"),
    ],
)
def test_impossible_selections_name_the_option(arguments, match):
    with pytest.raises(UserError, match=match):
        select_pairs(recording(), **{"steps": 2, "per_step": 2, "image_shape": SHAPE, **arguments})


def test_as_many_steps_before_as_steps(tmp_path):
    save_recording({**recording(), "xs_prev": recording()["xs_prev"][:9]}, tmp_path / "data.pt")
    with pytest.raises(UserError, match="10 steps of xs, 9 of xs_prev"):
        load_recording(tmp_path / "data.pt")
    save_recording(recording(conditional=True), tmp_path / "data.pt")
    loaded = load_recording(tmp_path / "data.pt")
    assert all(torch.equal(loaded[key], values) for key, values in recording(conditional=True).items())


# --- What the network was fed


@pytest.mark.parametrize("kind", ["unconditional", "conditional", "guided"])
def test_calls_are_what_the_network_was_fed(kind):
    """By the guidance that samples: the unconditional half first."""
    fed = []
    condition = None if kind == "unconditional" else torch.arange(3.0)[:, None, None].expand(3, 2, 5)
    unconditional = -torch.ones(3, 2, 5) if kind == "guided" else None
    eps = guided(lambda *inputs: fed.append(inputs) or inputs[0], condition, unconditional, 2.0)

    def sample(on_call, indices):
        for call in range(4):
            x = torch.randn(len(indices), *SHAPE, generator=torch.Generator().manual_seed(call))
            t = torch.full((len(indices),), 900.0 - 100 * call)
            on_call(x, t, condition, unconditional)
            eps(x, t)

    calls = network_calls(record_calls(sample, 3, 3, keep=range(4)))
    assert len(calls) == len(fed) == 4
    for call, wanted in zip(calls, fed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(call, wanted, strict=True))
    if kind == "guided":
        assert bool((calls[0][2][:3] == -1).all()) and torch.equal(calls[0][0][:3], calls[0][0][3:])
