"""Make the reference statistics of a data set, which published numbers are measured against, for evaluate.py.

    python scripts/prepare_reference.py cifar10 --images ~/data/cifar-10-python.tar.gz
    python scripts/prepare_reference.py lsun_church --lmdb ~/data/church_outdoor_train_lmdb
    python scripts/prepare_reference.py imagenet256 --npz VIRTUAL_imagenet256_labeled.npz
    python scripts/prepare_reference.py coco2014val --download

writes one .npz below $QDIFF_CACHE (by default ~/.cache/qdiff), where evaluate.py finds it by the data set's name.
Images are cropped and resized as in the papers' loaders. Nothing is downloaded without --download.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys
from pathlib import Path

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.errors import UserError, require_at_least
from qdiff.evaluation.datasets import DATASETS, find_dataset


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("name", metavar="NAME", help=f"the data set: {', '.join(DATASETS)}")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, help="folder of images, subfolders included; CIFAR-10 also as .tar.gz")
    source.add_argument("--lmdb", type=Path, help="folder of an LSUN LMDB (needs the package lmdb)")
    source.add_argument("--npz", type=Path, help="file with the images as arr_0, uint8 [N, H, W, 3]")
    source.add_argument("--download", action="store_true", help="download the data set into $QDIFF_CACHE/datasets")
    parser.add_argument("--extractor", default="inception-v3-compat", help="default: inception-v3-compat")
    parser.add_argument("--extractor-weights", type=Path, help="weights file of the extractor")
    parser.add_argument("--device", help="e.g. cpu, cuda:0 (default: CUDA if available)")
    parser.add_argument("--batch_size", type=int, help="images per forward pass (default: as many as fit in memory)")
    parser.add_argument("--max_images", type=int, help="use only this many images, from the first")
    parser.add_argument("--out", type=Path, help="the file to write (.npz; default: below $QDIFF_CACHE/references)")
    args = parser.parse_args(arguments)
    for option, least in (("batch_size", 1), ("max_images", 2)):
        require_at_least(least, {f"--{option}": getattr(args, option)})
    if args.out is not None and args.out.suffix != ".npz":
        raise UserError(f"--out is {args.out}; give a name that ends in .npz")
    if args.max_images is not None and find_dataset(args.name).brings_statistics:
        raise UserError(f"{args.name} has published statistics of all its images; leave --max_images out")
    return args


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    from qdiff.cli.processes import choose_device
    from qdiff.evaluation.dataset_images import dataset_reference, locate, open_dataset
    from qdiff.evaluation.extractors import create_extractor
    from qdiff.evaluation.image_sets import FirstImages
    from qdiff.evaluation.reference import cached_reference_path, save_reference
    from qdiff.io.files import check_writable

    dataset = find_dataset(args.name)
    extractor = create_extractor(args.extractor, args.extractor_weights, choose_device(args.device))
    check_writable(args.out or cached_reference_path(args.name, extractor))
    option = next((o for o in ("images", "lmdb", "npz") if getattr(args, o) is not None), None)
    option, path = locate(args.name, option, option and getattr(args, option), args.download)
    images = open_dataset(args.name, option, path, args.max_images)
    first = isinstance(images, FirstImages)
    # Statistics of another number of images must not be mistaken for the published ones.
    suffix = f"-first{len(images)}" if first else "" if len(images) == dataset.count else f"-{len(images)}"
    kept_as = args.name + suffix
    out = args.out or cached_reference_path(kept_as, extractor)
    if args.out is None and out.exists():
        print(f"{out} already exists; delete it to make it again")
        return
    title = dataset.describe(len(images), first)
    if suffix and not first:
        print(f"warning: {path} holds {title}", file=sys.stderr)
    reference = dataset_reference(args.name, path, images, title, extractor, args.batch_size)
    save_reference(reference, out)
    print(f"{out}: {reference.name}; by {args.extractor}")
    if args.out is None:
        print(f"evaluate.py finds it by the name {kept_as}")


if __name__ == "__main__":
    main()
