"""Count what a model costs before and after quantization: bytes as stored, and bit operations. Needs no weights.

    python scripts/count_cost.py --config configs/cifar10.yml --use_pretrained --ptq --weight_bit 4 --quant_act --split
    python scripts/count_cost.py --like txt2img --config configs/stable-diffusion/v1-inference.yaml \\
        --ptq --weight_bit 4 --quant_act --sm_abit 16 --by bops --layers 20

--like names the sampling script whose model, sampler and quantization options follow; calibration options are accepted,
as nothing of the cost depends on them. Counted is one call of the denoising network for one sample. First stage and
text encoder, which stay in float, are not in it; guidance calls the network for a pair, which costs twice as much.
Of a modulated network the call is a later one of a trajectory; a line says what the first one costs, what is kept from
call to call, and what is added to it.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import json
import sys

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.script import LIKE, load_object, parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments)
    add_ptq_options(parser, resume=False)
    parser.add_argument("--batch_size", type=int, help="accepted: costs are those of one sample")
    parser.add_argument("--layers", type=int, default=10, help="how many of the heaviest layers to list")
    parser.add_argument(
        "--by",
        choices=["size", "bops", "state"],
        default="size",
        help="what makes a layer heavy; state: what it remembers, modulated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    from qdiff.cli.options.ptq import resolve_ptq
    from qdiff.cost.account import account
    from qdiff.errors import UserError
    from qdiff.quant_model import QuantModel

    if args.layers < 0:
        raise UserError(f"--layers is {args.layers}; give 0 or more")
    if not getattr(args, "ckpt", True):
        args.use_pretrained = True  # costs are of shapes: whose weights they would be does not matter
    model = load_object(LIKE[args.like][1])(args)
    plan = resolve_ptq(args, model.weight_range, model.act_range)
    network, context_shape = model.build_network()
    accounts = {"float": account(network, model.input_shape, context_shape)}
    if plan is not None:
        accounts["quantized"] = account(QuantModel(network, plan.quant), model.input_shape, context_shape)
    for note in model.notes:
        print(note, file=sys.stderr)
    heaviest = list(accounts.values())[-1].heaviest(args.layers, args.by)
    if args.json:
        counted = {kind: counts.summary() for kind, counts in accounts.items()}
        quant = None if plan is None else plan.quant.to_dict()
        print(json.dumps({**counted, "quant": quant, "heaviest": [layer.to_dict() for layer in heaviest]}, indent=1))
        return
    shapes = f"input {list(model.input_shape)}" + (f", context {list(context_shape)}" if context_shape else "")
    print(f"{model.name}: the denoising network, one call for one sample ({shapes})")
    if context_shape:
        print("guidance calls it for a pair of samples, which costs twice as much a step")
    print(f"{'':<10}{'parameters':>14}{'MB (10^6)':>12}{'GMACs':>10}{'GBops':>12}")
    for kind, counts in accounts.items():
        numbers = f"{counts.parameters:>14,}{counts.size_bytes / 1e6:>12.2f}{counts.macs / 1e9:>10.3f}"
        print(f"{kind:<10}{numbers}{counts.gbops:>12.1f}")
    if counts.modulates:  # the last one, quantized
        state = f"keeps {counts.state_bytes / 1e6:.2f} MB of float32 and makes {counts.additions / 1e6:.2f} M additions"
        print(f"modulated: {state} a call; the first call of a trajectory has {counts.first_bops / 1e9:.1f} GBops")
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
