"""``--layer_bits``: words and files that give single layers their widths."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from qdiff.checkpoint.metadata import FORMAT
from qdiff.cli.options.layer_bits import read_layer_bits
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.config import LayerBits, QuantConfig
from qdiff.errors import UserError
from qdiff.ranges.estimators import RangeMethod


def parsed(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words):
    return resolve_ptq(parsed("--ptq", *words), RangeMethod.MSE, RangeMethod.MSE)


def test_words():
    made = plan("--quant_act", "--layer_bits", "first=A16, last=W8A16,mid.q=w32")
    assert made.quant.layer_bits == (
        ("first", LayerBits(None, 16)),
        ("last", LayerBits(8, 16)),
        ("mid.q", LayerBits(32)),
    )
    assert made.to_dict()["quant"]["layer_bits"] == {"first": "A16", "last": "W8A16", "mid.q": "W32"}
    assert "layer_bits" not in plan("--quant_act").to_dict()["quant"]  # runs from before can be continued


@pytest.mark.parametrize("method", ["linear", "qdiff", "eda-dm", "ptq4dm", "gptq", "modiff"])
def test_every_method_takes_it(method):
    made = plan("--method", method, "--quant_act", "--layer_bits", "conv_in=W8A16")
    assert made.quant.layer_bits == (("conv_in", LayerBits(8, 16)),)


def test_files(tmp_path):
    (tmp_path / "lr=1.yaml").write_text("conv_in: W8A16\nlast: a16\n")
    (tmp_path / "widths.json").write_text(json.dumps({"target_bits": 4, "layer_bits": {"conv_in": "W3"}}))
    assert read_layer_bits(str(tmp_path / "lr=1.yaml")) == {"conv_in": LayerBits(8, 16), "last": LayerBits(None, 16)}
    assert read_layer_bits(str(tmp_path / "widths.json")) == {"conv_in": LayerBits(3)}
    assert len(read_layer_bits(",".join(f"some.layer.of.many.{i}=W3" for i in range(1000)))) == 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("conv_in", "neither a file nor NAME=WIDTHS"),
        ("conv_in=W8,conv_in=W4", "conv_in twice"),
        ("conv_in=W8,", "has '', which is not NAME=WIDTHS"),
        ("=W8", "has '=W8'"),
        ("conv_in=", "has 'conv_in='"),
        ("conv_in=8", "width is '8'; write W8A16"),
        ("conv_in=W0", "width is 0"),
        ("conv_in=A17", "width is 17"),
    ],
)
def test_what_is_wrong_is_one_sentence(text, says):
    with pytest.raises(UserError, match=says) as caught:
        plan("--quant_act", "--layer_bits", text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["conv_in: 8", "layer_bits: [a]", "- conv_in", "conv_in: {w: 8}", "a: [unclosed"])
def test_files_that_hold_no_widths(text, tmp_path):
    (tmp_path / "widths.yaml").write_text(text)
    with pytest.raises(UserError, match=r"widths\.yaml"):
        read_layer_bits(str(tmp_path / "widths.yaml"))


def test_activations_that_are_not_quantized():
    with pytest.raises(
        UserError, match="--layer_bits gives conv_in A16, but activations are not quantized; add --quant_act"
    ):
        plan("--layer_bits", "conv_in=A16")


def test_without_ptq_it_has_no_effect():
    (sentence,) = ignored_options(parsed("--layer_bits", "conv_in=W8"))
    assert "--layer_bits" in sentence


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(layer_bits, act_bits)`` writes the head of a native file."""

    def write(layer_bits, act_bits=8):
        config = QuantConfig(weight_bits=4, act_bits=act_bits, layer_bits=layer_bits)
        metadata = {"format": FORMAT, "config": json.dumps(config.to_dict())}
        save_file({"x": torch.zeros(1)}, tmp_path / "file.safetensors", metadata)
        return tmp_path / "file.safetensors"

    return write


def test_a_calibrated_file_has_its_widths(checkpoint):
    file = checkpoint({"conv_in": "W8A16", "mid.q": "A6"})
    widths = (("conv_in", LayerBits(8, 16)), ("mid.q", LayerBits(None, 6)))
    assert plan("--quant_act", "--cali_ckpt", file).quant.layer_bits == widths
    assert plan("--quant_act", "--method", "grip", "--cali_ckpt", file).quant.layer_bits == widths
    assert plan("--quant_act", "--cali_ckpt", file, "--layer_bits", "none").quant.layer_bits == ()
    assert plan("--cali_ckpt", file).quant.layer_bits == (("conv_in", LayerBits(8)),)  # of weights alone


def test_a_calibrated_file_without_widths_has_none_of_the_methods(checkpoint):
    file = checkpoint({})
    words = ("--quant_act", "--method", "grip", "--cali_ckpt", file)
    assert plan(*words).quant.layer_bits == ()
    ends = (("first", LayerBits(None, 16)), ("last", LayerBits(None, 16)))  # new ranges are by the method's recipe
    assert plan(*words, "--resume_w").quant.layer_bits == ends


def test_a_file_of_weights_leaves_the_inputs_to_the_method(checkpoint):
    file = checkpoint({"first": "W8", "last": "W8", "mid.q": "W3"}, act_bits=None)
    ends = (("first", LayerBits(8, 16)), ("last", LayerBits(8, 16)), ("mid.q", LayerBits(3)))
    assert plan("--quant_act", "--method", "grip", "--resume_w", "--cali_ckpt", file).quant.layer_bits == ends


@pytest.mark.parametrize("name", ["no.safetensors", "text.safetensors", "file.pth"])
def test_what_is_wrong_with_a_file_is_said_where_it_is_loaded(name, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert plan("--quant_act", "--cali_ckpt", tmp_path / name).quant.layer_bits == ()
