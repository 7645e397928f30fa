"""First stages: codebook and normal distribution against their formulas, shapes, and what training sees of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.models.autoencoder import DiagonalGaussian, VectorQuantizer
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.util import instantiate_from_config

# Relative, of float32 values computed in another order.
SAME_TOLERANCE = 1e-5
# Of the mean and deviation of 20,000 normal numbers: five standard errors 1/√N and 1/√2N.
SAMPLING_TOLERANCE = 0.036


@pytest.fixture(params=["vq", "kl"])
def stage(request, first_stages, fill):
    return fill(instantiate_from_config(first_stages[request.param])).eval()


@pytest.fixture
def vq(first_stages, fill):
    made = fill(instantiate_from_config(first_stages["vq"])).eval()
    torch.nn.init.normal_(made.quantize.embedding.weight, generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def kl(first_stages, fill):
    return fill(instantiate_from_config(first_stages["kl"])).eval()


def images(count=2, seed=1, sides=(16, 16)):
    return torch.rand(count, 3, *sides, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("sides", [(16, 16), (8, 24)])
def test_shapes(stage, sides):
    x = images(sides=sides)
    latent = stage.encode(x)
    latent = latent.mean if isinstance(latent, DiagonalGaussian) else latent
    assert stage.downsampling == 4
    assert latent.shape == (2, stage.embed_dim, sides[0] // 4, sides[1] // 4)
    assert stage.decode(latent).shape == x.shape


# ---------------------------------------------------------------------- codebook


@torch.no_grad()
def test_quantization_picks_the_nearest_entry():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(50, 3), torch.randn(2, 3, 4, 5)
    torch.nn.init.normal_(quantizer.embedding.weight)
    codes, vectors = quantizer.embedding.weight.double().numpy(), z.double().permute(0, 2, 3, 1).numpy()
    distances = np.linalg.norm(vectors[..., None, :] - codes, axis=-1)
    nearest = distances.argmin(-1)
    assert np.array_equal(quantizer.indices(z).numpy(), nearest)
    assert len(np.unique(nearest)) > 10
    assert np.array_equal(quantizer(z).permute(0, 2, 3, 1).double().numpy(), codes[nearest])
    # Planted: the entry of the largest dot product.
    assert not np.array_equal((vectors @ codes.T).argmax(-1), nearest)


@torch.no_grad()
def test_codes_are_their_own_nearest():
    quantizer = VectorQuantizer(64, 4)
    weight = quantizer.embedding.weight
    assert float(weight.abs().max()) <= 1 / 64
    z = weight.T.reshape(1, 4, 8, 8)
    assert torch.equal(quantizer(z), z)
    assert quantizer(z).is_contiguous()


@torch.no_grad()
def test_decoding_quantizes_first(vq):
    z = torch.randn(2, 3, 4, 4)
    decoded = vq.decode(z)
    assert torch.equal(decoded, vq.decode(vq.quantize(z)))
    assert torch.equal(decoded, vq.decoder(vq.post_quant_conv(vq.quantize(z))))
    assert not torch.equal(decoded, vq.decoder(vq.post_quant_conv(z)))  # planted: as a KL stage decodes


def test_gradients_pass_straight_through_the_codebook(vq, relative):
    x = images()
    reconstruction, loss = vq.reconstruct_with_loss(x)
    with torch.no_grad():
        z = vq.encode(x)
        chosen = vq.quantize(z)
        # (1 + 0.25) times the squared distance: both terms have one value and different gradients.
        assert float(loss) == pytest.approx(1.25 * float(F.mse_loss(chosen, z)), rel=SAME_TOLERANCE)
        assert relative(reconstruction, vq.decode(z)) < SAME_TOLERANCE

    reconstruction.square().sum().backward(retain_graph=True)
    straight = vq.quant_conv.weight.grad.clone()
    assert vq.quantize.embedding.weight.grad is None, "the reconstruction must not move the codebook"
    # The same gradient as if the decoder had been fed the chosen entries plus an encoder output that cancels out.
    vq.zero_grad()
    fed = chosen.clone().requires_grad_()
    vq.decoder(vq.post_quant_conv(fed)).square().sum().backward()
    vq.zero_grad()
    vq.encode(x).backward(fed.grad)
    assert relative(vq.quant_conv.weight.grad, straight) < SAME_TOLERANCE

    vq.zero_grad()
    loss.backward()
    assert bool(vq.quant_conv.weight.grad.any()), "commitment"
    used = set(vq.quantize.indices(z).unique().tolist())
    moved = set(vq.quantize.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist())
    assert moved == used
    assert vq.decoder.conv_in.weight.grad is None


@torch.no_grad()
def test_commitment_weighs_the_encoder_alone(vq):
    x = images()
    losses = [float(vq.reconstruct_with_loss(x, commitment=c)[1]) for c in (0.0, 1.0)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=SAME_TOLERANCE)


# ---------------------------------------------------------------------- normal distribution


def test_kl_in_closed_form():
    torch.manual_seed(0)
    parameters = torch.randn(3, 8, 2, 2)
    mean, log_variance = parameters.chunk(2, 1)
    normal = torch.distributions.Normal(mean.double(), (log_variance.double() / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    made = DiagonalGaussian(parameters).kl()
    torch.testing.assert_close(made.double(), expected, rtol=SAME_TOLERANCE, atol=0)
    # Planted: mean and log variance exchanged.
    other = DiagonalGaussian(parameters.roll(4, 1)).kl()
    assert not torch.allclose(other.double(), expected, rtol=SAME_TOLERANCE)
    assert float(DiagonalGaussian(torch.zeros(1, 2, 3, 3)).kl()) == 0


def test_samples_have_mean_and_deviation():
    torch.manual_seed(0)
    parameters = torch.tensor([1.5, -0.8])[None, :, None, None].expand(1, 2, 100, 200)
    normalised = (DiagonalGaussian(parameters).sample() - 1.5) / np.exp(-0.4)
    assert abs(float(normalised.mean())) < SAMPLING_TOLERANCE
    assert abs(float(normalised.std()) - 1) < SAMPLING_TOLERANCE
    assert abs(float(normalised.std()) * np.exp(-0.4) - 1) > SAMPLING_TOLERANCE  # planted: exp(log variance)
    noise = torch.randn(1, 1, 100, 200)
    assert torch.equal(DiagonalGaussian(parameters).sample(noise), 1.5 + torch.tensor(-0.4).exp() * noise)


def test_log_variances_are_clamped():
    distribution = DiagonalGaussian(torch.tensor([0.0, 0.0, -99.0, 99.0])[None, :, None, None])
    assert distribution.log_variance.flatten().tolist() == [-30.0, 20.0]
    assert torch.isfinite(distribution.kl()).all()


@torch.no_grad()
def test_encoder_predicts_the_moments_and_decoding_is_deterministic(kl, relative):
    x = images()
    moments = kl.quant_conv(kl.encoder(x))
    posterior = kl.encode(x)
    assert torch.equal(posterior.mean, moments[:, :4])
    assert torch.equal(posterior.log_variance, moments[:, 4:].clamp(-30, 20))
    z = torch.randn(2, 4, 4, 4)
    assert torch.equal(kl.decode(z), kl.decode(z))
    assert relative(kl.decode(z), kl.decoder(kl.post_quant_conv(z))) < SAME_TOLERANCE
    assert not torch.equal(posterior.sample(), posterior.sample())


def test_reconstruction_samples_and_regularises(kl):
    x = images()
    torch.manual_seed(5)
    reconstruction, loss = kl.reconstruct_with_loss(x)
    with torch.no_grad():
        posterior = kl.encode(x)
        torch.manual_seed(5)
        assert torch.equal(reconstruction, kl.decode(posterior.sample()))
        assert float(loss) == pytest.approx(float(posterior.kl().mean()) / (4 * 4 * 4), rel=SAME_TOLERANCE)
    (reconstruction.square().sum() + loss).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in kl.parameters())


# ---------------------------------------------------------------------- encoder and decoder


@torch.no_grad()
def test_attention_at_the_resolutions_asked_for():
    arguments = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16}
    encoder = Encoder(**arguments, in_channels=3, z_channels=4)
    decoder = Decoder(**arguments, out_ch=3, z_channels=4)
    assert [len(level.attn) for level in encoder.down] == [0, 1]
    assert [len(level.attn) for level in decoder.up] == [0, 2]
    seen = []
    for module in [*encoder.modules(), *decoder.modules()]:
        if type(module).__name__ == "AttnBlock":
            module.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[2:])))
    z = encoder(torch.randn(1, 3, 16, 16))
    assert z.shape == (1, 8, 8, 8)
    assert decoder(z[:, :4]).shape == (1, 3, 16, 16)
    assert seen == [(8, 8)] * 5  # one on each way down and up (twice), one in each middle


def test_training_works_in_any_memory_format(stage, relative, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # drawn in another order in another format
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        stage.to(memory_format=layout).zero_grad()
        reconstruction, loss = stage.reconstruct_with_loss(images().contiguous(memory_format=layout))
        (reconstruction.square().sum() + loss).backward()
        gradients.append(torch.cat([p.grad.contiguous().flatten() for p in stage.parameters()]))
    assert relative(gradients[1], gradients[0]) < SAME_TOLERANCE
    assert gradients[0].norm() > 0
