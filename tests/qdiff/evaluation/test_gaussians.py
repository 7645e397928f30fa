"""Means, covariances and Fréchet distances against NumPy and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from qdiff.evaluation.gaussians import Gaussian, RunningGaussian, frechet_distance

SUMS = 1e-12  # relative: float64 sums in another order
FAR_SUMS = 1e-7  # relative, with a mean 10⁶ times the spread: float64 keeps 10 digits of it
FULL_RANK = 1e-10  # relative: float64 eigenvalues, none near zero
LOW_RANK = 1e-6  # relative: eigenvalues that should be zero are ±1e-16, and a root makes 1e-8 of each


@pytest.fixture
def random():
    return np.random.default_rng(0)


def rotation(random: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(size, size)))[0]


def centred(sigma: np.ndarray) -> Gaussian:
    return Gaussian(np.zeros(len(sigma)), sigma)


def nuclear_norm(matrix: np.ndarray) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


@pytest.mark.parametrize("sizes", [[57], [1] * 57, [50, 7], [1, 56], [2, 3, 5, 7, 11, 13, 16]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batches_of_any_sizes_give_mean_and_covariance(random, sizes, dtype):
    features = (random.normal(3.0, 2.0, (57, 6)) @ random.normal(size=(6, 6))).astype(dtype)
    running = RunningGaussian()
    for batch in np.split(features, np.cumsum(sizes)[:-1]):
        running.add(batch)
    found, exact = running.result(), features.astype(np.float64)
    expected = np.cov(exact, rowvar=False)
    assert found.count == 57 and found.mu.dtype == found.sigma.dtype == np.float64
    assert found.mu == pytest.approx(exact.mean(axis=0), rel=SUMS)
    assert np.abs(found.sigma - expected).max() < SUMS * np.abs(expected).max()
    # The planted errors: the divisor N, and one vector left out.
    for wrong in (found.sigma * 56 / 57, np.cov(exact[:-1], rowvar=False)):
        assert np.abs(wrong - expected).max() > SUMS * np.abs(expected).max()


def test_float32_features_are_summed_in_float64(random):
    features = random.normal(3.0, 2.0, (1000, 4)).astype(np.float32)
    found = Gaussian.of(features)
    assert found.mu == pytest.approx(features.astype(np.float64).mean(axis=0), rel=SUMS)
    # The planted error: float32 sums.
    assert features.mean(axis=0).astype(np.float64) != pytest.approx(found.mu, rel=SUMS)


def test_a_mean_far_larger_than_the_spread_costs_no_digits(random):
    features = random.normal(size=(300, 5)) + 1e6
    running, products, total = RunningGaussian(), np.zeros((5, 5)), np.zeros(5)
    for batch in np.split(features, 10):
        running.add(batch)
        products, total = products + batch.T @ batch, total + batch.sum(axis=0)
    expected = np.cov(features, rowvar=False)
    assert np.abs(running.result().sigma - expected).max() < FAR_SUMS
    # The planted error: the sum of squares less the square of the sum.
    naive = (products - np.outer(total, total) / 300) / 299
    assert np.abs(naive - expected).max() > 1000 * FAR_SUMS


def test_the_result_may_be_asked_for_between_batches(random):
    features, running = random.normal(size=(40, 3)), RunningGaussian()
    running.add(features[:10])
    early = running.result()
    kept = early.sigma.copy()
    running.add(features[10:])
    assert np.array_equal(early.sigma, kept)
    assert early.sigma == pytest.approx(np.cov(features[:10], rowvar=False), rel=SUMS)
    assert running.result().sigma == pytest.approx(Gaussian.of(features).sigma, rel=SUMS)


@pytest.mark.parametrize(
    ("mu", "sigma", "says"),
    [
        (np.zeros(3), np.eye(2), r"\[D\] and \[D, D\]"),
        (np.zeros((3, 1)), np.eye(3), r"\[D\] and \[D, D\]"),
        (np.zeros(3), np.ones(3), r"\[D\] and \[D, D\]"),
        (np.array([0.0, np.nan]), np.eye(2), "not finite"),
        (np.zeros(2), np.array([[1.0, np.inf], [np.inf, 1.0]]), "not finite"),
    ],
)
def test_what_is_no_gaussian_is_refused(mu, sigma, says):
    with pytest.raises(ValueError, match=says):
        Gaussian(mu, sigma)


def test_one_vector_has_no_covariance():
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        Gaussian.of(np.ones((1, 3)))


def test_equal_covariances_leave_the_distance_of_the_means(random):
    size = 100
    factor = random.normal(size=(size, 2 * size))
    sigma, step = factor @ factor.T / (2 * size), random.normal(size=size)
    found = frechet_distance(Gaussian(np.ones(size), sigma), Gaussian(np.ones(size) + step, sigma))
    assert found == pytest.approx(step @ step, rel=FULL_RANK)
    # The planted error: the distance, not its square.
    assert np.linalg.norm(step) != pytest.approx(found, rel=FULL_RANK)


@pytest.mark.parametrize("size", [1, 7, 300])
@pytest.mark.parametrize("rotated", [False, True])
def test_commuting_covariances(random, size, rotated):
    a, b = random.uniform(0.1, 5.0, (2, size))
    axes = rotation(random, size) if rotated else np.eye(size)
    mu = random.normal(size=(2, size))
    one, other = (Gaussian(m, axes @ np.diag(d) @ axes.T) for m, d in zip(mu, (a, b), strict=True))
    expected = ((mu[0] - mu[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=FULL_RANK)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=FULL_RANK)
    # The planted errors: one variance in a thousand wrong, and no root.
    assert frechet_distance(Gaussian(one.mu, one.sigma * 1.001), other) != pytest.approx(expected, rel=FULL_RANK)
    assert ((mu[0] - mu[1]) ** 2).sum() + ((a - b) ** 2).sum() != pytest.approx(expected, rel=FULL_RANK)


def test_covariances_that_do_not_commute(random):
    a, b = random.normal(size=(2, 300, 200))  # of full rank 200, where tr (Σ₁Σ₂)^½ is the nuclear norm of ABᵀ
    expected = (a**2).sum() + (b**2).sum() - 2 * nuclear_norm(a @ b.T)
    assert frechet_distance(centred(a.T @ a), centred(b.T @ b)) == pytest.approx(expected, rel=FULL_RANK)
    # The planted error: the formula of those that commute.
    roots = [np.sqrt(np.linalg.eigvalsh(m.T @ m)) for m in (a, b)]
    assert ((roots[0] - roots[1]) ** 2).sum() != pytest.approx(expected, rel=FULL_RANK)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scaled_identities(scale):
    one, other = centred(4 * scale * np.eye(200)), centred(9 * scale * np.eye(200))
    assert frechet_distance(one, other) == pytest.approx(200 * scale, rel=FULL_RANK)


def low_rank(random: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return A, B with Σ₁ = AᵀA, Σ₂ = BᵀB of rank 13 or less in 300 dimensions."""
    a = random.normal(size=(13, 300))
    if kind == "other subspaces":
        return a, random.normal(size=(9, 300))
    if kind == "one subspace":
        return a, random.normal(size=(13, 13)) @ a / 4
    axes = rotation(random, 300)  # "orthogonal subspaces"
    return 3 * axes[:13], 2 * axes[13:22]


