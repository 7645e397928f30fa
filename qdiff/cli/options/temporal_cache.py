"""The option of the temporal cache."""

from __future__ import annotations

import argparse

QUANTIZED, FLOAT = "quantized", "float"


def add_temporal_cache_option(parser: argparse.ArgumentParser) -> None:
    """``--cache_temporal``, for every script that samples with a network of this project."""
    parser.add_argument(
        "--cache_temporal",
        nargs="?",
        choices=[QUANTIZED, FLOAT],
        const=QUANTIZED,
        help="compute what depends on the timestep alone (the time embedding and its projections in all blocks) once "
        "per timestep and look it up afterwards. quantized (default): the images are the same; float: these layers are "
        "not quantized, and the table takes the place of their weights in the reported size",
    )
