"""The data sets that published numbers are measured against, and where to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qdiff.errors import UserError
from qdiff.io.downloads import cache_folder


@dataclass(frozen=True)
class CropResize:
    """Crops an image to its centre square and resizes it with Pillow's bicubic filter (antialiased); never flips.

    As in LDM's loader, ``ldm/data/lsun.py`` of CompVis/latent-diffusion: if the difference between the sides is odd,
    the odd pixel is cut off at the right or bottom. torchvision's CenterCrop rounds half of these cases the other way.
    """

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        left, top = ((side - short) // 2 for side in image.size)
        square = image.crop((left, top, left + short, top + short))
        return square.resize((self.size, self.size), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Dataset:
    """One entry of :data:`DATASETS`.

    Attributes:
        title: readable description of the images: data set and split.
        count: number of images.
        sides: height and width of the images after ``prepare``.
        prepare: applied to every image of a folder or an LMDB; None uses the images unchanged.
        treatment: description of ``prepare``; "" for none.
        options: options that can name it, the usual one first: "images", "lmdb" or "npz".
        url: address of the published file.
        size: bytes of that file; None if unknown.
        md5, sha256: its checksum, at most one of them; None if none was published.
        unpacks_to: folder in the .zip that holds the images; None for a file that is read without unpacking.
        brings_statistics: the file holds mean and covariance of more images than it contains.
        known_counts: other common numbers of images: number → description.
    """

    title: str
    count: int
    sides: int
    options: tuple[str, ...]
    url: str
    prepare: CropResize | None = None
    treatment: str = ""
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    unpacks_to: str | None = None
    brings_statistics: bool = False
    known_counts: tuple[tuple[int, str], ...] = ()

    @property
    def file(self) -> Path:
        """Path of the downloaded file."""
        return cache_folder() / "datasets" / self.url.rsplit("/", 1)[1]

    @property
    def cached(self) -> Path:
        """Path of the images after a download: the file, or the folder that it was unpacked to."""
        return self.file if self.unpacks_to is None else self.file.parent / self.unpacks_to

    def where_to_get(self) -> str:
        """Return the file's address and size, for errors."""
        return self.url if self.size is None else f"{self.url} ({self.size / 1e9:.1f} GB)"

    def describe(self, count: int, first: bool = False) -> str:
        """Return the name of statistics of ``count`` images (``first``: only the first images were taken).

        The name shows if the number of images is unusual.
        """
        known = {self.count: "", **dict(self.known_counts)}
        if first:
            which = f"first {count:,}"
        else:
            which = f"{count:,} images" + ("" if count in known else f" instead of {self.count:,}")
            if known.get(count):
                which += f" ({known[count]})"
        return f"{self.title}, {which}, " + (self.treatment or f"{self.sides}×{self.sides} as published")


def _cropped(size: int) -> dict:
    return {
        "sides": size,
        "prepare": CropResize(size),
        "treatment": f"centre crop as LDM's loader, Pillow bicubic to {size}×{size}",
    }


# Checksums: CIFAR-10 from torchvision.datasets.CIFAR10.tgz_md5; LSUN and COCO (with the sizes) from TensorFlow
# Datasets, tensorflow_datasets/url_checksums/lsun.txt and coco.txt. None was found for the reference batch.
# LSUN and COCO are published under http; the checksum makes up for it.
DATASETS: dict[str, Dataset] = {
    "cifar10": Dataset(
        title="CIFAR-10 train",
        count=50_000,
        sides=32,
        options=("images", "npz"),
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        size=170_498_071,
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    "lsun_bedroom": Dataset(
        title="LSUN bedroom train",
        count=3_033_042,
        known_counts=((3_028_042, "without LDM's 5,000 for validation"),),
        **_cropped(256),
        options=("lmdb", "images"),
        url="http://dl.yf.io/lsun/scenes/bedroom_train_lmdb.zip",
        size=45_922_737_680,
        sha256="a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e",
        unpacks_to="bedroom_train_lmdb",
    ),
    "lsun_church": Dataset(
        title="LSUN church_outdoor train",
        count=126_227,
        known_counts=((121_227, "without LDM's 5,000 for validation"),),
        **_cropped(256),
        options=("lmdb", "images"),
        url="http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip",
        size=2_448_463_466,
        sha256="91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a",
        unpacks_to="church_outdoor_train_lmdb",
    ),
    "imagenet256": Dataset(
        title="ImageNet train, ADM's reference batch",
        count=10_000,
        sides=256,
        options=("npz",),
        url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
        "VIRTUAL_imagenet256_labeled.npz",
        brings_statistics=True,
        treatment="256×256 as published, mean and covariance of the whole training set as published",
    ),
    "coco2014val": Dataset(
        title="COCO val2014",
        count=40_504,
        **_cropped(512),
        options=("images",),
        url="http://images.cocodataset.org/zips/val2014.zip",
        size=6_645_013_297,
        sha256="fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        unpacks_to="val2014",
    ),
}


def find_dataset(name: str) -> Dataset:
    """Return the entry called ``name``; an unknown name is a UserError that lists the known ones."""
    if name not in DATASETS:
        raise UserError(f"there is no data set {name!r}; choose from {', '.join(DATASETS)}")
    return DATASETS[name]
