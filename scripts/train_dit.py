"""Train a class-conditional DiT of diffusers with Lightning and write it as a pipeline that diffusers loads.

    python scripts/convert.py --like sample_diffusion_ldm -r models/ldm/digits_kl --seed 1 --out runs/digits_kl
    python scripts/train_dit.py --config configs/digits-dit.yaml --first_stage runs/digits_kl --out models/dit_digits

The autoencoder and the scheduler are those of the first stage's folder. Repeating the command after an interruption
continues from the last finished checkpoint in ``--workdir``.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.cli.out_of_memory import SMALLER_TRAINING_BATCH, memory_advice


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="training config, e.g. configs/digits-dit.yaml")
    parser.add_argument("--first_stage", required=True, help="folder of a pipeline with an AutoencoderKL")
    parser.add_argument("--out", required=True, help="the folder to write; it must be missing or empty")
    parser.add_argument("--workdir", help="folder of checkpoints to continue from (default: --out with .work)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--epochs", type=int, help="number of epochs (default: the config's training.n_epochs)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)

    import pytorch_lightning as pl
    import torch

    from qdiff.errors import require_at_least
    from qdiff.io.diffusers_files import import_diffusers

    require_at_least(1, {"--threads": args.threads})
    require_at_least(0, {"--seed": args.seed})
    import_diffusers()
    from ldm.transformer import train_transformer

    torch.set_num_threads(args.threads)
    pl.seed_everything(args.seed, verbose=False)
    with memory_advice("training", SMALLER_TRAINING_BATCH):
        print(train_transformer(args))


if __name__ == "__main__":
    main()
