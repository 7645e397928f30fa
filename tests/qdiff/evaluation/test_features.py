"""One pass of the extractor: what it gives, what of it is kept, and in how large batches it runs."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation import features as module
from qdiff.evaluation.extractors import create_extractor, weights_hash
from qdiff.evaluation.features import (
    LARGEST_BATCH,
    MEMORY_SHARE,
    SPATIAL_CHANNELS,
    ImageFeatures,
    cached_features,
    extract_features,
    fitting_batch_size,
    forward,
)
from qdiff.evaluation.image_sets import open_images

COUNT = 50
BATCH_TOLERANCE = 1e-4  # another batch size, another convolution kernel; features have variance 1
STATISTICS_TOLERANCE = 1e-10  # float64 sums in another order, of numbers near 1
# The digits classifier's largest layer: 32 channels of 16×16 float32, in and out.
LARGEST_LAYER = 2 * 32 * 16 * 16 * 4


@pytest.fixture(scope="module")
def digits():
    """Fifty digits, uint8 [50, 1, 16, 16]."""
    return torch.from_numpy(load_digit_images(16)[0][:COUNT, None])


@pytest.fixture(scope="module")
def whole(digits, extractor):
    return extract_features(digits, extractor, batch_size=COUNT, progress=False)


@pytest.fixture
def passes(monkeypatch):
    """How many images each forward of the extractor took; grows as it runs."""
    taken = []

    def counted(extractor, batch):
        taken.append(len(batch))
        return forward(extractor, batch)

    monkeypatch.setattr(module, "forward", counted)
    return taken


def equal(a: ImageFeatures, b: ImageFeatures) -> bool:
    return (
        (a.extractor, a.weights_hash, a.pixels_hash, a.count) == (b.extractor, b.weights_hash, b.pixels_hash, b.count)
        and torch.equal(a.features, b.features)
        and torch.equal(a.logits, b.logits)
        and all(
            np.array_equal(getattr(getattr(a, name), key), getattr(getattr(b, name), key))
            for name in ("gaussian", "spatial")
            for key in ("mu", "sigma")
        )
    )


def test_features_are_the_extractors_in_the_images_order(whole, digits, extractor):
    features, logits = extractor(digits.expand(-1, 3, -1, -1))
    assert torch.equal(whole.features, features) and torch.equal(whole.logits, logits)
    assert whole.features.dtype == whole.logits.dtype == torch.float32
    assert whole.count == COUNT and whole.extractor == "digits-classifier"
    assert whole.weights_hash == weights_hash(extractor) and whole.pixels_hash == open_images(digits).sha256()


def test_gaussians_are_of_all_features(whole, digits, extractor):
    maps = extractor.classifier.convolutions(extractor.classifier.prepare(digits.expand(-1, 3, -1, -1))).numpy()
    order = [(c, y, x) for y in range(4) for x in range(4) for c in range(SPATIAL_CHANNELS)]
    spatial = np.stack([maps[:, c, y, x] for c, y, x in order], axis=1)
    assert spatial.shape == (COUNT, 4 * 4 * SPATIAL_CHANNELS)
    for gaussian, features in ((whole.gaussian, whole.features.numpy()), (whole.spatial, spatial)):
        exact = features.astype(np.float64)
        sigma = np.cov(exact, rowvar=False)
        assert np.abs(gaussian.mu - exact.mean(axis=0)).max() < STATISTICS_TOLERANCE
        assert np.abs(gaussian.sigma - sigma).max() < STATISTICS_TOLERANCE
        # The planted error: one image left out.
        assert np.abs(np.cov(exact[1:], rowvar=False) - sigma).max() > STATISTICS_TOLERANCE
    # The planted error: channels before rows and columns.
    other = maps[:, :SPATIAL_CHANNELS].reshape(COUNT, -1).astype(np.float64)
    assert np.abs(whole.spatial.mu - other.mean(axis=0)).max() > STATISTICS_TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 7, COUNT - 1, 1000])
def test_batch_size_changes_rounding_only(batch_size, whole, digits, extractor, passes):
    parts = extract_features(digits, extractor, batch_size, progress=False)
    assert sum(passes) == COUNT and max(passes) == min(batch_size, COUNT)
    assert parts.pixels_hash == whole.pixels_hash and parts.count == COUNT
    assert (parts.features - whole.features).abs().max() < BATCH_TOLERANCE
    assert (parts.logits - whole.logits).abs().max() < 10 * BATCH_TOLERANCE
    for name in ("gaussian", "spatial"):
        ours, theirs = getattr(parts, name), getattr(whole, name)
        assert np.abs(ours.mu - theirs.mu).max() < BATCH_TOLERANCE
        assert np.abs(ours.sigma - theirs.sigma).max() < BATCH_TOLERANCE
    # The planted error: the images in another order.
    turned = extract_features(digits.flip(0), extractor, batch_size, progress=False)
    assert (turned.features - whole.features).abs().max() > BATCH_TOLERANCE
    assert turned.pixels_hash != whole.pixels_hash


@pytest.mark.parametrize("most", [2, 20, COUNT, 1000])
@pytest.mark.parametrize("batch_size", [7, COUNT])
def test_kept_features_are_evenly_spaced_and_gaussians_of_all_images(most, batch_size, digits, extractor):
    every_feature = extract_features(digits, extractor, batch_size, progress=False)
    kept = extract_features(digits, extractor, batch_size, progress=False, most_kept=most)
    number = min(most, COUNT)
    chosen = [round(i * (COUNT - 1) / (number - 1)) for i in range(number)]
    assert len(set(chosen)) == number
    assert torch.equal(kept.features, every_feature.features[chosen])
    assert torch.equal(kept.logits, every_feature.logits[chosen])
    assert kept.count == COUNT and kept.pixels_hash == every_feature.pixels_hash
    for name in ("gaussian", "spatial"):
        assert np.array_equal(getattr(kept, name).mu, getattr(every_feature, name).mu)
        assert np.array_equal(getattr(kept, name).sigma, getattr(every_feature, name).sigma)
    # The planted error: the first instead of evenly spaced ones.
    assert most >= COUNT or not torch.equal(kept.features, every_feature.features[:number])


def test_too_few_images_and_batches_of_none_are_refused(digits, extractor):
    with pytest.raises(UserError, match="two images or more"):
        extract_features(digits[:1], extractor, progress=False)
    for batch_size in (0, -1):
        with pytest.raises(UserError, match=f"batch size must be 1 or more, not {batch_size}"):
            extract_features(digits, extractor, batch_size, progress=False)


def test_no_hook_stays_also_after_an_error(digits, extractor):
    def hooks():
        return sum(len(m._forward_hooks) for m in extractor.modules())

    fitting_batch_size(open_images(digits), extractor)
    with pytest.raises(ValueError, match="uint8"):
        forward(extractor, torch.zeros(1, 3, 16, 16))
    assert hooks() == 0


def test_a_quarter_of_free_memory_is_filled(digits, extractor, monkeypatch):
    def fitting(free: int) -> int:
        monkeypatch.setattr(module, "available_on", lambda device: free)
        return fitting_batch_size(open_images(digits), extractor)

    one = int(4 * LARGEST_LAYER / MEMORY_SHARE)
    assert fitting(10 * one) == 10 and fitting(20 * one) == 20 and fitting(11 * one - 1) == 10
    assert fitting(0) == fitting(1) == fitting(one // 2) == fitting(one) == 1
    assert fitting(10**15) == LARGEST_BATCH


def test_by_default_batches_fit_the_memory(digits, whole, extractor, passes, monkeypatch):
    monkeypatch.setattr(module, "available_on", lambda device: 1)  # so little that even one image does not fit
    tiny = extract_features(digits[:6], extractor, progress=False)
    assert passes == [1] + [1] * 6  # one to measure
    assert (tiny.features - whole.features[:6]).abs().max() < BATCH_TOLERANCE
    passes.clear()
    monkeypatch.setattr(module, "available_on", lambda device: int(20 * 4 * LARGEST_LAYER / MEMORY_SHARE))
    extract_features(digits, extractor, progress=False)
    assert passes == [1, 20, 20, 10]


def test_cached_features_are_computed_once(digits, extractor, passes, tmp_path):
    first = cached_features(digits, extractor, tmp_path / "cache", 10, progress=False)
    assert passes == [10] * 5
    again = cached_features(digits.numpy(), extractor, tmp_path / "cache", 7, progress=False)
    assert passes == [10] * 5 and equal(first, again)
    assert equal(first, extract_features(digits, extractor, 10, progress=False))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_features_of_a_gpu_are_kept_apart(digits, extractor, tmp_path, monkeypatch):
    """No device is at hand: what counts is where the extractor says that its weights are."""
    kept = cached_features(digits, extractor, tmp_path, COUNT, progress=False)
    on_cpu = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(module, "_device_of", lambda _: torch.device("cuda:1"))
    monkeypatch.setattr(module, "extract_features", lambda *_: kept)
    cached_features(digits, extractor, tmp_path, COUNT, progress=False)
    (name,) = on_cpu
    assert {path.name for path in tmp_path.iterdir()} - on_cpu == {name.replace(".npz", "-cuda.npz")}


def test_without_a_folder_nothing_is_kept(digits, extractor, passes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cached_features(digits, extractor, None, COUNT, progress=False)
    assert passes == [COUNT] * 2 and not list(tmp_path.iterdir())


def test_other_images_and_other_weights_are_other_entries(digits, extractor, passes, tmp_path):
    cached_features(digits, extractor, tmp_path, COUNT, progress=False)
    changed = digits.clone()
    changed[20, 0, 8, 8] ^= 1
    other = create_extractor("digits-classifier")
    with torch.no_grad():
        other.classifier.head.weight[0, 0] += 1e-3
    found = [
        cached_features(changed, extractor, tmp_path, COUNT, progress=False),
        cached_features(digits, other, tmp_path, COUNT, progress=False),
        cached_features(digits[:20], extractor, tmp_path, COUNT, progress=False),
    ]
    assert passes == [COUNT, COUNT, COUNT, 20] and len(list(tmp_path.iterdir())) == 4
    assert found[0].pixels_hash == open_images(changed).sha256() != found[1].pixels_hash
    assert found[1].weights_hash == weights_hash(other) != found[0].weights_hash
    assert found[2].count == 20


def test_a_folder_is_another_entry_once_a_file_in_it_changes(digits, extractor, passes, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(digits.numpy()):
        Image.fromarray(image[0]).save(folder / f"{index:05d}.png")
    first = cached_features(folder, extractor, tmp_path / "cache", COUNT, progress=False)
    cached_features(folder, extractor, tmp_path / "cache", COUNT, progress=False)
    assert passes == [COUNT]
    (folder / "00003.png").write_bytes((folder / "00004.png").read_bytes())
    second = cached_features(folder, extractor, tmp_path / "cache", COUNT, progress=False)
    assert passes == [COUNT] * 2
    assert second.pixels_hash != first.pixels_hash and torch.equal(second.features[3], second.features[4])


def rewrite(path, **changes):
    """Write the entry again with arrays changed, or left out where None."""
    with np.load(path) as archive:
        arrays = dict(archive) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def renamed_field(path):
    with np.load(path) as archive:
        about = json.loads(str(archive["about"]))
    rewrite(path, about=np.array(json.dumps({"network" if k == "extractor" else k: v for k, v in about.items()})))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"?" * 999),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "a bit of the numbers": lambda path: flip(path, b"features.npy", 500),
    "the compression method": lambda path: flip(path, b"PK\x01\x02", 10),
    "without logits": lambda path: rewrite(path, logits=None),
    "not finite": lambda path: rewrite(path, gaussian_mu=np.full(64, np.nan)),
    "other shapes": lambda path: rewrite(path, spatial_sigma=np.eye(3)),
    "about is a list": lambda path: rewrite(path, about=np.array("[1, 2]")),
    "another version's fields": renamed_field,
}


def flip(path, after: bytes, offset: int):
    data = bytearray(path.read_bytes())
    data[data.index(after) + offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_anew(damage, digits, extractor, passes, tmp_path):
    first = cached_features(digits, extractor, tmp_path, COUNT, progress=False)
    (path,) = tmp_path.iterdir()
    DAMAGES[damage](path)
    assert equal(cached_features(digits, extractor, tmp_path, COUNT, progress=False), first)
    assert passes == [COUNT] * 2
    assert zipfile.ZipFile(path).testzip() is None and list(tmp_path.iterdir()) == [path]
    cached_features(digits, extractor, tmp_path, COUNT, progress=False)
    assert passes == [COUNT] * 2


def test_an_interrupted_write_leaves_no_entry(digits, extractor, tmp_path, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_features(digits, extractor, tmp_path, COUNT, progress=False)
    assert list(tmp_path.iterdir()) == []
