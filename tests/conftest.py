"""Shared by all tests: one thread per worker, no network, and the tiny networks that tests run on."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

import pytest

# Before torch is imported, also in the processes that tests start: two workers with two spinning threads each
# on two cores take many times as long. tests/on_every_cpu.py asks for two threads and one worker.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ.get("QDIFF_TEST_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).parents[1]


# Files by the time that they take: two workers end together where what takes longest starts first.
LONGEST = (
    *("test_bundled_networks", "test_cuda_runs", "test_onnx_networks", "test_benchmark", "test_cuda_backward"),
    *("test_quantized_runtimes", "test_latent_processes", "test_processes", "test_reproduce", "test_eda_dm_runs"),
    *("test_compare_runtimes", "test_mutated_files", "test_shipped_tables", "test_export", "test_run_continues"),
    *("test_modiff_scripts", "test_txt2img", "test_runtimes", "test_cuda_faults", "test_onnx_files"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist: by the number of tests, which says nothing of their time


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (rank.get(item.path.stem, len(LONGEST)), "scripts" not in item.path.parts))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the imported modules and collected tests out of garbage collection, which then looks at new objects only.

    They are some million objects that live to the end. What traces or dispatches makes enough new ones for the
    collector to go through all of them every second, which took a third of the time of an ONNX export.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that resolves a host name fails: everything must run without a network."""
    resolve = socket.getaddrinfo

    def local_only(host, *args, **kwargs):
        if host not in (None, "localhost", "127.0.0.1", "::1", socket.gethostname()):
            raise OSError(f"no network in tests (asked for {host})")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plots out of pages: there are 36 per table, and the tests of `qdiff.report` draw them."""
    from qdiff.report import page

    monkeypatch.setattr(page, "metric_plots", lambda rows: [])
    monkeypatch.setattr(page, "activation_plots", lambda rows: {})


@pytest.fixture
def cuda():
    """A virtual GPU, a `virtual_cuda.VirtualDevice`: ``--device cuda`` runs on it."""
    from virtual_cuda import virtual_cuda

    with virtual_cuda() as device:
        yield device


@pytest.fixture
def tiny_config():
    """A DDIM config of 280k parameters that runs in milliseconds: 8×8, 1 channel, attention, up and down."""
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "data": {"dataset": "DIGITS", "image_size": 8, "channels": 1},
            "model": {
                "in_channels": 1,
                "out_ch": 1,
                "ch": 32,
                "ch_mult": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [4],
                "dropout": 0.1,
                "resamp_with_conv": True,
            },
            "diffusion": {
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "beta_end": 0.02,
                "num_diffusion_timesteps": 1000,
            },
        }
    )


@pytest.fixture
def tiny_network(tiny_config):
    """A float network of `tiny_config` with fixed random weights, in eval mode."""
    from ddim.models.diffusion import Model

    torch.manual_seed(0)
    return Model(tiny_config).eval()
