"""NaN and infinity are found when a file is read: the sentence names the file and the tensor."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.checkpoint.metadata import read_metadata
from qdiff.errors import UserError
from qdiff.io.tensor_files import check_finite, check_state
from qdiff.kernels.packing import deflate_floats, inflate_floats

BAD = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
W4A8 = {"weight_bits": 4, "act_bits": 8}


@BAD
def test_float_weights(value):
    good = {"a.weight": torch.ones(2, 3), "counter": torch.ones((), dtype=torch.int64)}
    check_state(good, good, "model.ckpt")
    bad = {**good, "b.weight": torch.ones(2).half()}
    bad["b.weight"][1] = value
    with pytest.raises(UserError, match=r"^model.ckpt holds NaN or infinite values, the first in b.weight; "):
        check_state(bad, bad, "model.ckpt")
    with pytest.raises(UserError, match=r"b\.weight"):
        check_finite(bad, "model.ckpt")


@pytest.mark.slow
@BAD
@pytest.mark.parametrize("ending", ["conv_in.weight", "norm_out.bias", "weight_quantizer.alpha", "act_quantizer.delta"])
def test_published_files(value, ending, calibrated, wrap, tmp_path):
    path = tmp_path / "q.pth"
    save_checkpoint(calibrated(**W4A8), path, format="published")
    state = torch.load(path, weights_only=True)
    name = next(n for n in state if n.endswith(ending))
    state[name] = torch.full_like(state[name], value)
    torch.save(state, path)
    with pytest.raises(UserError, match=rf"q\.pth.*{ending}"):
        load_checkpoint(wrap(**W4A8), path)


@BAD
def test_native_files(value, calibrated, wrap, tmp_path):
    path = tmp_path / "q.safetensors"
    save_checkpoint(calibrated(**W4A8), path)
    tensors, metadata = load_file(path), read_metadata(path)
    qnn = wrap(**W4A8)
    count = sum(p.numel() for n, p in qnn.named_parameters() if "act_quantizer" not in n)
    weights = sum(layer.weight.numel() for layer in qnn.layers().values())
    floats = inflate_floats(tensors["float"], count - weights)
    floats[:] = value
    save_file({**tensors, "float": deflate_floats(floats)}, path, metadata=metadata)
    with pytest.raises(UserError, match=r"q\.safetensors"):
        load_checkpoint(qnn, path)
