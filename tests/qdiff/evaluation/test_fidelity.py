"""PSNR, SSIM and LPIPS of pairs of images against float64 arithmetic of their own."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from structural_similarity import SSIM_TOLERANCE, ssim

from qdiff.errors import UserError
from qdiff.evaluation.fidelity import LPIPS_NETS, PSNR_CAP, compare_runs
from qdiff.evaluation.image_sets import ArrayImages, open_images

PSNR_TOLERANCE = 1e-5  # dB; torchmetrics takes the peak's logarithm in float32
LPIPS_TOLERANCE = 1e-5  # relative, float32 convolutions
SLICE_ENDS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # ReLUs in torchvision's ``features``


@pytest.fixture(autouse=True)
def nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"asked for {args}")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def pair(count=3, height=16, width=19, seed=0, noise=40, low=0, high=256):
    """Smooth images uint8 [N, H, W, 3] and noisy ones beside them."""
    random = np.random.default_rng(seed)
    coarse = random.integers(low, high, (count, height // 4 + 1, width // 4 + 1, 3))
    smooth = coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    noisy = np.clip(smooth + random.integers(-noise, noise + 1, smooth.shape), 0, 255)
    return noisy.astype(np.uint8), smooth.astype(np.uint8)


def compare(a, b, **options):
    return compare_runs(open_images(a), open_images(b), progress=False, **options)


def psnr(a, b, peak=255.0):
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return float(np.mean(10 * np.log10(peak**2 / error.mean((1, 2, 3)))))


def test_psnr_and_ssim_equal_their_definitions():
    for size in ({}, {"count": 1, "height": 11, "width": 11}, {"low": 240, "noise": 2, "count": 5}):
        a, b = pair(**size)
        found = compare(a, b, batch_size=2)
        assert list(found) == ["psnr", "identical", "ssim"]
        assert found["psnr"] == pytest.approx(psnr(a, b), abs=PSNR_TOLERANCE)
        assert found["ssim"] == pytest.approx(ssim(a, b), abs=SSIM_TOLERANCE)
        assert found["identical"] == 0


def test_the_tolerances_break_on_planted_errors():
    a, b = pair()
    mse = np.mean((a.astype(float) - b) ** 2)
    assert abs(psnr(a, b, peak=256.0) - psnr(a, b)) > 100 * PSNR_TOLERANCE
    assert abs(10 * np.log10(255**2 / mse) - psnr(a, b)) > 100 * PSNR_TOLERANCE  # mean of errors, not of decibels
    for planted in ({"sigma": 1.6}, {"c": (0.01, 0.031)}, {"c": (0.02, 0.03)}, {"mode": "same"}):
        assert abs(ssim(a, b, **planted) - ssim(a, b)) > 1e3 * SSIM_TOLERANCE, planted


@pytest.mark.slow
def test_equal_images_count_with_the_cap():
    a, b = pair(count=4)
    a[1:3] = b[1:3]
    found = compare(a, b, batch_size=3)
    assert found["identical"] == 2 and type(found["identical"]) is int
    assert found["psnr"] == pytest.approx((2 * PSNR_CAP + 2 * psnr(a[::3], b[::3])) / 4, abs=PSNR_TOLERANCE)
    assert compare(b, b) == {"psnr": PSNR_CAP, "identical": 4, "ssim": pytest.approx(1, abs=SSIM_TOLERANCE)}
    # One level in one channel of one large image is 101 dB.
    large = np.zeros((1, 256, 256, 3), np.uint8)
    other = large.copy()
    other[0, 0, 0, 0] = 1
    found = compare(large, other)
    assert psnr(large, other) > PSNR_CAP == found["psnr"] and found["identical"] == 0


def test_equal_white_images_are_equal():
    """In float32 variances of bright images are lost in rounding: this would give 0.9992."""
    white = np.full((1, 16, 16, 3), 255, np.uint8)
    assert compare(white, white)["ssim"] == pytest.approx(1, abs=SSIM_TOLERANCE)


def test_grey_images_have_the_value_of_their_channel():
    a, b = (images[..., :1] for images in pair())
    found = compare(a, b)
    assert found["ssim"] == pytest.approx(ssim(a, b), abs=SSIM_TOLERANCE)
    assert found["psnr"] == pytest.approx(psnr(a, b), abs=PSNR_TOLERANCE)


def test_neither_batches_nor_sides_matter(monkeypatch):
    a, b = pair(count=7)
    expected = compare(a, b)
    assert compare(b, a) == pytest.approx(expected, abs=1e-12)
    assert compare(a, b, batch_size=2) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr("qdiff.evaluation.fidelity.PIXELS_AT_A_TIME", 1)
    assert compare(a, b) == pytest.approx(expected, abs=1e-12)
    assert compare(a, np.roll(b, 1, 0))["psnr"] < expected["psnr"] - 1  # image i against image i


# ---------------------------------------------------------------------- LPIPS


def backbone(net, seed=0):
    import torchvision

    torch.manual_seed(seed)
    features = getattr(torchvision.models, {"alex": "alexnet", "vgg": "vgg16"}[net])(weights=None).features.eval()
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):  # of a size that activations keep: else the 1e-8 would hide errors
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return features


@pytest.fixture(scope="module", params=LPIPS_NETS)
def network(request, tmp_path_factory):
    """Name, random backbone, and a file of its weights as torchvision publishes them."""
    features = backbone(request.param)
    path = tmp_path_factory.mktemp("lpips") / "weights.pth"
    unused = {"classifier.6.bias": torch.zeros(1000)}
    torch.save({f"features.{name}": v for name, v in features.state_dict().items()} | unused, path)
    return request.param, features, path


@torch.no_grad()
def lpips(a, b, net, features, scale=127.5, layers=5):
    """Zhang et al. 2018, equation 1: unit-length features of five layers, squared differences, weighed and averaged."""
    import torchmetrics

    bundled = Path(torchmetrics.__file__).parent / "functional/image/lpips_models" / f"{net}.pth"
    heads = torch.load(bundled, map_location="cpu", weights_only=True)
    mean, std = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    outputs = []
    for images in (a, b):
        x = torch.from_numpy(((images / scale - 1 - mean) / std).transpose(0, 3, 1, 2)).float()
        seen = []
        for index, layer in enumerate(features[: SLICE_ENDS[net][-1] + 1]):
            x = layer(x)
            if index in SLICE_ENDS[net]:
                seen.append(x.double().numpy().copy())  # the next pooling reads it, a ReLU in place may not change it
        outputs.append(seen)
    total = np.zeros(len(a))
    for layer, (u, v) in enumerate(zip(*outputs, strict=True)):
        u, v = (f / np.sqrt((f**2).sum(1, keepdims=True) + 1e-8) for f in (u, v))
        weights = heads[f"lin{layer}.model.1.weight"].double().numpy()
        if layer < layers:
            total += (weights * (u - v) ** 2).sum(1).mean((1, 2))
    return float(total.mean())


@pytest.mark.slow
def test_lpips_equals_its_definition(network):
    net, features, path = network
    side = LPIPS_NETS[net][1]
    a, b = pair(height=side, width=side + 6)
    state = torch.random.get_rng_state()
    found = compare(a, b, lpips_weights=path, lpips_net=net, batch_size=2)
    assert torch.equal(state, torch.random.get_rng_state())
    expected = lpips(a, b, net, features)
    assert list(found) == ["psnr", "identical", "ssim", "lpips"]
    assert found["lpips"] == pytest.approx(expected, rel=LPIPS_TOLERANCE)
    # The tolerance breaks on another range of the input, and on a layer left out.
    for planted in (lpips(a, b, net, features, scale=128), lpips(a, b, net, features, layers=4)):
        assert abs(planted / expected - 1) > 10 * LPIPS_TOLERANCE


@pytest.mark.slow
def test_lpips_of_equal_images_and_of_other_weights(tmp_path):
    a, b = pair(count=1, height=32, width=32)
    features = backbone("alex", seed=1)
    torch.save({f"features.{name}": v for name, v in features.state_dict().items()}, tmp_path / "w.pth")
    assert compare(b, b, lpips_weights=tmp_path / "w.pth")["lpips"] == 0
    found = compare(a, b, lpips_weights=tmp_path / "w.pth")["lpips"]
    assert found == pytest.approx(lpips(a, b, "alex", features), rel=LPIPS_TOLERANCE)
    assert abs(lpips(a, b, "alex", backbone("alex", seed=0)) / found - 1) > 10 * LPIPS_TOLERANCE


@pytest.mark.slow
def test_images_too_small_for_lpips_are_told(network):
    net, _, path = network
    least = LPIPS_NETS[net][1]
    a, b = pair(height=least, width=least - 1)
    assert set(compare(a, b)) == {"psnr", "identical", "ssim"}
    message = says(lambda: compare(a, b, lpips_weights=path, lpips_net=net))
    assert f"{least - 1}×{least}" in message and f"needs {least}×{least}" in message


@pytest.mark.slow
def test_unfit_lpips_weights_are_told(tmp_path):
    net, features = "alex", backbone("alex")
    a, b = pair(height=32, width=32)

    def message(weights):
        return says(lambda: compare(a, b, lpips_weights=weights, lpips_net=net))

    url = LPIPS_NETS[net][0]
    assert url in message(tmp_path / "nowhere.pth") and "nowhere.pth" in message(tmp_path / "nowhere.pth")
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    last = sorted(state)[-1]
    for change in ({}, {last: torch.zeros(3)}):
        torch.save({n: v for n, v in state.items() if n != last} | change, tmp_path / "unfit.pth")
        assert url in message(tmp_path / "unfit.pth") and last in message(tmp_path / "unfit.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "unfit.pth").read_bytes()[:1000])
    assert "cut.pth" in message(tmp_path / "cut.pth")


def test_files_are_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    a, b = pair(height=32, width=32)
    says(lambda: compare(a, b, lpips_weights=tmp_path / "trap.pth"))
    assert not (tmp_path / "ran").exists()


def test_other_backbones_are_told():
    a, b = pair()
    assert "alex, vgg" in says(lambda: compare(a, b, lpips_weights=Path("x"), lpips_net="squeeze"))


# ---------------------------------------------------------------------- what cannot be compared


def says(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sets_that_do_not_pair_up():
    a, b = pair()
    message = says(lambda: compare(a, b[:2]))
    assert "3 images" in message and "float run of 2" in message
    message = says(lambda: compare(a, b[:, :, :-1]))
    assert "19×16" in message and "18×16" in message
    message = says(lambda: compare(a[:, :10], b[:, :10]))
    assert "19×10" in message and "11×11" in message


def test_folders_pair_by_name(tmp_path):
    a, b = pair(count=2)
    for folder, images, names in (("ours", a, "02"), ("float", b, "02"), ("other", b, "01")):
        (tmp_path / folder).mkdir()
        for image, name in zip(images, names, strict=True):
            Image.fromarray(image).save(tmp_path / folder / f"{name}.png")
    found = compare(tmp_path / "ours", tmp_path / "float")
    assert found == compare(a, b) == compare(tmp_path / "ours", b)
    message = says(lambda: compare(tmp_path / "ours", tmp_path / "other"))
    assert "2.png" in message and "1.png" in message and "0.png" not in message


def test_without_torchmetrics_the_error_says_how_to_get_it(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "torchmetrics":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    a, b = pair()
    assert "pip install -c constraints.txt torchmetrics" in says(lambda: compare(a, b))


@pytest.mark.gpu
def test_cards_give_the_same_numbers(tmp_path):
    features = backbone("alex")
    torch.save({f"features.{name}": v for name, v in features.state_dict().items()}, tmp_path / "w.pth")
    a, b = pair(height=64, width=64)
    sets = ArrayImages(torch.from_numpy(a)), ArrayImages(torch.from_numpy(b))
    cpu, gpu = (compare_runs(*sets, tmp_path / "w.pth", device=d, progress=False) for d in ("cpu", "cuda"))
    assert gpu.pop("lpips") == pytest.approx(cpu.pop("lpips"), rel=LPIPS_TOLERANCE)
    assert gpu == pytest.approx(cpu, abs=SSIM_TOLERANCE)
