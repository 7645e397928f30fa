"""One sample of every image at a call of its own, and the features of the network's middle."""

from __future__ import annotations

import pytest
import torch
from golden_cases import DDIM_CASES, LDM_CASES, GoldenCase

from qdiff.calibration.recording import assign, record_assigned, record_calls, record_features
from qdiff.calibration.samples import load_recording, save_recording, select_samples
from qdiff.errors import UserError
from qdiff.interface import family_of
from qdiff.sampling import guided

CALLS, COUNT, SHAPE = 6, 7, (2, 4, 4)
ASSIGNED = torch.tensor([5, 2, 0, 2, 5, 2, 3])
# Relative L2: other batch sizes take other kernels, which sum in another order.
BATCH_TOLERANCE = 1e-5


def sampler(conditional=False, guided=False, calls=CALLS):
    """Every value says of which call and image it is; conditions belong to the image."""

    def sample(on_call, indices):
        numbers = torch.tensor(list(indices), dtype=torch.float32)
        context = numbers[:, None, None].expand(-1, 3, 2) if conditional else None
        nothing = -1 - context if guided else None
        x = torch.empty(len(indices), *SHAPE)
        for call in range(calls):
            x[:] = (numbers + 100 * call)[:, None, None, None]  # samplers may reuse their memory
            on_call(x, 900 - 100 * call + numbers.long(), *([context, nothing] if conditional else []))

    return sample


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
@pytest.mark.parametrize("kind", [(), (True,), (True, True)], ids=["plain", "guidance 1", "guided"])
def test_every_image_gives_exactly_its_call(kind, batch_size):
    finished = []
    made = record_assigned(sampler(*kind), ASSIGNED, batch_size, on_batch=finished.append)
    full = record_calls(sampler(*kind), COUNT, 64, keep=range(CALLS))
    assert set(made) == set(full) == set(("xs", "ts", "cs", "ucs")[: 2 + len(kind)])
    for key, steps in made.items():
        assert [len(step) for step in steps] == [1, 3, 1, 2]  # calls 0, 2, 3, 5
        for step, call in zip(steps, (0, 2, 3, 5), strict=True):
            assert torch.equal(step, full[key][call][call == ASSIGNED]), (key, call)
            assert step.dtype == full[key].dtype and step.device.type == "cpu"
    assert [step[:, 0, 0, 0].tolist() for step in made["xs"]] == [[2], [201, 203, 205], [306], [500, 504]]
    assert sum(finished) == COUNT and len(finished) == -(-COUNT // batch_size)


def test_the_comparison_sees_planted_errors():
    """A neighbour's row or call differs in every kind of value that is compared."""
    full = record_calls(sampler(True, True), COUNT, 64, keep=range(CALLS))
    for key, values in full.items():
        assert not torch.equal(values[2][ASSIGNED == 2], values[2][ASSIGNED == 5][:1].expand_as(values[2][:3])), key
        assert key in ("cs", "ucs") or not torch.equal(values[2], values[3]), key


@pytest.mark.parametrize("assignment", [ASSIGNED, torch.full((COUNT,), CALLS)])
def test_calls_that_are_not_made_are_refused(assignment):
    with pytest.raises(ValueError, match="the sampler does not make it"):
        record_assigned(sampler(calls=3), assignment, 4)
    with pytest.raises(ValueError, match="call 9 is"):
        record_calls(sampler(), COUNT, 4, keep=[0, 9])


@pytest.mark.parametrize("guided", [False, True])
def test_an_assigned_recording_becomes_a_calibration_set(guided, tmp_path):
    save_recording(record_assigned(sampler(True, guided), ASSIGNED, 3), tmp_path / "data.pt")
    data = select_samples(load_recording(tmp_path / "data.pt"), None, None, SHAPE, conditional=True)
    x, t, context = data.inputs
    assert x[:COUNT, 0, 0, 0].tolist() == [2, 201, 203, 205, 306, 500, 504]
    assert t[:COUNT].tolist() == [902, 701, 703, 705, 606, 400, 404]
    assert context[:COUNT, 0, 0].tolist() == [2, 1, 3, 5, 6, 0, 4]
    assert len(data) == len(t) == len(context) == (2 * COUNT if guided else COUNT)
    if guided:
        assert torch.equal(x[COUNT:], x[:COUNT]) and torch.equal(context[COUNT:], -1 - context[:COUNT])


def test_assigning_keeps_the_counts_and_shuffles_the_images():
    counts = torch.tensor([3, 0, 50, 1, 10])
    made = assign(counts, torch.Generator().manual_seed(0))
    assert made.dtype == torch.int64 and torch.equal(made.bincount(minlength=5), counts)
    assert torch.equal(made, assign(counts, torch.Generator().manual_seed(0)))
    assert not torch.equal(made, assign(counts, torch.Generator().manual_seed(1)))
    assert not torch.equal(made, made.sort().values)


def golden_network(name):
    """A tiny network of a released architecture with weights of which none are zero, and inputs for it."""
    case = GoldenCase(name)
    network = case.network()
    network.load_state_dict(case.float_weights())
    return network.eval(), case.inputs


def run(network, inputs, times=3, scale=None):
    """A sampler that goes nowhere: x_t shrinks a little every call, so that the calls can be told apart."""

    def sample(on_call, indices):
        x, t, *context = (value[list(indices)] for value in inputs)
        eps = network
        if context:
            eps = guided(network, context[0], None if scale is None else torch.zeros_like(context[0]), scale or 1.0)
        for i in range(times):
            on_call(x, t)
            eps(x * (1 - 0.1 * i), t)

    return sample


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [*DDIM_CASES, *LDM_CASES])
def test_the_middle_is_the_input_of_the_attention_block(name):
    network, inputs = golden_network(name)
    middle = family_of(network).middle
    attention = {"mid.block_1": "mid.attn_1", "middle_block.0": "middle_block.1"}[middle]
    made = record_features(run(network, inputs), network, middle, range(2))
    assert len(made) == 3
    for i, feature in enumerate(made):
        assert feature.dtype == torch.float32 and feature.shape[0] == 2 and feature.dim() == 4
        state = network.start(inputs[0][:2] * (1 - 0.1 * i), *(value[:2] for value in inputs[1:]))
        for step in network.steps():
            if step.name.startswith(attention):
                break
            step(state)
        else:
            pytest.fail(f"no step of {attention}")
        assert torch.equal(feature, state["h"])
    assert not torch.equal(made[0], made[1])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["imagenet_w4a8_split", "sd_w4a8_sm16_split"])
