"""One set of options for all samplers: image i is the same however it is batched, and calls are counted right."""

from __future__ import annotations

import pytest
import torch

from ddim.config import load_config
from ddim.models.diffusion import Model
from ddim.pipeline import ddim_sampler
from qdiff.errors import UserError
from qdiff.sampling import SamplerOptions

OPTIONS = {
    "ddim": SamplerOptions(steps=3),
    "ddim quad": SamplerOptions(steps=5, spacing="quad"),
    "ddim stochastic": SamplerOptions(steps=4, eta=1.0),
    "ddpm": SamplerOptions("ddpm_noisy", steps=4),
    "plms": SamplerOptions("plms", steps=4),
    "dpm 1": SamplerOptions("dpm_solver", steps=4, order=1),
    "dpm 2 multistep": SamplerOptions("dpm_solver", steps=5, order=2),
    "dpm 3 multistep": SamplerOptions("dpm_solver", steps=5, order=3),
    "dpm 2 singlestep": SamplerOptions("dpm_solver", steps=5, order=2, method="singlestep"),
    "dpm 3 singlestep": SamplerOptions("dpm_solver", steps=7, order=3, method="singlestep"),
}

# Relative L2: a convolution may sum in another order for another batch size, which sampling amplifies a little.
BATCH_TOLERANCE = 1e-5


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def relative_error(out, expected):
    return float((out - expected).norm() / expected.norm())


@torch.no_grad()
def test_image_does_not_depend_on_its_batch(options, tiny_config, tiny_network):
    sampler = ddim_sampler(tiny_config, options, 7)
    together = sampler(tiny_network, range(5))
    assert together.shape == (5, 1, 8, 8)
    for batch in ([0], [1, 2], [4, 0, 3]):
        assert relative_error(sampler(tiny_network, batch), together[batch]) < BATCH_TOLERANCE
    # Planted: the image of another number, of another seed.
    assert relative_error(sampler(tiny_network, [1]), together[[0]]) > BATCH_TOLERANCE
    other = ddim_sampler(tiny_config, options, 8)
    assert relative_error(other(tiny_network, [0]), together[[0]]) > BATCH_TOLERANCE


@torch.no_grad()
def test_calls_are_counted_right(options, tiny_config):
    times = []

    def eps(x, t):
        times.append(float(t[0]))
        return 0.1 * x

    sampler = ddim_sampler(tiny_config, options, 7)
    sampler(eps, [0, 1])
    assert sampler.calls == len(times)
    assert times[0] == max(times)


@torch.no_grad()
def test_calibration_images_are_not_among_the_run_s(options, tiny_config, tiny_network):
    sampler = ddim_sampler(tiny_config, options, 7)
    run, calibration = sampler(tiny_network, range(4)), sampler(tiny_network, range(4), calibration=True)
    distances = torch.cdist(run.flatten(1), calibration.flatten(1))
    assert float(distances.min() / run.flatten(1).norm(dim=1).max()) > BATCH_TOLERANCE
    assert relative_error(sampler(tiny_network, range(4), calibration=True), calibration) == 0


@torch.no_grad()
def test_eta_adds_noise(tiny_config, tiny_network):
    made = [
        ddim_sampler(tiny_config, SamplerOptions(steps=4, eta=eta), 7)(tiny_network, [0]) for eta in (0.0, 0.5, 1.0)
    ]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


@torch.no_grad()
def test_every_step_is_reported(options, tiny_config, tiny_network):
    seen = []
    sampler = ddim_sampler(tiny_config, options, 7)
    sampler(tiny_network, [0, 1], on_step=lambda i, t, x, x0: seen.append((i, x.shape, x0.shape)))
    assert [i for i, *_ in seen] == list(range(len(seen))) and 0 < len(seen) <= sampler.calls
    assert all(shapes == [(2, 1, 8, 8)] * 2 for _, *shapes in seen)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SamplerOptions(steps=0), "1 to 1000"),
        (SamplerOptions(steps=1001), "1 to 1000"),
        (SamplerOptions(spacing="cubic"), "cubic"),
        (SamplerOptions(eta=-0.1), "eta is"),
        (SamplerOptions(eta=1.1), "eta is"),
        (SamplerOptions(eta=float("nan")), "eta is"),
        (SamplerOptions("ddpm_noisy", eta=0.5), "DDPM with the larger variance has no eta"),
        (SamplerOptions("dpm_solver", eta=0.5), "eta is"),
        (SamplerOptions("dpm_solver", steps=0), "1 to 1000"),
    ],
    ids=str,
)
def test_bad_options_are_refused_at_construction(options, says, tiny_config):
    with pytest.raises(UserError) as caught:
        ddim_sampler(tiny_config, options, 0)
    assert says in str(caught.value)


def test_shape_comes_from_the_config(tmp_path, tiny_config):
    from omegaconf import OmegaConf

    tiny_config.data.channels = tiny_config.model.in_channels = tiny_config.model.out_ch = 3
    tiny_config.data.image_size = 16
    OmegaConf.save(tiny_config, tmp_path / "c.yml")
    config = load_config(tmp_path / "c.yml")
    sampler = ddim_sampler(config, SamplerOptions(steps=1), 0)
    assert sampler.shape == (3, 16, 16)
    with torch.no_grad():
        assert sampler(Model(config).eval(), [5]).shape == (1, 3, 16, 16)
