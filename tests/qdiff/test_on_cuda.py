"""Quantized networks on the virtual GPU: everything is on the device, calls never wait, and what a call launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from virtual_cuda.modules import left_behind

from qdiff import QuantConfig, QuantModel, load_checkpoint
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import save_checkpoint
from qdiff.evaluation.noise_error import measure_noise_error
from qdiff.kernels import switch
from qdiff.methods import linear

W4A8 = QuantConfig(weight_bits=4, act_bits=8, split_shortcut=True)
CHANGES = QuantConfig(weight_bits=4, act_bits=4, split_shortcut=True, modulate=True, act_dynamic=True)
# Attention sums in another order there; a value on a rounding edge then falls to the other side.
CLOSE = 0.1  # relative L2; weights of another network give 1.4


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(4, 1, 8, 8), torch.tensor([3, 500, 20, 999])


@pytest.fixture
def on_cpu(tiny_network, inputs, tmp_path):
    """Outputs of a W4A8 network that was calibrated on the CPU, and the folder with its files in both formats."""
    qnn = QuantModel(tiny_network, W4A8)
    linear.calibrate(qnn, CalibrationSet(inputs), None, CalibrationRun(show_progress=False))
    for kind in ("native", "published"):
        save_checkpoint(qnn, tmp_path / kind, format=kind)
    with torch.no_grad(), qnn.quantized():
        return qnn(*inputs), tmp_path


@pytest.fixture
def on_gpu(on_cpu, cuda, tiny_config):
    """``on_gpu(config, kind)``: the network on the device, from a file where one is named."""
    from ddim.models.diffusion import Model

    def made(config=W4A8, kind="native"):
        torch.manual_seed(0)
        qnn = QuantModel(Model(tiny_config).eval().to("cuda"), config)
        if kind is not None:
            load_checkpoint(qnn, on_cpu[1] / kind)
        return qnn

    return made


@pytest.fixture
def given(cuda, inputs):
    return tuple(i.to("cuda") for i in inputs)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu().float() - wanted).norm() / wanted.norm())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["native", "published"])
@pytest.mark.parametrize("packs", [None, False, True])
def test_from_a_file(kind, packs, on_cpu, on_gpu, given, cuda):
    qnn = on_gpu(kind=kind)
    assert left_behind(qnn) == []
    if packs is not None:
        qnn.pack_weights(integer=packs)
    with qnn.quantized(), cuda.counting() as counts:
        found = qnn(*given)
    assert counts.waits == []
    assert distance(found, on_cpu[0]) < CLOSE < distance(found.flip(0), on_cpu[0])


@pytest.mark.slow
@torch.no_grad()
def test_the_error_of_eps(on_gpu, inputs, given):
    """Samples are on the CPU, as they are recorded; so is what is told of them."""
    qnn = on_gpu()
    others, last = (CalibrationSet(tuple(i[rows] for i in inputs)) for rows in (slice(3), slice(3, 4)))
    found = measure_noise_error(qnn, others, batch_size=2, last_call=last)
    wanted = qnn(*given)
    with qnn.quantized():
        by_sample = (qnn(*given) - wanted).square().flatten(1).mean(1).cpu()
    assert found["mse"] == pytest.approx(float(by_sample[:3].mean()), rel=CLOSE)
    assert found["median_step"] == pytest.approx(float(by_sample[:3].median()), rel=CLOSE)
    assert found["last_step"] == pytest.approx(float(by_sample[3]), rel=CLOSE)
    assert (found["samples"], found["last_timestep"]) == (3, 999.0)


@torch.no_grad()
def test_entering_reads_all_flags_at_once(on_gpu, cuda):
    qnn = on_gpu()

    def enter():
        with qnn.quantized():
            pass

    assert len(cuda.counted(enter).waits) <= 1


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("per", ["tensor", "sample", "channel"])
def test_modulation(per, on_gpu, given, cuda):
    qnn, (x, t) = on_gpu(replace(CHANGES, act_scale_per=per)), given
    with qnn.quantized(), qnn.trajectory(), cuda.counting() as counts:
        qnn(x, t)
        found = qnn(x * 0.9, t)
    assert counts.waits == [] and torch.isfinite(found).all()


@pytest.mark.slow
def test_calibration_without_gradients(on_cpu, on_gpu, inputs, given):
    qnn = on_gpu(kind=None)
    linear.calibrate(qnn, CalibrationSet(inputs), None, CalibrationRun(show_progress=False))
    with torch.no_grad(), qnn.quantized():
        assert distance(qnn(*given), on_cpu[0]) < CLOSE


@pytest.mark.slow
@torch.no_grad()
def test_half_precision(on_cpu, on_gpu, given):
    (x, t), qnn = given, on_gpu()
    with torch.autocast("cuda"), qnn.quantized():
        assert distance(qnn(x, t), on_cpu[0]) < CLOSE
    qnn = on_gpu().half()
    assert left_behind(qnn) == []
    with qnn.quantized():
        assert distance(qnn(x.half(), t), on_cpu[0]) < CLOSE


@pytest.mark.slow
@torch.no_grad()
def test_there_and_back(on_cpu, on_gpu, given, inputs):
    qnn = on_gpu()
    qnn.to("cpu")
    with qnn.quantized():
        assert distance(qnn(*inputs), on_cpu[0]) < CLOSE
    qnn.to("cuda")
    with qnn.quantized():
        assert distance(qnn(*given), on_cpu[0]) < CLOSE


# --- Launches


@pytest.mark.slow
@torch.no_grad()
def test_launches_of_a_call(on_gpu, given, cuda):
    """With the fused kernel a W4A8 call launches at most twice what a float call does, and computes the same bits."""
    pytest.importorskip("triton")
    qnn = on_gpu()
    plain = cuda.counted(qnn, *given).launches
    with qnn.quantized():
        composed, expected = cuda.counted(qnn, *given), qnn(*given)
        with switch.fused():
            one_kernel = cuda.counted(qnn, *given)
            assert torch.equal(qnn(*given), expected)
    assert one_kernel.operations["fake_quantize"] == len(qnn.act_quantizers())
    assert one_kernel.launches <= 2 * plain < composed.launches
