"""FID, IS, KID and precision/recall against independent computations, and the forms images come in."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation.metrics import ImageSet, compute_metrics, compute_reference, extract_features
from qdiff.evaluation.reference import ReferenceStatistics, bundled_reference

DIGITS = "digits-classifier"
EXACT = 1e-6  # relative: the same float64 arithmetic by another route
SELF_FID = 1e-3  # bundled features come from another CPU or batch size; half of the digits are at 0.1
ROUNDING = 1e-3  # relative: float32 features or means instead of float64


@pytest.fixture(scope="module")
def reference(extractor):
    return bundled_reference(DIGITS, extractor)


@pytest.fixture(scope="module")
def digits():
    """All digits, uint8 [1797, 16, 16, 1]."""
    return load_digit_images(16)[0][..., None]


@pytest.fixture(scope="module")
def noisy(digits):
    """200 digits with Gaussian noise of 32 grey levels: some way off, as samples of a quantized model are."""
    noise = np.random.default_rng(1).normal(0, 32, digits[:200].shape)
    return np.clip(np.round(digits[:200] + noise), 0, 255).astype(np.uint8)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Heusel et al. 2017, with the matrix square root that torch-fidelity does not take."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    covariances = [np.einsum("ni,nj->ij", z - z.mean(0), z - z.mean(0)) / (len(z) - 1) for z in (x, y)]
    root = sqrtm(covariances[0] @ covariances[1])
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real))


def mmd(x: np.ndarray, y: np.ndarray, biased: bool = False) -> float:
    """Squared MMD with the kernel (x·y / d + 1)³, Bińkowski et al. 2018; biased: with the diagonals in."""
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    if biased:
        return xx.mean() + yy.mean() - 2 * xy.mean()
    m = len(x)
    off_diagonal = sum(k.sum() - np.diag(k).sum() for k in (xx, yy))
    return off_diagonal / (m * (m - 1)) - 2 * xy.mean()


def inception_score(logits: np.ndarray, splits: int) -> float:
    """Salimans et al. 2016: exp of the mean KL divergence to the marginal, averaged over splits."""
    logits = logits.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for part in np.split(p, splits):
        scores.append(np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
    return float(np.mean(scores))


def test_fid_equals_the_definition(extractor, reference, noisy):
    features = extract_features(noisy, extractor, progress=False)["64"].numpy()
    fid = compute_metrics(noisy, reference, extractor, ["fid"], progress=False)["fid"]
    expected = frechet(features, reference.features)
    assert fid == pytest.approx(expected, rel=EXACT)
    # The planted errors: a mean shifted by a hundredth of a deviation, and two images left out.
    assert frechet(features + 0.01, reference.features) != pytest.approx(expected, rel=EXACT)
    assert frechet(features[:198], reference.features) != pytest.approx(expected, rel=EXACT)


def test_kid_equals_the_definition_on_the_same_subsets(extractor, reference, noisy):
    features = extract_features(noisy, extractor, progress=False)["64"].double().numpy()
    result = compute_metrics(noisy, reference, extractor, ["kid"], progress=False)
    assert result["kid_subset_size"] == 200
    draw = np.random.RandomState(2020)
    real, values, biased = reference.features.astype(np.float64), [], []
    for _ in range(100):
        ours = features[draw.choice(200, 200, replace=False)]
        theirs = real[draw.choice(1797, 200, replace=False)]
        values.append(mmd(ours, theirs))
        biased.append(mmd(ours, theirs, biased=True))
    assert result["kid"] == pytest.approx(np.mean(values), rel=EXACT)
    assert result["kid_std"] == pytest.approx(np.std(values), rel=EXACT)
    # The planted error: the biased estimate.
    assert result["kid"] != pytest.approx(np.mean(biased), rel=EXACT)


def test_is_equals_the_definition(extractor, noisy):
    logits = extract_features(noisy, extractor, progress=False)["logits_unbiased"].numpy()
    result = compute_metrics(noisy, None, extractor, ["isc"], progress=False)
    shuffled = logits[np.random.RandomState(2020).permutation(200)]
    assert result["isc"] == pytest.approx(inception_score(shuffled, 10), rel=EXACT)
    # The planted errors: another number of splits, and a bias on one class.
    assert inception_score(shuffled, 5) != pytest.approx(result["isc"], rel=EXACT)
    shuffled[:, 3] += 0.01
    assert inception_score(shuffled, 10) != pytest.approx(result["isc"], rel=EXACT)


def test_agrees_with_torch_fidelity_from_end_to_end(extractor, reference, digits, noisy, tmp_path):
    from torch_fidelity import calculate_metrics

    folders = [tmp_path / "generated", tmp_path / "real"]
    for folder, images in zip(folders, (noisy, digits[::4]), strict=True):
        write_folder(folder, images)
    theirs = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor=DIGITS,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=200,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    real = compute_reference(folders[1], extractor, "every fourth digit", progress=False)
    ours = compute_metrics(folders[0], real, extractor, ("fid", "isc", "kid", "prc"), progress=False)
    assert ours["num_images"] == 200 and ours["num_reference"] == 450
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=ROUNDING)
    assert ours["isc"] == pytest.approx(theirs["inception_score_mean"], rel=ROUNDING)
    assert ours["isc_std"] == pytest.approx(theirs["inception_score_std"], rel=ROUNDING)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=ROUNDING)
    assert ours["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=ROUNDING)
    for name in ("precision", "recall", "f_score"):
        assert ours[name] == pytest.approx(theirs[name], abs=1 / 200)  # one image may lie on the rim
    # The planted error: the reference of all digits instead of every fourth.
    other = compute_metrics(folders[0], reference, extractor, ("fid", "kid"), progress=False)
    assert other["fid"] != pytest.approx(theirs["frechet_inception_distance"], rel=ROUNDING)
    assert other["kid"] != pytest.approx(theirs["kernel_inception_distance_mean"], rel=ROUNDING)


def test_the_digits_are_at_no_distance_from_themselves_and_noise_is_far(extractor, reference, digits):
    every = ("fid", "isc", "kid", "prc")
    same = compute_metrics(digits, reference, extractor, every, progress=False)
    half = compute_metrics(digits[::2], reference, extractor, progress=False)
    noise = np.random.default_rng(0).integers(0, 256, digits.shape, dtype=np.uint8)
    far = compute_metrics(noise, reference, extractor, every, progress=False)
    assert abs(same["fid"]) < SELF_FID < half["fid"] < 1 < 50 < far["fid"]
    assert same["isc"] > 9 > 2 > far["isc"]
    assert same["kid"] < 0.01 < 1 < far["kid"]
    assert same["precision"] == same["recall"] == 1 and far["precision"] < 0.2 and far["recall"] < 0.01
    assert same["kid_subset_size"] == 1000 and half["kid_subset_size"] == 899


def test_is_of_one_image_repeated_is_1(extractor, digits):
    constant = np.repeat(digits[:1], 50, axis=0)
    assert compute_metrics(constant, None, extractor, ["isc"], progress=False)["isc"] == pytest.approx(1, abs=1e-6)


def write_folder(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{index:05d}.png")


def test_every_form_of_the_same_images_gives_the_same_numbers(extractor, reference, noisy, tmp_path):
    write_folder(tmp_path / "grey", noisy)
    write_folder(tmp_path / "rgb", noisy.repeat(3, axis=-1))
    (tmp_path / "grey" / "deeper").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "grey" / "deeper" / "0.png")
    (tmp_path / "grey" / "run.json").write_text("{}")
    forms = {
        "HWC": noisy,
        "CHW": noisy.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(noisy).permute(0, 3, 1, 2),
        "three channels": noisy.repeat(3, axis=-1),
        "grey PNG": tmp_path / "grey",
        "RGB PNG": str(tmp_path / "rgb"),
    }
    expected = compute_metrics(noisy, reference, extractor, progress=False)
    for form, images in forms.items():
        assert compute_metrics(images, reference, extractor, progress=False) == expected, form
        assert ImageSet(images).sha256() == ImageSet(noisy).sha256(), form
    assert ImageSet(noisy[:199]).sha256() != ImageSet(noisy).sha256()


def test_colour_channels_keep_their_order(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    write_folder(tmp_path / "images", colour)
    (batch,) = ImageSet(tmp_path / "images").batches(10)
    assert torch.equal(batch, torch.from_numpy(colour).permute(0, 3, 1, 2))


def test_batch_size_does_not_matter(extractor, reference, noisy):
    whole = compute_metrics(noisy, reference, extractor, progress=False)
    parts = compute_metrics(noisy, reference, extractor, batch_size=33, progress=False)
    assert parts == pytest.approx(whole, rel=ROUNDING)


def test_a_reference_of_other_weights_is_refused_before_any_work(extractor, reference, noisy):
    other = ReferenceStatistics("old", reference.features, DIGITS, "0" * 64, reference.images_hash)
    with pytest.raises(UserError, match="'old' were made with other weights"):
        compute_metrics(noisy, other, extractor, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ("fid", "ssim")}, "list out of fid, isc, kid, prc"),
        ({"metrics": "fid"}, "list out of"),
        ({"metrics": ()}, "list out of"),
        ({"reference": None}, "name the reference statistics"),
        ({"batch_size": 0}, "batch size must be 1 or more"),
        ({"images": np.zeros((20, 16, 16, 1), np.float32)}, "must be uint8, not torch.float32"),
        ({"images": np.zeros((20, 16, 16), np.uint8)}, r"\[N, H, W, C\] or \[N, C, H, W\]"),
        ({"images": np.zeros((20, 3, 16, 3), np.uint8)}, "axes in one of these orders"),
        ({"images": np.zeros((0, 3, 16, 16), np.uint8)}, "axes in one of these orders"),
        ({"images": np.zeros((9, 16, 16, 1), np.uint8)}, "isc needs 10 or more images, here are 9"),
    ],
)
def test_unusable_input_is_refused(extractor, reference, noisy, change, message):
    arguments = {"images": noisy, "reference": reference, "metrics": ("fid", "isc", "kid")} | change
    with pytest.raises(UserError, match=message):
        compute_metrics(extractor=extractor, progress=False, **arguments)


def test_unusable_folders_are_refused(extractor, tmp_path, noisy):
    with pytest.raises(UserError, match=r"no folder of images at .*none"):
        ImageSet(tmp_path / "none")
    with pytest.raises(UserError, match="holds no PNG file"):
        ImageSet(tmp_path)
    write_folder(tmp_path / "images", noisy[:12])
    last = tmp_path / "images" / "00011.png"
    for spoil, message in (
        (lambda: Image.new("L", (8, 16)).save(last), "00011.png is 8×16 pixels but 00000.png .* is 16×16"),
        (lambda: Image.new("I;16", (16, 16)).save(last), "00011.png has 16 bits"),
        (lambda: last.write_bytes(b"no image"), "00011.png is no readable image"),
        (
            lambda: last.write_bytes((tmp_path / "images" / "00000.png").read_bytes()[:90]),
            "no readable image",
        ),
    ):
        spoil()
        with pytest.raises(UserError, match=message):
            compute_metrics(tmp_path / "images", None, extractor, ["isc"], progress=False)
