"""Train a latent diffusion model with Lightning: first its autoencoder, then the denoiser in its latent space.

    python scripts/train_ldm.py --config models/ldm/digits_vq/config.yaml --stage first --out runs/vq.safetensors
    python scripts/train_ldm.py --config models/ldm/digits_vq/config.yaml --stage diffusion \\
        --first_stage runs/vq.safetensors --out models/ldm/digits_vq/model.safetensors

Models whose configs have the same first stage can share it. Repeating a command after an interruption continues it.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import json

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.cli.out_of_memory import SMALLER_TRAINING_BATCH, memory_advice


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="a config with model, data and training sections")
    parser.add_argument("--stage", choices=["first", "diffusion"], required=True)
    parser.add_argument("--first_stage", help="trained first stage (for --stage diffusion)")
    parser.add_argument("--out", required=True, help="file for the weights (.safetensors, float16)")
    parser.add_argument("--workdir", help="folder of checkpoints to continue from (default: --out with .work)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--epochs", type=int, help="number of epochs (default: the config's)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)

    import pytorch_lightning as pl
    import torch

    from ldm.stages import train_diffusion, train_first_stage
    from qdiff.errors import UserError, require_at_least
    from qdiff.io.files import check_writable

    if (args.stage == "diffusion") != bool(args.first_stage):
        raise UserError("--stage diffusion needs --first_stage PATH, and --stage first takes none; correct it")
    require_at_least(1, {"--threads": args.threads})
    check_writable(args.out)
    torch.set_num_threads(args.threads)
    pl.seed_everything(args.seed, verbose=False)
    train = train_first_stage if args.stage == "first" else train_diffusion
    with memory_advice("training", SMALLER_TRAINING_BATCH):
        notes = train(args)
    print(args.out, json.dumps(notes))


if __name__ == "__main__":
    main()