@pytest.mark.parametrize("kind", ["other subspaces", "one subspace", "orthogonal subspaces"])
def test_covariances_without_full_rank(random, kind):
    a, b = low_rank(random, kind)
    expected = (a**2).sum() + (b**2).sum() - 2 * nuclear_norm(a @ b.T)
    found = frechet_distance(centred(a.T @ a), centred(b.T @ b))
    assert found == pytest.approx(expected, rel=LOW_RANK)
    # The planted errors: an offset of 1e-3 on both diagonals, and one direction left out.
    offset = 1e-3 * np.eye(300)
    assert frechet_distance(centred(a.T @ a + offset), centred(b.T @ b + offset)) != pytest.approx(
        expected, rel=LOW_RANK
    )
    assert frechet_distance(centred(a[1:].T @ a[1:]), centred(b.T @ b)) != pytest.approx(expected, rel=LOW_RANK)


def test_a_few_vectors_are_at_no_distance_from_themselves(random):
    gaussian = Gaussian.of(random.normal(size=(14, 300)))
    assert abs(frechet_distance(gaussian, gaussian)) < LOW_RANK * np.trace(gaussian.sigma)
    further = Gaussian(gaussian.mu + 0.01, gaussian.sigma)  # the planted error
    assert frechet_distance(gaussian, further) > LOW_RANK * np.trace(gaussian.sigma)


def test_images_all_alike_have_no_covariance(random):
    step, factor = random.normal(size=50), random.normal(size=(70, 50))
    point, other = centred(np.zeros((50, 50))), Gaussian(step, np.zeros((50, 50)))
    assert frechet_distance(point, other) == pytest.approx(step @ step, rel=FULL_RANK)
    assert frechet_distance(other, centred(factor.T @ factor)) == pytest.approx(
        step @ step + (factor**2).sum(), rel=FULL_RANK
    )


@pytest.mark.parametrize("without", ["disp", "sqrtm"])
def test_no_scipy_root_is_needed(random, monkeypatch, without):
    """Newer SciPy has no ``sqrtm(disp=…)``, which other implementations of FID call."""
    gaussians = [Gaussian.of(random.normal(size=(60, 20))) for _ in range(2)]
    expected = frechet_distance(*gaussians)
    root = scipy.linalg.sqrtm

    def changed(matrix, **options):
        if without == "sqrtm" or "disp" in options:
            raise TypeError("sqrtm() got an unexpected keyword argument 'disp'")
        return root(matrix, **options)

    monkeypatch.setattr(scipy.linalg, "sqrtm", changed)
    with pytest.raises(TypeError):
        scipy.linalg.sqrtm(np.eye(2), disp=False)
    assert frechet_distance(*gaussians) == expected
