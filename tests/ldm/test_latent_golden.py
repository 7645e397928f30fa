"""The latent UNet in float32 gives the published code's outputs where activations are in float; files survive.

With quantized activations `tests/qdiff/checkpoint/test_published_outputs.py` compares, in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from golden_cases import FLOAT_TOLERANCE, LDM_CASES, GoldenCase

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.errors import UserError
from qdiff.io.tensor_files import load_tensors

ALL = pytest.mark.parametrize("name", LDM_CASES)


@pytest.fixture(scope="module")
def loaded():
    """``loaded(name)``: the case and its network, filled from the published file (not to be changed)."""
    made = {}

    def load(name):
        if name not in made:
            golden = GoldenCase(name)
            qnn = golden.wrapped()
            load_checkpoint(qnn, golden.path)
            made[name] = golden, qnn
        return made[name]

    return load


@torch.no_grad()
def output(qnn, golden, weights=True, activations=True):
    with qnn.quantized(weights=weights, activations=activations):
        return qnn(*golden.inputs)


def attentions(network):
    return [m for m in network.modules() if type(m).__name__ in ("AttentionBlock", "CrossAttention")]


# What each float case must notice.
FLOAT_ERRORS = {
    "norm epsilon": lambda n: [
        setattr(m, "eps", 1e-5 if m.eps == 1e-6 else 1e-6) for m in n.modules() if isinstance(m, torch.nn.GroupNorm)
    ],
    "one attention of another head count": lambda n: setattr(attentions(n)[0], "heads", attentions(n)[0].heads * 2),
    "one bias": lambda n: n.output_blocks[0][0].emb_layers[1].bias.data.add_(1.0),
    "no embedding": lambda n: n.time_embed[2].weight.data.zero_(),
}


@pytest.mark.slow
@ALL
@torch.no_grad()
def test_float_weights_of_a_published_file(name, relative):
    golden = GoldenCase(name)
    network = golden.network().eval()
    network.load_state_dict(golden.float_weights(), strict=True)
    assert relative(network(*golden.inputs), golden.values["fp"]) < FLOAT_TOLERANCE
    noticed = {}
    for error, plant in FLOAT_ERRORS.items():
        wrong = copy.deepcopy(network)
        plant(wrong)
        noticed[error] = relative(wrong(*golden.inputs), golden.values["fp"]) > FLOAT_TOLERANCE
    # With one channel a norm group, the norm takes out what the embedding adds; church scales and shifts with it.
    deaf = set() if name == "church_w8a8" else {"one bias", "no embedding"}
    assert {error for error, was in noticed.items() if not was} == deaf


@pytest.mark.slow
@ALL
def test_wrapped_float_output(name, loaded, relative):
    golden, qnn = loaded(name)
    assert relative(qnn(*golden.inputs), golden.values["fp"]) < FLOAT_TOLERANCE


@ALL
def test_weights_alone(name, loaded, relative):
    golden, qnn = loaded(name)
    expected = golden.values["resumed_weight_only"]
    assert relative(output(qnn, golden, activations=False), expected) < FLOAT_TOLERANCE
    assert relative(golden.values["fp"], expected) > FLOAT_TOLERANCE
    wrong = copy.deepcopy(qnn)
    next(iter(wrong.layers().values())).weight_int[0].add_(1)
    last = list(wrong.layers().values())[-1]
    last.weight_quantizers[0].delta.data.mul_(1.01)
    assert relative(output(wrong, golden, activations=False), expected) > FLOAT_TOLERANCE


@ALL
def test_every_quantizer_fires(name, loaded):
    golden, qnn = loaded(name)
    qnn.reset_fired()
    output(qnn, golden)
    assert qnn.silent_quantizers() == []


@pytest.mark.slow
@ALL
def test_published_keys_and_outputs_survive_saving(name, loaded, tmp_path):
    golden, source = loaded(name)
    save_checkpoint(source, tmp_path / "q.pth", format="published")
    ours, theirs = load_tensors(tmp_path / "q.pth"), load_tensors(golden.path)
    assert {k: v.numel() for k, v in ours.items()} == {k: v.numel() for k, v in theirs.items()}
    for format in ("published", "native"):
        target = golden.wrapped()
        save_checkpoint(source, tmp_path / "again", format=format)
        load_checkpoint(target, tmp_path / "again")
        assert torch.equal(output(target, golden), output(source, golden))


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("bedroom_w4a8", {"split_shortcut": True}, "leave --split out"),
        ("bedroom_w4a8", {"act_symmetric": False}, "add --a_sym"),
        ("church_w8a8", {"act_symmetric": True}, "leave --a_sym out"),
        ("church_w8a8", {"weight_bits": 4}, "--weight_bit"),
        ("imagenet_w4a8_split", {"split_shortcut": False}, "add --split"),
    ],
)
def test_misfits_name_the_option(name, changes, match):
    golden = GoldenCase(name)
    with pytest.raises(UserError, match=match):
        load_checkpoint(golden.wrapped(**changes), golden.path)


def test_a_file_of_another_family_is_refused():
    with pytest.raises(UserError, match="another network"):
        load_checkpoint(GoldenCase("church_w8a8").wrapped(act_bits=None), GoldenCase("ddim_w8_nosplit").path)
