"""FID, sFID, IS, KID and precision/recall of digits against independent computations."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity import metric_kid

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation import metrics as module
from qdiff.evaluation import subject as subject_module
from qdiff.evaluation.features import SPATIAL_CHANNELS, extract_features
from qdiff.evaluation.gaussians import Gaussian
from qdiff.evaluation.measure import measure, possible
from qdiff.evaluation.reference import compute_reference, find_reference
from qdiff.evaluation.registry import METRICS
from qdiff.evaluation.subject import Subject

DIGITS = "digits-classifier"
EXACT = 1e-6  # relative: the same float64 arithmetic by another route
SELF_FID = 1e-3  # bundled features come from another CPU or batch size; half of the digits are at 0.1
KID_NEAR_ZERO = 1e-12  # float64 sums of 40,000 terms near 1, in another order
CROSS_MACHINE = 1e-4  # relative: the bundled statistics' float32 features come from another CPU
ROUNDING = 1e-3  # relative: float32 features or means instead of float64


OF_FEATURES = ("fid", "sfid", "isc", "kid", "prc")


def measured(images, reference, extractor, metrics=("fid", "isc", "kid"), **options) -> dict:
    return measure(Subject(images, reference, extractor, **{"progress": False, **options}), metrics)


def possible_of(images, reference, extractor) -> list[str]:
    return possible(Subject(images, reference, extractor), OF_FEATURES)


@pytest.fixture(scope="module")
def reference(extractor):
    return find_reference("digits", extractor)


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
    features = extract_features(noisy, extractor, progress=False).features.numpy()
    fid = measured(noisy, reference, extractor, ["fid"])["fid"]
    expected = frechet(features, reference.features)
    assert fid == pytest.approx(expected, rel=EXACT)
    # The planted errors: a mean shifted by a hundredth of a deviation, and two images left out.
    assert frechet(features + 0.01, reference.features) != pytest.approx(expected, rel=EXACT)
    assert frechet(features[:198], reference.features) != pytest.approx(expected, rel=EXACT)


def spatial_features(extractor, images: np.ndarray, channels: int = SPATIAL_CHANNELS) -> np.ndarray:
    """The first channels of the map that the digits classifier ends its convolutions with, rows first."""
    classifier = extractor.classifier
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    maps = classifier.convolutions(classifier.prepare(rgb)).numpy()
    return np.moveaxis(maps[:, :channels], 1, 3).reshape(len(images), -1)


@pytest.mark.slow
def test_sfid_equals_the_definition(extractor, reference, digits, noisy):
    result = measured(noisy, reference, extractor, ["sfid"])
    assert set(result) == {"num_images", "num_reference", "sfid"}
    ours, real = (spatial_features(extractor, images) for images in (noisy, digits))
    assert ours.shape == (200, 4 * 4 * 7)
    expected = frechet(ours, real)
    assert result["sfid"] == pytest.approx(expected, rel=CROSS_MACHINE)
    # The planted errors: eight channels, and another order on one side.
    eight = frechet(*(spatial_features(extractor, images, 8) for images in (noisy, digits)))
    assert eight != pytest.approx(expected, rel=CROSS_MACHINE)
    turned = real.reshape(-1, 16, 7).transpose(0, 2, 1).reshape(-1, 112)
    assert frechet(ours, turned) != pytest.approx(expected, rel=CROSS_MACHINE)


@pytest.mark.slow
def test_kid_equals_the_definition_on_the_same_subsets(extractor, reference, noisy):
    features = extract_features(noisy, extractor, progress=False).features.double().numpy()
    result = measured(noisy, reference, extractor, ["kid"])
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


@pytest.mark.slow
def test_kid_near_zero_keeps_its_digits(extractor, reference, digits):
    """There it is a small difference of large sums."""
    from torch_fidelity import metric_kid

    ours = measured(digits[:200], reference, extractor, ["kid"])
    draw = np.random.RandomState(2020)
    features, real, values = extract_features(digits[:200], extractor, progress=False).features, reference.features, []
    for _ in range(100):
        subsets = features.double().numpy()[draw.choice(200, 200, replace=False)], real[draw.choice(1797, 200, False)]
        values.append(mmd(*(subset.astype(np.float64) for subset in subsets)))
    assert ours["kid"] == pytest.approx(np.mean(values), abs=KID_NEAR_ZERO)
    # The planted error: features in float32.
    coarse = metric_kid.kid_features_to_metric(features, torch.from_numpy(real), kid_subset_size=200, verbose=False)
    assert coarse[metric_kid.KEY_METRIC_KID_MEAN] != pytest.approx(np.mean(values), abs=KID_NEAR_ZERO)


def test_is_equals_the_definition(extractor, noisy):
    logits = extract_features(noisy, extractor, progress=False).logits.numpy()
    result = measured(noisy, None, extractor, ["isc"])
    shuffled = logits[np.random.RandomState(2020).permutation(200)]
    assert result["isc"] == pytest.approx(inception_score(shuffled, 10), rel=EXACT)
    # The planted errors: another number of splits, and a bias on one class.
    assert inception_score(shuffled, 5) != pytest.approx(result["isc"], rel=EXACT)
    shuffled[:, 3] += 0.01
    assert inception_score(shuffled, 10) != pytest.approx(result["isc"], rel=EXACT)


@pytest.mark.slow
def test_is_by_adms_protocol_takes_parts_in_order(extractor, noisy, monkeypatch):
    logits = extract_features(noisy, extractor, progress=False).logits.numpy()

    def found() -> dict[str, float]:
        return measured(noisy, None, extractor, ["isc"], adm_protocol=True)

    assert found()["isc"] == pytest.approx(inception_score(logits, 1), rel=EXACT) and found()["isc_std"] == 0
    monkeypatch.setattr(module, "ADM_ISC_SPLIT", 80)  # 200 images: two parts of 80 and one of 40
    parts = [inception_score(part, 1) for part in (logits[:80], logits[80:160], logits[160:])]
    assert found()["isc"] == pytest.approx(np.mean(parts), rel=EXACT)
    assert found()["isc_std"] == pytest.approx(np.std(parts), rel=EXACT)
    # The planted errors: shuffled images, and the last part left out.
    shuffled = logits[np.random.RandomState(2020).permutation(200)]
    parts_of_shuffled = [inception_score(part, 1) for part in (shuffled[:80], shuffled[80:160], shuffled[160:])]
    for wrong in (parts_of_shuffled, parts[:2]):
        assert found()["isc"] != pytest.approx(np.mean(wrong), rel=EXACT)


@pytest.mark.slow
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
    ours = measured(folders[0], real, extractor, ("fid", "isc", "kid", "prc"))
    assert ours["num_images"] == 200 and ours["num_reference"] == 450
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=ROUNDING)
    assert ours["isc"] == pytest.approx(theirs["inception_score_mean"], rel=ROUNDING)
    assert ours["isc_std"] == pytest.approx(theirs["inception_score_std"], rel=ROUNDING)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=ROUNDING)
    assert ours["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=ROUNDING)
    for name in ("precision", "recall", "f_score"):
        assert ours[name] == pytest.approx(theirs[name], abs=1 / 200)  # one image may lie on the rim
    # The planted error: the reference of all digits instead of every fourth.
    other = measured(folders[0], reference, extractor, ("fid", "kid"))
    assert other["fid"] != pytest.approx(theirs["frechet_inception_distance"], rel=ROUNDING)
    assert other["kid"] != pytest.approx(theirs["kernel_inception_distance_mean"], rel=ROUNDING)


@pytest.mark.slow
def test_the_digits_are_at_no_distance_from_themselves_and_noise_is_far(extractor, reference, digits, monkeypatch):
    # 5 of the 100 subsets: how they are drawn and averaged is tested above, on smaller ones.
    monkeypatch.setattr(metric_kid, "kid_features_to_metric", partial(metric_kid.kid_features_to_metric, kid_subsets=5))
    every = ("fid", "sfid", "isc", "kid", "prc")
    same = measured(digits, reference, extractor, every)
    half = measured(digits[::2], reference, extractor, ("fid", "sfid", "kid"))
    noise = np.random.default_rng(0).integers(0, 256, digits.shape, dtype=np.uint8)
    far = measured(noise, reference, extractor, every)
    assert abs(same["fid"]) < SELF_FID < half["fid"] < 1 < 50 < far["fid"]
    assert abs(same["sfid"]) < SELF_FID < half["sfid"] < 1 < far["sfid"]
    assert same["isc"] > 9 > 2 > far["isc"]
    assert same["kid"] < 0.01 < 1 < far["kid"]
    assert same["precision"] == same["recall"] == 1 and far["precision"] < 0.2 and far["recall"] < 0.01
    assert same["kid_subset_size"] == 1000 and half["kid_subset_size"] == 899


def test_is_of_one_image_repeated_is_1(extractor, digits):
    constant = np.repeat(digits[:1], 50, axis=0)
    assert measured(constant, None, extractor, ["isc"])["isc"] == pytest.approx(1, abs=1e-6)


def write_folder(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{index:05d}.png")


@pytest.mark.slow
def test_every_form_of_the_same_images_gives_the_same_numbers(extractor, reference, noisy, tmp_path):
    write_folder(tmp_path / "grey", noisy)
    write_folder(tmp_path / "rgb", noisy.repeat(3, axis=-1))
    np.savez(tmp_path / "samples.npz", noisy)
    forms = {
        "CHW": noisy.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(noisy).permute(0, 3, 1, 2),
        "three channels": noisy.repeat(3, axis=-1),
        "grey PNG": tmp_path / "grey",
        "RGB PNG": str(tmp_path / "rgb"),
        "npz": tmp_path / "samples.npz",
    }
    every = ("fid", "sfid", "isc", "kid")
    expected = measured(noisy, reference, extractor, every)
    for form, images in forms.items():
        assert measured(images, reference, extractor, every) == expected, form


@pytest.mark.slow
def test_metrics_of_cached_features_are_the_same_and_need_no_forward(
    extractor, reference, noisy, tmp_path, monkeypatch
):
    every = ("fid", "sfid", "isc", "kid", "prc")
    expected = measured(noisy, reference, extractor, every)
    first = measured(noisy, reference, extractor, every, cache=tmp_path)
    monkeypatch.setattr(extractor, "forward", None)
    again = measured(noisy, reference, extractor, every, cache=tmp_path)
    assert first == again == expected


@pytest.mark.slow
def test_a_metric_is_the_same_alone_and_beside_others(extractor, reference, noisy):
    every = ("prc", "kid", "isc", "sfid", "fid")
    together = measured(noisy, reference, extractor, every)
    apart = {}
    for metric in every:
        apart |= measured(noisy, reference, extractor, [metric])
    assert together == apart


@pytest.mark.slow
def test_batch_size_does_not_matter(extractor, reference, noisy):
    whole = measured(noisy, reference, extractor)
    parts = measured(noisy, reference, extractor, batch_size=33)
    assert parts == pytest.approx(whole, rel=ROUNDING)


def test_a_reference_of_other_weights_is_refused_before_any_work(extractor, reference, noisy, monkeypatch):
    monkeypatch.setattr(subject_module, "cached_features", lambda *_: pytest.fail("worked"))
    other = replace(reference, name="old", weights_hash="0" * 64)
    with pytest.raises(UserError, match="'old' were made with other weights"):
        measured(noisy, other, extractor)


@pytest.mark.parametrize(
    ("missing", "refused", "says"),
    [
        ("spatial", {"sfid"}, "sfid needs spatial statistics"),
        ("features", {"kid", "prc"}, "needs features of single images"),
    ],
)
def test_what_a_reference_lacks_is_told_before_any_work(
    missing, refused, says, extractor, reference, noisy, monkeypatch
):
    partial = replace(reference, name="part", **{missing: None})
    rest = possible_of(noisy, partial, extractor)
    assert set(OF_FEATURES) - set(rest) == refused
    assert {"fid", "isc"} < set(measured(noisy, partial, extractor, rest))
    monkeypatch.setattr(subject_module, "cached_features", lambda *_: pytest.fail("worked"))
    for metric in refused:
        with pytest.raises(UserError, match=rf"{says}.*'part'.*prepare_reference.py, or leave {metric} out"):
            measured(noisy, partial, extractor, ["fid", metric])


def test_possible_metrics(reference, extractor, noisy):
    assert possible_of(noisy[:1], reference, extractor) == []
    assert possible_of(noisy[:2], reference, extractor) == ["fid", "sfid", "kid"]
    assert possible_of(noisy[:4], reference, extractor) == ["fid", "sfid", "kid", "prc"]
    assert possible_of(noisy[:10], reference, extractor) == list(OF_FEATURES)
    assert possible_of(noisy[:10], None, extractor) == ["isc"] and possible_of(noisy[:9], None, extractor) == []
    assert possible_of(noisy[:10], reference, None) == []


@pytest.mark.parametrize("metric", OF_FEATURES)
def test_the_least_images_give_a_finite_number(metric, extractor, reference, noisy):
    least = METRICS[metric].least_images
    found = measured(noisy[:least], reference, extractor, [metric])
    assert all(np.isfinite(value) for value in found.values())
    with pytest.raises(UserError, match=f"{metric} needs {least} or more images, here are {least - 1}"):
        measured(noisy[: least - 1], reference, extractor, [metric])


def test_a_reference_without_single_images_gives_the_same_fid(extractor, reference, noisy):
    bare = replace(reference, features=None, spatial=None, weights_hash=None, images_hash=None)
    bare = replace(bare, gaussian=Gaussian(reference.gaussian.mu, reference.gaussian.sigma))
    full = measured(noisy, reference, extractor, ["fid"])
    found = measured(noisy, bare, extractor, ["fid"])
    assert found["fid"] == full["fid"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ("fid", "ssim")}, "list of names among fid, sfid, isc, kid, prc"),
        ({"metrics": "fid"}, "list of names among"),
        ({"metrics": ()}, "list of names among"),
        ({"reference": None}, "name the reference statistics"),
        ({"reference": None, "metrics": ("isc", "sfid")}, "name the reference statistics"),
        ({"batch_size": 0}, "batch size is 0; give 1 or more"),
        ({"images": np.zeros((20, 16, 16, 1), np.float32)}, "must be uint8, not torch.float32"),
        ({"images": np.zeros((20, 16, 16), np.uint8)}, r"\[N, H, W, C\] or \[N, C, H, W\]"),
        ({"images": np.zeros((20, 3, 16, 3), np.uint8)}, "axes into one of these orders"),
        ({"images": np.zeros((0, 3, 16, 16), np.uint8)}, "axes into one of these orders"),
        ({"images": np.zeros((9, 16, 16, 1), np.uint8)}, "isc needs 10 or more images, here are 9"),
    ],
)
def test_unusable_input_is_refused(extractor, reference, noisy, change, message):
    arguments = {"images": noisy, "reference": reference, "metrics": ("fid", "isc", "kid")} | change
    with pytest.raises(UserError, match=message):
        measured(extractor=extractor, **arguments)


def test_precision_needs_a_reference_of_more_images_than_neighbours(extractor, reference, noisy, monkeypatch):
    monkeypatch.setattr(subject_module, "cached_features", lambda *_: pytest.fail("worked"))
    few = replace(reference, name="few", features=reference.features[:3])
    with pytest.raises(UserError, match=r"prc needs features of 4 or more images.*'few' hold 3"):
        measured(noisy, few, extractor, ["prc"])
