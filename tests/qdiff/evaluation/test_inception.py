"""sFID, FID and IS on the real Inception architecture, with random weights, against NumPy on features taken by hand.

The weights are random because the published ones have 95 MB; what they are does not matter to which numbers of which
layer are compared, and in which order.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from unfilled_inception import INCEPTION, drawn_inception

from qdiff.errors import UserError
from qdiff.evaluation import metrics as module
from qdiff.evaluation import subject
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.features import forward
from qdiff.evaluation.measure import measure, possible
from qdiff.evaluation.reference import load_reference
from qdiff.evaluation.subject import Subject

pytestmark = pytest.mark.slow

COUNT, REAL_COUNT = 16, 12
OF_FEATURES = ("fid", "sfid", "isc", "kid", "prc")
# Resizing in float32 is off by 2e-6 of what NumPy gives, and random weights make a hundred times that of it.
FORWARD = 1e-3  # maps and features, which go up to 10
DISTANCE = 1e-5  # relative
DEFINITIONS = 1e-7  # relative, between two ways in float64: the roots of eigenvalues that are 0 are some 1e-8 each
SCORE = 1e-4  # relative; the exponential of logits up to 40


def small_images(count: int, seed: int) -> torch.Tensor:
    """Smooth patterns in colour, uint8 [count, 3, 24, 24], of different contrast and fineness."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :24] / 24
    images = []
    for _ in range(count):
        waves = [
            random.uniform(0.2, 1) * np.sin(random.normal(0, 9) * x + random.normal(0, 9) * y + random.uniform(0, 6))
            for _ in range(3)
        ]
        colours = 70 * random.normal(size=(3, 3))
        images.append(random.uniform(60, 200, (3, 1, 1)) + np.tensordot(colours, np.stack(waves), axes=1))
    return torch.from_numpy(np.clip(np.round(np.stack(images)), 0, 255).astype(np.uint8))


def stretched(images: torch.Tensor) -> torch.Tensor:
    """Resize to 299×299 as TensorFlow 1 does: position i of the result is i·24/299 of the source, then scale."""
    side = images.shape[-1]
    place = np.arange(299) * side / 299
    low = np.floor(place).astype(int)
    weights = np.zeros((299, side))
    weights[np.arange(299), low] += 1 - (place - low)
    weights[np.arange(299), np.minimum(low + 1, side - 1)] += place - low
    large = weights @ images.numpy().astype(np.float64) @ weights.T
    return torch.from_numpy((large - 128) / 128).float()


