"""Evaluate samples: FID, sFID, IS, KID, precision and recall, CLIP score, and fidelity to a float run.

    python scripts/evaluate.py REFERENCE.npz SAMPLES.npz                  # guided-diffusion's protocol
    python scripts/evaluate.py lsun_church runs/church-w4a8               # statistics by name (prepare_reference.py)
    python scripts/evaluate.py digits runs/w4a8 --against runs/float      # and PSNR, SSIM to the float run's images
    python scripts/evaluate.py real_images/ samples/ --metrics fid,kid
    python scripts/evaluate.py runs/sd-w4a8 --clip                        # prompts from its run.json

REFERENCE is a .npz with images (arr_0) or statistics (this project's, ADM's, pytorch-fid's), a folder of images, or a
name: digits and digits32 are bundled. SAMPLES is a run's folder, a folder of images, or a .npz with images. Features
are cached in $QDIFF_CACHE/features. Nothing is downloaded without --download.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import json
import sys
from pathlib import Path

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.errors import UserError, require_at_least


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="[REFERENCE] SAMPLES", help="see above")
    parser.add_argument("--metrics", help="e.g. fid,kid; an unknown name lists all (default: all possible)")
    parser.add_argument("--extractor", help="feature network (default: that of the statistics, else Inception)")
    parser.add_argument("--extractor-weights", help="weights file of the extractor")
    parser.add_argument(
        "--protocol",
        choices=["torch-fidelity", "adm"],
        help="inception score over shuffled tenths, or over parts of 5,000 in order (default: adm for two .npz files)",
    )
    group = parser.add_argument_group("fidelity to the float model")
    group.add_argument("--against", help="run of the float model with the same seeds, for PSNR and SSIM image by image")
    group.add_argument("--lpips-weights", type=Path, help="torchvision's AlexNet or VGG16 weights, for LPIPS")
    group.add_argument("--lpips-net", choices=["alex", "vgg"], default="alex", help="network of these weights")
    group = parser.add_argument_group("CLIP score")
    group.add_argument("--clip", action="store_true", help="compute it with the run's prompts")
    group.add_argument("--prompts", help="text file, one prompt per line, or COCO captions (.json); one per image")
    group.add_argument("--clip-model", default="openai/clip-vit-large-patch14", help="folder or name of a CLIP model")
    group = parser.add_argument_group("run")
    group.add_argument("--json", metavar="FILE", help="also write everything as JSON; - prints it instead of the table")
    group.add_argument("--cache", help="folder of features (default: $QDIFF_CACHE/features)")
    group.add_argument("--no-cache", action="store_true", help="recompute features and cache none")
    group.add_argument("--batch_size", type=int, help="images per forward pass (default: as many as fit in memory)")
    group.add_argument("--device", help="e.g. cpu, cuda:0 (default: CUDA if available)")
    group.add_argument("--download", action="store_true", help="download the CLIP model if it is missing")
    args = parser.parse_args(arguments)
    if len(args.paths) > 2:
        raise UserError(f"there are {len(args.paths)} paths; give REFERENCE and SAMPLES, or only SAMPLES")
    require_at_least(1, {"--batch_size": args.batch_size})
    return args


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from qdiff.cli.evaluate import Evaluation, table
    from qdiff.io.files import check_writable, written_whole

    to_file = args.json not in (None, "-")
    if to_file:
        check_writable(args.json)
    evaluation = Evaluation(args)
    advice = "give a --batch_size, e.g. 16" if args.batch_size is None else smaller_batch(args.batch_size)
    with memory_advice("evaluating", advice):
        result = evaluation.run()
    text = json.dumps(result, indent=1) + "\n"
    if to_file:
        with written_whole(args.json) as path:
            path.write_text(text)
    sys.stdout.write(text if args.json == "-" else table(result) + "\n")


if __name__ == "__main__":
    main()
