"""Count the cost of a model before and after quantization: stored bytes and bit operations.

Needs no weights, but for diffusers pipelines, which are loaded.

    python scripts/count_cost.py --config configs/cifar10.yml --use_pretrained --ptq --weight_bit 4 --quant_act --split
    python scripts/count_cost.py --like txt2img --config configs/stable-diffusion/v1-inference.yaml \\
        --ptq --weight_bit 4 --quant_act --sm_abit 16 --by bops --layers 20

--like names the sampling script whose model, sampler and quantization options follow; calibration options are accepted
but do not affect the cost. The numbers are for one call of the denoising network for one sample. They do not include
the first stage and the text encoder, which stay in float; guidance calls the network for a pair of samples, which costs
twice as much. For a modulated network the numbers are those of a later call of a trajectory; one line gives the cost of
the first call, the size of the state kept between calls, and the additions.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import json
import sys

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.options.temporal_cache import add_temporal_cache_option
from qdiff.cli.script import parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments, SCRIPTS)
    add_ptq_options(parser, resume=False)
    add_temporal_cache_option(parser)
    parser.add_argument("--batch_size", type=int, help="accepted; costs are per sample")
    parser.add_argument("--layers", type=int, default=10, help="number of the heaviest layers to list")
    parser.add_argument(
        "--by",
        choices=["size", "bops", "state"],
        default="size",
        help="how to rank layers; state: bytes that a modulated layer keeps between calls",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    import torch

    from qdiff.cli.first_token import check_has_text
    from qdiff.cli.options.ptq import resolve_ptq
    from qdiff.cli.quantize import wrap_network
    from qdiff.cli.temporal_cache import cached_timesteps, with_temporal_cache
    from qdiff.cost.account import account
    from qdiff.errors import require_at_least

    require_at_least(0, {"--layers": args.layers})
    if not getattr(args, "ckpt", True):
        args.use_pretrained = True  # only shapes matter, so any weights will do
    pipeline = SCRIPTS[args.like].pipeline_of(args)
    plan = with_temporal_cache(args, resolve_ptq(args, pipeline.weight_range, pipeline.act_range), pipeline)
    check_has_text(plan, pipeline)
    try:
        network, context_shape = pipeline.build_network()
    except NotImplementedError:  # a diffusers pipeline says how it calls its network when it is loaded
        pipeline.load(torch.device("cpu"))
        network, context_shape = pipeline.network, pipeline.context_shape
    shapes, kept = (pipeline.input_shape, context_shape), len(cached_timesteps(args, pipeline))
    accounts = {"float": account(network, *shapes, kept if plan is None else 0)}
    if plan is not None:
        accounts["quantized"] = account(wrap_network(network, plan), *shapes, kept)
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    heaviest = list(accounts.values())[-1].heaviest(args.layers, args.by)
    if args.json:
        counted = {kind: counts.summary() for kind, counts in accounts.items()}
        quant = None if plan is None else plan.quant.to_dict()
        print(json.dumps({**counted, "quant": quant, "heaviest": [layer.to_dict() for layer in heaviest]}, indent=1))
        return
    described = f"input {list(pipeline.input_shape)}" + (f", context {list(context_shape)}" if context_shape else "")
    print(f"{pipeline.name}: the denoising network, one call for one sample ({described})")
    if context_shape:
        print("guidance calls it for a pair of samples, which costs twice as much per step")
    print(f"{'':<10}{'parameters':>14}{'MB (10^6)':>12}{'GMACs':>10}{'GBops':>12}")
    for kind, counts in accounts.items():
        numbers = f"{counts.parameters:>14,}{counts.size_bytes / 1e6:>12.2f}{counts.macs / 1e9:>10.3f}"
        print(f"{kind:<10}{numbers}{counts.gbops:>12.1f}")
    if counts.modulates:  # the last counts, the quantized ones
        state = f"keeps {counts.state_bytes / 1e6:.2f} MB of float32 and makes {counts.additions / 1e6:.2f} M additions"
        print(f"modulated: {state} per call; the first call of a trajectory has {counts.first_bops / 1e9:.1f} GBops")
    modulates = any(layer.state_bytes for layer in heaviest)
    if heaviest:
        width = max(len(name) for name in (*(layer.name for layer in heaviest), "heaviest by state"))
        state = "    state MB" if modulates else ""
        print(f"\n{'heaviest by ' + args.by:<{width}}  kind        W/A bits   MB (10^6)     GMACs       GBops{state}")
    for layer in heaviest:
        bits = f"{layer.weight_bits}/{layer.act_bits}"
        numbers = f"{layer.size_bytes / 1e6:>12.4f}{layer.macs / 1e9:>10.4f}{layer.bops / 1e9:>12.2f}"
        numbers += f"{layer.state_bytes / 1e6:>12.3f}" if modulates else ""
        print(f"{layer.name:<{width}}  {layer.kind:<10}{bits:>10}{numbers}")


if __name__ == "__main__":
    main()