@torch.inference_mode()
def by_hand(network: nn.Module, images: torch.Tensor) -> SimpleNamespace:
    """Run the network's blocks one after the other: maps [N, 192, 17, 17] of the branch, features, logits
    without and with the bias, and what the block before gives."""
    x = stretched(images)
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = network.get_submodule(name)(x)
    for name in ("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
        x = network.get_submodule(name)(x)
    before = x
    branch = network.Mixed_6d.branch1x1
    maps = torch.relu(branch.bn(branch.conv(x)))
    for name in ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
        x = network.get_submodule(name)(x)
    features = x.mean(dim=(2, 3)).double().numpy()
    weight, bias = (p.double().numpy() for p in (network.fc.weight, network.fc.bias))
    logits = features @ weight.T
    maps, before = (m.double().numpy() for m in (maps, before))
    return SimpleNamespace(maps=maps, before=before, features=features, logits=logits, biased=logits + bias)


def spatial(maps: np.ndarray, channels: int = 7) -> np.ndarray:
    """[N, 192, 17, 17] → [N, 17·17·channels], the channels of one place beside each other."""
    return np.stack([maps[:, c, i, j] for i in range(17) for j in range(17) for c in range(channels)], axis=1)


def torchs_order(maps: np.ndarray) -> np.ndarray:
    """The planted error: channels first, as torch's maps lie in memory."""
    return maps[:, :7].reshape(len(maps), -1)


def inception_score(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Heusel et al. 2017, with the root of Σ₁ from its eigenvectors; few vectors leave most eigenvalues zero."""
    one, other = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(one)
    first = values > values.max() * 1e-12
    root = vectors[:, first] * np.sqrt(values[first])
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(root.T @ other @ root), 0, None)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other) - 2 * roots)


def frechet_of_few(x: np.ndarray, y: np.ndarray) -> float:
    """The same by way of the vectors: Σ₁ = AᵀA, Σ₂ = BᵀB, and tr (Σ₁Σ₂)^½ is the nuclear norm of ABᵀ."""
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    roots = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * roots)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Inception with random weights, each normalisation having the statistics of a few images, read from a file."""
    generator = torch.Generator().manual_seed(0)
    made = drawn_inception(generator)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(layer.bias, 0.0, 0.3, generator=generator)
    nn.init.normal_(made.fc.weight, 0.0, 0.15, generator=generator)
    nn.init.normal_(made.fc.bias, 0.0, 1.0, generator=generator)
    with torch.inference_mode():
        made.train()(small_images(6, seed=9))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(made.state_dict(), path)
    return create_extractor(INCEPTION, path)


@pytest.fixture(scope="module")
def images():
    return small_images(COUNT, seed=0)


@pytest.fixture(scope="module")
def ours(network, images):
    return by_hand(network, images)


@pytest.fixture(scope="module")
def real(network):
    """Of other images, half of them darker."""
    images = small_images(REAL_COUNT, seed=1)
    images[::2] //= 2
    return by_hand(network, images)


def statistics(real: SimpleNamespace, order=spatial) -> dict[str, np.ndarray]:
    """The arrays of ADM's reference batches, but for the images."""
    parts = {"": real.features, "_s": order(real.maps)}
    return {f"{n}{s}": m for s, x in parts.items() for n, m in (("mu", x.mean(0)), ("sigma", np.cov(x, rowvar=False)))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, real):
    """References as ADM and as pytorch-fid write them, and one whose spatial features are in another order."""
    path = tmp_path_factory.mktemp("references")
    right = statistics(real)
    pixels = np.zeros((3, 24, 24, 3), np.uint8)  # ADM's batches hold the images too
    np.savez(path / "adm.npz", arr_0=pixels, **right)
    np.savez(path / "pytorch_fid.npz", mu=right["mu"], sigma=right["sigma"])
    np.savez(path / "wrong_order.npz", **statistics(real, torchs_order))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Features of the images, which take seconds, are kept from one test to the next."""
    return tmp_path_factory.mktemp("cache")


def test_random_weights_tell_images_apart(ours):
    assert np.isfinite(ours.features).all() and 0.1 < ours.features.std(axis=0).mean() < 10
    assert (ours.maps[:, :7].std(axis=0) > 0).mean() > 0.9
    assert len(set(ours.logits.argmax(axis=1))) > 1


def test_spatial_features_are_seven_channels_in_adms_order(network, images, ours):
    outputs, middle = forward(network, images[:3])
    assert middle.shape == (3, 2023) and middle.dtype == torch.float32
    assert outputs["2048"].shape == (3, 2048) and outputs["logits_unbiased"].shape == (3, 1008)
    assert np.abs(middle.numpy() - spatial(ours.maps)[:3]).max() < FORWARD
    row, column, channel = 3, 11, 5
    assert np.abs(middle[:, (row * 17 + column) * 7 + channel].numpy() - ours.maps[:3, channel, row, column]).max() < (
        FORWARD
    )
    assert np.abs(outputs["2048"].numpy() - ours.features[:3]).max() < FORWARD
    # The planted errors: torch's order, rows and columns swapped, and the block before.
    for wrong in (torchs_order(ours.maps), spatial(ours.maps.swapaxes(2, 3)), spatial(ours.before)):
        assert np.abs(middle.numpy() - wrong[:3]).max() > 100 * FORWARD


def test_logits_have_no_bias(network, images, ours):
    logits = forward(network, images[:3])[0]["logits_unbiased"].numpy()
    assert np.abs(logits - ours.logits[:3]).max() < 10 * FORWARD  # sums of 2,048 features
    assert np.abs(logits - ours.biased[:3]).max() > 1000 * FORWARD  # the planted error


def test_sfid_with_adms_statistics_equals_the_definition(network, images, ours, real, folder, cache):
    reference = load_reference(folder / "adm.npz", network)
    found = measure(Subject(images, reference, network, progress=False, cache=cache), ["sfid"])
    expected = frechet(spatial(ours.maps), spatial(real.maps))
    assert expected == pytest.approx(frechet_of_few(spatial(ours.maps), spatial(real.maps)), rel=DEFINITIONS)
    assert found["sfid"] == pytest.approx(expected, rel=DISTANCE)
    # The planted errors: eight channels, the next seven, the block before, and one image left out.
    for wrong in (
        (spatial(ours.maps, 8), spatial(real.maps, 8)),
        (spatial(ours.maps[:, 7:]), spatial(real.maps[:, 7:])),
        (spatial(ours.before), spatial(real.before)),
        (spatial(ours.maps)[1:], spatial(real.maps)),
    ):
        assert frechet_of_few(*wrong) != pytest.approx(expected, rel=100 * DISTANCE)


def test_spatial_features_in_another_order_change_sfid(network, images, ours, real, folder, cache):
    """A reference in ADM's order and images in torch's give a number too, only a wrong one."""
    reference = load_reference(folder / "wrong_order.npz", network)
    wrong = measure(Subject(images, reference, network, progress=False, cache=cache), ["sfid"])["sfid"]
    expected = frechet_of_few(spatial(ours.maps), spatial(real.maps))
    assert wrong != pytest.approx(expected, rel=100 * DISTANCE)
    assert wrong == pytest.approx(frechet_of_few(spatial(ours.maps), torchs_order(real.maps)), rel=DISTANCE)


@pytest.mark.parametrize("part", [5000, 7])
def test_is_by_adms_protocol_equals_the_definition(part, network, images, ours, cache, monkeypatch):
    monkeypatch.setattr(module, "ADM_ISC_SPLIT", part)
    found = measure(Subject(images, None, network, progress=False, cache=cache, adm_protocol=True), ["isc"])
    scores = [inception_score(ours.logits[i : i + part]) for i in range(0, COUNT, part)]
    assert found["isc"] == pytest.approx(np.mean(scores), rel=SCORE) and found["isc"] > 1.1
    assert found["isc_std"] == pytest.approx(np.std(scores), rel=10 * SCORE, abs=SCORE)
    # The planted error: the bias.
    biased = [inception_score(ours.biased[i : i + part]) for i in range(0, COUNT, part)]
    assert found["isc"] != pytest.approx(np.mean(biased), rel=10 * SCORE)


def test_is_by_torch_fidelitys_protocol_equals_the_definition(network, images, ours, cache):
    found = measure(Subject(images, None, network, progress=False, cache=cache), ["isc"])

    def score(logits: np.ndarray) -> np.ndarray:
        shuffled = logits[np.random.RandomState(2020).permutation(COUNT)]
        parts = [shuffled[i * COUNT // 10 : (i + 1) * COUNT // 10] for i in range(10)]
        return np.array([inception_score(part) for part in parts])

    assert found["isc"] == pytest.approx(score(ours.logits).mean(), rel=SCORE)
    assert found["isc_std"] == pytest.approx(score(ours.logits).std(), rel=10 * SCORE)
    # The planted errors: the bias, and ADM's protocol.
    assert found["isc"] != pytest.approx(score(ours.biased).mean(), rel=10 * SCORE)
    assert found["isc"] != pytest.approx(inception_score(ours.logits), rel=10 * SCORE)


def test_adms_statistics_are_read_as_such(network, images, real, folder):
    reference = load_reference(folder / "adm.npz", network)
    expected = statistics(real)
    for gaussian, suffix in ((reference.gaussian, ""), (reference.spatial, "_s")):
        assert np.array_equal(gaussian.mu, expected[f"mu{suffix}"])
        assert np.array_equal(gaussian.sigma, expected[f"sigma{suffix}"])
    assert (reference.name, reference.extractor, reference.count) == ("adm.npz", INCEPTION, 0)
    assert reference.features is reference.weights_hash is reference.images_hash is None
    assert possible(Subject(images, reference, network), OF_FEATURES) == ["fid", "sfid", "isc"]


def test_float32_statistics_become_float64(real, tmp_path):
    small = {name: array.astype(np.float32) for name, array in statistics(real).items()}
    np.savez(tmp_path / "r.npz", **small)
    reference = load_reference(tmp_path / "r.npz")
    for gaussian in (reference.gaussian, reference.spatial):
        assert gaussian.mu.dtype == gaussian.sigma.dtype == np.float64


def test_pytorch_fids_statistics_give_fid_and_nothing_else(network, images, ours, real, folder, cache):
    reference = load_reference(folder / "pytorch_fid.npz", network)
    assert reference.spatial is None and possible(Subject(images, reference, network), OF_FEATURES) == ["fid", "isc"]
    found = measure(Subject(images, reference, network, progress=False, cache=cache), ["fid"])
    assert found["fid"] == pytest.approx(frechet_of_few(ours.features, real.features), rel=DISTANCE)
    # The planted error: one image left out. ADM's files say the same of these features.
    assert found["fid"] != pytest.approx(frechet_of_few(ours.features[1:], real.features), rel=100 * DISTANCE)
    same = load_reference(folder / "adm.npz").gaussian
    assert np.array_equal(reference.gaussian.mu, same.mu) and np.array_equal(reference.gaussian.sigma, same.sigma)


@pytest.mark.parametrize(
    ("file", "metric", "says"),
    [
        ("adm.npz", "kid", "kid needs features of single images"),
        ("adm.npz", "prc", "prc needs features of single images"),
        ("pytorch_fid.npz", "sfid", "sfid needs spatial statistics"),
        ("pytorch_fid.npz", "kid", "kid needs features of single images"),
    ],
)
def test_what_such_files_lack_is_one_sentence(file, metric, says, network, images, folder, monkeypatch):
    reference = load_reference(folder / file, network)
    monkeypatch.setattr(subject, "cached_features", lambda *_: pytest.fail("worked"))
    with pytest.raises(UserError, match=f"^{says}, which the reference statistics '{file}' do not hold; .*{metric}"):
        measure(Subject(images, reference, network, progress=False), ["fid", metric])


def test_such_files_are_refused_for_another_extractor(extractor, folder):
    with pytest.raises(UserError, match=f"made with the extractor {INCEPTION}, not digits-classifier"):
        load_reference(folder / "adm.npz", extractor)
