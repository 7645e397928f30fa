"""Size, work and memory of a full-size diffusers network with random weights.

    python scripts/benchmark_pipeline.py --network sdxl --weight_bit 4 --act_bit 8 --folder runs/sdxl

Counts bytes and bit operations from shapes; then writes random float16 weights to --folder, packs them while they are
loaded, saves the packed file, and loads it, each in a fresh process. Prints Markdown.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

from pathlib import Path

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--network", choices=["sd", "sdxl"], default="sdxl", help="UNet of Stable Diffusion v1 or XL")
    parser.add_argument("--weight_bit", type=int, default=4)
    parser.add_argument("--act_bit", type=int, default=8, help="for the bit operations")
    parser.add_argument("--folder", help="for the weights, several GB; it must not exist (default: only count)")
    args = parser.parse_args(arguments)
    from qdiff.benchmark.component_memory import count, measure, write_random
    from qdiff.config import QuantConfig
    from qdiff.errors import UserError
    from qdiff.io.markdown import markdown_table

    config = QuantConfig(weight_bits=args.weight_bit, act_bits=args.act_bit)
    if args.folder is not None and Path(args.folder).exists():
        raise UserError(f"--folder {args.folder} exists; give a new one, or delete it")
    found = count(args.network, config)
    lines = [
        ["parameters", f"{found['parameters'] / 1e6:.0f} million", ""],
        ["size", f"{found['float size_bytes'] / 1e9:.2f} GB", f"{found['quantized size_bytes'] / 1e9:.2f} GB"],
        ["Tbops per call", f"{found['float bops'] / 1e12:.0f}", f"{found['quantized bops'] / 1e12:.1f}"],
    ]
    print(f"{markdown_table(lines, ['', 'float32', 'quantized'])}\n")
    print(f"A calibration on 64 inputs, 16 GiB: {found['units']} units, {found['calibration']}\n")
    if args.folder is None:
        return
    written = write_random(args.network, Path(args.folder) / "float")
    print(f"random weights: {written / 1e9:.2f} GB in float16\n")
    lines = [
        [title, f"{part.memory.taken / 1e9:.2f} GB", f"{part.memory.kept / 1e9:.2f} GB", f"{part.seconds:.0f} s"]
        for title, part in measure(Path(args.folder), config).items()
    ]
    print(markdown_table(lines, ["", "peak", "kept", "time"]))
    files = sorted((Path(args.folder) / "small").glob("*.safetensors"))
    print(f"\npacked: {sum(f.stat().st_size for f in files) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
