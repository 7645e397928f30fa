"""Train a DDIM model with Lightning and write its EMA weights as safetensors.

    python scripts/train_ddim.py --config configs/digits.yml --out models/ddim_digits.safetensors

Repeating the command after an interruption continues from the last finished checkpoint in ``--workdir``.
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
    parser.add_argument("--config", required=True, help="model config, e.g. configs/digits.yml")
    parser.add_argument("--out", required=True, help="file for the EMA weights (.safetensors)")
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
    from omegaconf import OmegaConf
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader, TensorDataset

    from ddim.config import check_training, load_config
    from ddim.datasets import load_training_images
    from ddim.sizes import check_sizes
    from ddim.training import NoisePredictionTask, fit
    from qdiff.errors import UserError
    from qdiff.io.files import check_writable, written_whole

    for option, least in (("epochs", 1), ("threads", 1), ("seed", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"--{option} is {value}; give at least {least}")
    check_writable(args.out)
    torch.set_num_threads(args.threads)
    pl.seed_everything(args.seed, verbose=False)
    config = load_config(args.config)
    for check in (check_sizes, check_training):
        check(config, f"config file {args.config}")
    images = load_training_images(config.data)
    epochs = args.epochs or config.training.n_epochs
    loader = DataLoader(TensorDataset(images), batch_size=config.training.batch_size, shuffle=True, drop_last=True)
    task = NoisePredictionTask(config, total_steps=epochs * len(loader))
    notes = {"config": args.config, "seed": args.seed}
    settings = {"config": OmegaConf.to_container(config, resolve=True), "seed": args.seed}
    with memory_advice("training", SMALLER_TRAINING_BATCH):
        notes |= fit(task, loader, epochs, args.workdir or f"{args.out}.work", config.optim.grad_clip, settings)
    weights = {k: v.contiguous().cpu() for k, v in task.ema.module.state_dict().items()}
    with written_whole(args.out) as path:
        save_file(weights, path, metadata={"training": json.dumps(notes)})
    print(f"{args.out}: {sum(v.numel() for v in weights.values())} parameters, {notes}")


if __name__ == "__main__":
    main()