def test_guidance_doubles_the_features(name, relative):
    network, inputs = golden_network(name)
    middle = family_of(network).middle
    alone = record_features(run(network, inputs), network, middle, range(2))
    doubled = record_features(run(network, inputs, scale=3.0), network, middle, range(2))
    for one, two in zip(alone, doubled, strict=True):
        assert len(one) == 2 and len(two) == 4
        assert relative(two[2:], one) < BATCH_TOLERANCE
        assert relative(two[:2], one) > 100 * BATCH_TOLERANCE, "the unconditional half comes first"


def test_nothing_is_left_behind(tiny_network):
    module = tiny_network.mid.block_1
    inputs = torch.randn(2, 1, 8, 8), torch.arange(2)

    def failing(on_call, indices):
        tiny_network(*inputs)
        raise KeyboardInterrupt

    for sample in (run(tiny_network, inputs), failing):
        try:
            features = record_features(sample, tiny_network, "mid.block_1", range(2))
        except KeyboardInterrupt:
            assert sample is failing
        assert not module._forward_hooks
    assert not any(f.requires_grad for f in features)


def test_features_of_what_never_runs_are_refused(tiny_network):
    with pytest.raises(ValueError, match=r"has no module 'middle_block\.0'"):
        record_features(sampler(), tiny_network, "middle_block.0", range(2))
    with pytest.raises(ValueError, match="did not run"):
        record_features(sampler(), tiny_network, "mid.block_1", range(2))


def ragged():
    """Steps 0, 1, 2 with 1, 3 and 2 samples; every sample carries its (step, number)."""
    xs = [torch.zeros(n, *SHAPE) + 100 * i + torch.arange(n)[:, None, None, None] for i, n in enumerate((1, 3, 2))]
    return {"xs": xs, "ts": [torch.full((len(x),), i) for i, x in enumerate(xs)]}


@pytest.mark.parametrize(
    ("steps", "per_step", "expected"),
    [
        (None, None, [0, 100, 101, 102, 200, 201]),
        (None, 1, [0, 100, 200]),
        (1, None, [0]),
        (2, None, [0, 100, 101, 102]),
        (3, None, [0, 100, 101, 102, 200, 201]),
    ],
)
def test_none_takes_all_that_is_recorded(steps, per_step, expected):
    x, t = select_samples(ragged(), steps, per_step, SHAPE).inputs
    assert x[:, 0, 0, 0].tolist() == expected
    assert t.tolist() == [value // 100 for value in expected]


def test_taking_all_is_checked_like_any_selection():
    for made, match in (
        (ragged() | {"xs": [*ragged()["xs"][:2], torch.zeros(2, 3, 4, 4)]}, "holds samples of shape"),
        (ragged() | {"ts": [*ragged()["ts"][:2], torch.zeros(1)]}, "one timestep per sample"),
        (ragged() | {"cs": [torch.zeros(1, 3, 5)] * 3}, "takes none"),
    ):
        with pytest.raises(UserError, match=match):
            select_samples(made, None, None, SHAPE)
    with pytest.raises(UserError, match="--cali_n 1 or less"):
        select_samples(ragged(), None, 2, SHAPE)
