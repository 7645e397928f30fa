"""A quantized network is a module like any other: pickled, copied, called by keyword, asked for its attributes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
KINDS = ("simulated", "released", "packed", "integer")


@torch.no_grad()
def output(qnn, given):
    with qnn.quantized():
        return qnn(*given)


def pickled(qnn):
    return pickle.loads(pickle.dumps(qnn))


def saved(qnn):
    file = io.BytesIO()
    torch.save(qnn, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def made(calibrated):
    def of(kind):
        qnn = calibrated(**W4A8)
        if kind == "released":
            qnn.release_float_weights()
        elif kind != "simulated":
            qnn.pack_weights(1 << 20, integer=kind == "integer")
        return qnn

    return of


@pytest.mark.slow
@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_are_their_own(kind, copied, made, held_out):
    qnn = made(kind)
    expected = output(qnn, held_out)
    other = copied(qnn)
    assert torch.equal(output(other, held_out), expected)
    list(other.act_quantizers().values())[-1].delta.data.mul_(2)
    assert torch.equal(output(qnn, held_out), expected)
    assert not torch.equal(output(other, held_out), expected)


def test_attributes_of_the_network_pass_through(made):
    qnn = made("simulated")
    qnn.model.in_channels = 1
    assert qnn.in_channels == 1 and qnn.num_levels == qnn.model.num_levels
    assert qnn.dtype == torch.float32 and copy.deepcopy(qnn).double().dtype == torch.float64
    assert not hasattr(qnn, "nobody_has_this")
    with pytest.raises(AttributeError, match="nobody_has_this"):
        qnn.nobody_has_this  # noqa: B018


def test_names_of_both_are_the_wrapper_s(made):
    """``config`` is what it was quantized by; the network's own is reached by ``model``, in copies too."""
    qnn = made("simulated")
    qnn.model.config, qnn.model.device, qnn.model.sample_size = {"sample_size": 8}, "nowhere", 8
    assert qnn.config.weight_bits == 4 and qnn.device == torch.device("cpu") and qnn.sample_size == 8
    for other in (qnn, copy.deepcopy(qnn), pickled(qnn)):
        assert other.model.config == {"sample_size": 8} and other.config == qnn.config


def test_methods_and_properties_of_the_network_pass_through(made):
    qnn = made("simulated")
    qnn.model.register_buffer("sigmas", torch.ones(3))
    assert qnn.sigmas is qnn.model.sigmas and qnn.steps == qnn.model.steps
    assert "sigmas" not in dict(qnn.named_buffers())  # it is the network's: "model.sigmas"


@torch.no_grad()
def test_keywords_pass_through(made, held_out):
    qnn = made("simulated")
    x, t = held_out
    given = {}
    forward = qnn.model.forward
    qnn.model.forward = lambda x, t, **keywords: given.update(keywords) or forward(x, t)
    qnn(x, t=t, y="class")
    assert given == {"y": "class"}


def test_submodules_are_attributes_of_the_package():
    import qdiff

    assert qdiff.quant_model.QuantModel is qdiff.QuantModel
    with pytest.raises(AttributeError, match="nobody"):
        qdiff.nobody  # noqa: B018
