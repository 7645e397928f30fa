"""Fidelity of a run to the float run with the same seeds: PSNR, SSIM and LPIPS of image i against image i.

Set metrics such as FID need thousands of images before a difference exceeds their noise; pairs of images with the same
seed show the changes by quantization from the first image on. torchmetrics computes the three metrics. It is imported
only when they are requested, because quantizing and sampling do not need it installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.evaluation.image_sets import FirstImages, FolderImages, ImageSet
from qdiff.evaluation.subject import Subject
from qdiff.io.progress import progress_bar
from qdiff.io.tensor_files import read_float_tensors

PEAK = 255.0
PSNR_CAP = 100.0  # dB; the PSNR of equal images is infinite, and one such pair would make the mean infinite
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
PIXELS_AT_A_TIME = 1 << 20  # SSIM holds about twenty float64 maps per channel: about half a GB

# LPIPS' backbones: torchvision's file, and the smallest side for which a pixel is left after the last pooling.
LPIPS_NETS = {
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 31),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", 16),
}


def fidelity(subject: Subject) -> dict[str, float]:
    """Return `compare_runs` of a subject's images (the first ``compared`` ones, if set) and the float run's."""
    sets = (subject.images, subject.float_images)
    if subject.compared is not None:
        sets = tuple(FirstImages(images, subject.compared) for images in sets)
    return compare_runs(
        *sets,
        lpips_weights=subject.lpips_weights,
        lpips_net=subject.lpips_net,
        device=subject.device,
        progress=subject.progress,
    )


def compare_runs(
    images: ImageSet,
    float_images: ImageSet,
    lpips_weights: Path | None = None,
    lpips_net: str = "alex",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, float]:
    """Compare a run's images with those of the float run, one by one.

    One image is enough; below about 64 images, the means say more about the seeds than about the model.

    Args:
        images: images of the quantized run.
        float_images: images of the float run, of the same number, size and order. Both should come from PNG files or
            arrays, because JPEG's own losses would count.
        lpips_weights: torchvision's weights of the backbone (a file of :data:`LPIPS_NETS`); None leaves LPIPS out.
        lpips_net: "alex" (as in papers) or "vgg".
        batch_size: images per batch.
        device: device of the comparison; must support float64.
        progress: show a progress bar.

    Returns:
        ``psnr``: mean over images of the peak signal-to-noise ratio in dB, 10·log10(255² / mean squared error), each at
        most :data:`PSNR_CAP`.
        ``identical``: number of images that are equal in every pixel.
        ``ssim``: mean over images of the structural similarity (Wang et al. 2004, Gaussian window 11×11 with σ 1.5, K1
        0.01, K2 0.03), at most 1. As in the paper, windows lie entirely within the image; colours are averaged.
        ``lpips``: mean perceptual distance (Zhang et al. 2018, version 0.1), 0 for equal images; only with
        ``lpips_weights``.

    Raises:
        UserError: the two sets do not pair up, images are smaller than 11×11 (for LPIPS 31×31 with alex, 16×16 with
            vgg), weights are missing or do not fit, or torchmetrics is not installed.
    """
    _check_pairs(images, float_images)
    ssim_and_psnr = _similarities()
    lpips = None if lpips_weights is None else _lpips(Path(lpips_weights), lpips_net).to(device)
    found: dict[str, list[Tensor]] = {"psnr": [], "identical": [], "ssim": []} | ({"lpips": []} if lpips else {})
    with (
        torch.inference_mode(),
        # Disable TF32 so that results do not depend on the GPU, even if no script has done so.
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        progress_bar(len(images), "fidelity", "img", disable=not progress) as bar,
    ):
        for ours, theirs in zip(images.batches(batch_size), float_images.batches(batch_size), strict=True):
            _check_sizes(ours, theirs, lpips_net if lpips else None)
            part = max(1, PIXELS_AT_A_TIME // ours[0, 0].numel())
            for x, y in zip(ours.split(part), theirs.split(part), strict=True):
                x, y = x.to(device), y.to(device)
                psnr, ssim = ssim_and_psnr(x, y)
                found["psnr"].append(psnr.cpu())
                found["identical"].append((x == y).flatten(1).all(1).cpu())
                found["ssim"].append(ssim.cpu())
                if lpips:
                    distance = lpips(x / (PEAK / 2) - 1, y / (PEAK / 2) - 1)  # float32 in [-1, 1]
                    found["lpips"].append(distance.flatten().double().cpu())
                bar.update(len(x))
    each = {name: torch.cat(values) for name, values in found.items()}
    return {name: int(v.sum()) if name == "identical" else float(v.mean()) for name, v in each.items()}


def mean_ssim(images: Tensor, float_images: Tensor) -> float:
    """Return the mean structural similarity of images, as `compare_runs` does.

    Args:
        images, float_images: uint8 [N, C, H, W] with 1 or 3 channels.
    """
    _check_sizes(images, float_images, None)
    return float(_similarities()(images, float_images)[1].mean())


def _similarities() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the function from two batches uint8 [n, 3, H, W] to their PSNR [n] and SSIM [n]."""
    functions = require_torchmetrics().functional.image
    border = SSIM_WINDOW // 2

    def measure(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if all(torch.equal(z[:, :1].expand_as(z), z) for z in (x, y)):
            x, y = x[:, :1], y[:, :1]  # grey: one channel gives the same in a third of the time
        # float64: variances are differences of squares up to 65,025; in float32 even equal images lose 0.001 of SSIM.
        x, y = x.double(), y.double()
        psnr = functions.peak_signal_noise_ratio(x, y, data_range=PEAK, dim=(1, 2, 3), reduction="none")
        _, ssim = functions.structural_similarity_index_measure(
            x,
            y,
            kernel_size=SSIM_WINDOW,
            sigma=SSIM_SIGMA,
            data_range=PEAK,
            reduction="none",
            return_full_image=True,
        )
        # torchmetrics mirrors the image at the border, and its versions differ in whether that part counts.
        inside = ssim[..., border:-border, border:-border]
        return psnr.clamp(max=PSNR_CAP), inside.mean((1, 2, 3))

    return measure


def require_torchmetrics() -> Any:
    """Return the package, or raise a `UserError` that says how to install it."""
    try:
        import torchmetrics.functional.image
    except ImportError as error:
        raise UserError(
            f"comparing images needs the package torchmetrics, which cannot be imported here ({error}); "
            "install it with 'pip install -c constraints.txt torchmetrics'"
        ) from error
    return torchmetrics


def _lpips(path: Path, net: str) -> nn.Module:
    """Return torchmetrics' LPIPS with the backbone's weights from a file; its linear heads are part of torchmetrics."""
    if net not in LPIPS_NETS:
        raise UserError(f"there is no LPIPS backbone {net!r}; choose from {', '.join(LPIPS_NETS)}")
    url, _ = LPIPS_NETS[net]
    if not path.is_file():
        raise UserError(f"the weights of LPIPS are missing, there is no file {path}; download {url} and give its path")
    state = read_float_tensors(path)
    require_torchmetrics()
    from torchmetrics.functional.image.lpips import _LPIPS

    with torch.random.fork_rng(devices=[]):  # random weights are drawn and then replaced
        model = _LPIPS(net=net, pnet_rand=True)  # the public class would download the backbone
    # torchvision's features.3.weight is slice2.3.weight in torchmetrics; classifier.* is not used.
    own = {f"features.{name.split('.', 1)[1]}": name for name in model.net.state_dict()}
    shapes = {name: model.net.state_dict()[there].shape for name, there in own.items()}
    unfit = sorted(name for name in own if name not in state or state[name].shape != shapes[name])
    if unfit:
        raise UserError(
            f"{path} does not hold the weights of LPIPS' backbone {net} ({len(unfit)} tensors missing or of another "
            f"shape, e.g. {unfit[0]}); download {url} and give its path"
        )
    model.net.load_state_dict({there: state[name] for name, there in own.items()})
    return model.eval()


def _check_pairs(images: ImageSet, float_images: ImageSet) -> None:
    """Raise a `UserError` if image i of one set does not correspond to image i of the other."""
    if len(images) != len(float_images):
        raise UserError(
            f"a run of {len(images)} images cannot be compared one by one with a float run of {len(float_images)}; "
            "sample the same seeds with both"
        )
    if not isinstance(images, FolderImages) or not isinstance(float_images, FolderImages):
        return
    for ours, theirs in zip(images.paths, float_images.paths, strict=True):
        names = (path.relative_to(s.folder).with_suffix("") for path, s in ((ours, images), (theirs, float_images)))
        if len(set(names)) > 1:  # different missing images in the two folders would shift the pairs
            raise UserError(
                f"{ours} would be compared with {theirs}; give images with the same seed the same name in both folders"
            )


def _check_sizes(ours: Tensor, theirs: Tensor, lpips_net: str | None) -> None:
    """Raise a `UserError` if images differ in size, or are too small for SSIM or LPIPS."""
    (height, width), other = ours.shape[-2:], theirs.shape[-2:]
    if (height, width) != other:
        raise UserError(
            f"images of {width}×{height} pixels cannot be compared with the float run's of {other[1]}×{other[0]}; "
            "sample both with the same model"
        )
    if min(height, width) < SSIM_WINDOW:
        raise UserError(
            f"images of {width}×{height} pixels are too small for SSIM, whose window is {SSIM_WINDOW}×{SSIM_WINDOW}; "
            "compare larger ones"
        )
    if lpips_net is not None and min(height, width) < (least := LPIPS_NETS[lpips_net][1]):
        raise UserError(
            f"images of {width}×{height} pixels are too small for LPIPS with {lpips_net}, which needs {least}×{least}; "
            "leave out its weights"
        )
