"""Measure what a quantized network takes of the memory: float, simulated and packed, each in a fresh process.

    python scripts/measure_memory.py --config configs/cifar10.yml --weight_bit 4
    python scripts/measure_memory.py --config configs/stable-diffusion/v1-inference.yaml --batch_size 1

Weights are random and activations quantized by the range at hand, so no file is needed. Each runtime loads its file
and calls the network once; printed are resident megabytes (10^6 bytes) beyond those of the imports, mapped files
included. Float: the network, its weights where the file is mapped. Simulated: float weights loaded, then overwritten by
the dequantized ones. Packed: the native file loaded into packed weights, a layer dequantized at a time. Integer: the
same with integer products.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.parser import Parser

RUNTIMES = ("float", "simulated", "packed", "integer")
FLOAT_FILE, QUANTIZED_FILE = "float.safetensors", "quantized.safetensors"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="of a DDIM (configs/*.yml) or a latent diffusion model")
    parser.add_argument("--weight_bit", type=int, default=4)
    parser.add_argument("--act_bit", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--cache_bytes", type=int, default=0, help="of the packed runtime (QuantModel.pack_weights)")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def build(config_path: str) -> tuple[Any, list[tuple[int, ...]]]:
    """Return a config's denoising network on the meta device, and the shapes of one sample of its inputs."""
    import torch
    from omegaconf import OmegaConf

    config = OmegaConf.load(config_path)
    with torch.device("meta"):
        if "target" not in config.model:
            from ddim.models.diffusion import Model

            return Model(config), [(config.data.channels, config.data.image_size, config.data.image_size), ()]
        from ldm.util import instantiate_from_config

        params = config.model.params
        network = instantiate_from_config(params.unet_config)
        shapes = [(params.channels, params.image_size, params.image_size), ()]
        if network.context_dim is not None:
            shapes.append((77 if "Embedder" in params.cond_stage_config.target else 1, network.context_dim))
        return network.eval(), shapes


def write_random(config_path: str, folder: str, weight_bits: int, act_bits: int) -> None:
    """Write the same random network in float32 and quantized by nearest rounding."""
    from safetensors.torch import save_file

    from qdiff.checkpoint import save_checkpoint
    from qdiff.config import QuantConfig
    from qdiff.quant_model import QuantModel
    from qdiff.random_weights import randomised

    network = randomised(build(config_path)[0])
    save_file(network.state_dict(), Path(folder) / FLOAT_FILE)
    qnn = QuantModel(network, QuantConfig(weight_bits, act_bits, split_shortcut=True, act_dynamic=True))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    save_checkpoint(qnn, Path(folder) / QUANTIZED_FILE)


def imports() -> None:
    """Import what all runtimes import, and let PyTorch set up what it sets up once."""
    import torch

    import ddim.models.diffusion  # noqa: F401
    import ldm.util  # noqa: F401
    import qdiff.checkpoint  # noqa: F401

    with torch.no_grad():
        torch.nn.Conv2d(32, 32, 3)(torch.zeros(1, 32, 8, 8))


def load_and_call(runtime: str, config_path: str, folder: str, batch_size: int, cache_bytes: int) -> Any:
    """Load a network as a runtime does, call it once on a batch of noise, and return it."""
    import torch

    from qdiff.checkpoint import load_checkpoint, load_packed
    from qdiff.native_format import read_config
    from qdiff.quant_model import QuantModel
    from qdiff.tensor_files import read_safetensors

    network, shapes = build(config_path)
    network.eval()
    inputs = [torch.randn(batch_size, *shape) if shape else torch.full((batch_size,), 500) for shape in shapes]
    file = Path(folder) / QUANTIZED_FILE
    if runtime in ("packed", "integer"):
        network = load_packed(network, file, cache_bytes=cache_bytes, integer=runtime == "integer")
    else:
        state = read_safetensors(Path(folder) / FLOAT_FILE)
        if runtime == "simulated":  # which will be written to; float weights stay where the file is mapped
            state = {name: state.pop(name).clone() for name in list(state)}
        network.load_state_dict(state, assign=True)
    if runtime == "simulated":
        network = QuantModel(network, read_config(file))
        load_checkpoint(network, file)
        network.release_float_weights()
    with torch.no_grad():
        if runtime == "float":
            network(*inputs)
            return network
        with network.quantized():
            network(*inputs)
            return network


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)

    from qdiff.errors import UserError
    from qdiff.process_memory import measured

    if not Path(args.config).is_file():
        raise UserError(f"config {args.config} does not exist; give one of configs/")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        measured(write_random, args.config, folder, args.weight_bit, args.act_bit)
        sizes = {name: (Path(folder) / name).stat().st_size for name in (FLOAT_FILE, QUANTIZED_FILE)}
        for runtime in args.runtimes:
            use = measured(
                load_and_call, runtime, args.config, folder, args.batch_size, args.cache_bytes, prepare=imports
            )
            file = sizes[FLOAT_FILE if runtime == "float" else QUANTIZED_FILE]
            rows[runtime] = {"file": file, "kept": use.kept, "peak": use.taken, "imports": use.before}
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{args.config}, W{args.weight_bit}A{args.act_bit}, batch {args.batch_size}; resident MB beyond the imports")
    print(f"{'runtime':<10}{'file MB':>10}{'kept':>10}{'peak':>10}")
    for runtime, row in rows.items():
        print(f"{runtime:<10}" + "".join(f"{row[key] / 1e6:>10.1f}" for key in ("file", "kept", "peak")))


if __name__ == "__main__":
    main(sys.argv[1:])
