"""An argument parser whose errors are one sentence, and the option groups that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import NoReturn

from qdiff.cli.options.noise_correction import add_correction_options
from qdiff.cli.options.paper_options import check_paper_options, refused_values
from qdiff.cli.options.spacing import add_spacing_option
from qdiff.cli.options.temporal_cache import add_temporal_cache_option
from qdiff.errors import UserError

BITS = 8


def chosen_runtimes(text: str, known: Collection[str]) -> list[str]:
    """Return the names that ``--runtimes`` gives, separated by commas, without repetitions.

    Raises:
        UserError: a name is not among the ``known`` ones.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"--runtimes has no {name!r}; choose from {', '.join(known)}")
    return names


class Parser(argparse.ArgumentParser):
    """Reports bad options as a `UserError` (one sentence, exit code 2), without the usage text.

    Unambiguous prefixes of an option are accepted, as the papers' scripts accept them (``--max_image 50000``).
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        found = super().parse_args(args, namespace)
        check_paper_options(found)
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_quantization_options(parser: argparse.ArgumentParser) -> None:
    """``--ptq`` and the options that belong to it, named as in the papers' scripts."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--ptq", action="store_true", help="quantize; without it, sample from the float model")
    # Here and not above: they load torch, which commands without these options need not wait for.
    from qdiff.config import ActRanges
    from qdiff.methods.registry import METHODS
    from qdiff.ranges.estimators import ESTIMATORS

    methods = [*METHODS, "modiff"]  # combines with the weights of any method
    group.add_argument("--method", choices=methods, help="default: implied by the other options")
    group.add_argument(
        "--quant_mode",
        choices=["linear", "qdiff", "dynamic", *refused_values("quant_mode")],
        metavar="{linear,qdiff,dynamic}",
        default="qdiff",
        help="linear: round to nearest, min-max; dynamic: activation ranges computed at every network call",
    )
    group.add_argument("--weight_bit", type=int, default=BITS, help="width of weights, 1-8")
    group.add_argument("--quant_act", action="store_true", help="quantize activations too")
    group.add_argument("--act_bit", type=int, default=BITS, help="width of activations, 2-16")
    group.add_argument("--sm_abit", type=int, default=8, help="width of the softmax output, 2-16")
    group.add_argument("--a_sym", action="store_true", help="symmetric activation ranges")
    group.add_argument("--w_sym", action="store_true", help="symmetric weight ranges, as int8 kernels need at 8 bits")
    group.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        help="split shortcut layers at the h|skip boundary (default: with grip)",
    )
    group.add_argument(
        "--keep_ends",
        action=argparse.BooleanOptionalAction,
        help="8-bit weights in the first and last layer, float input of the last (default with EDA-DM)",
    )
    group.add_argument(
        "--layer_bits",
        metavar="NAME=WIDTHS,…|FILE",
        help="widths of single layers, e.g. first=A16,last=W8A16 (first and last: the network's ends; 32 is float), "
        "a YAML or JSON file or a checkpoint that holds them, or none (default, except with --method grip)",
    )
    group.add_argument("--w_range", choices=list(ESTIMATORS), help="how weight ranges are chosen")
    group.add_argument("--a_range", choices=list(ESTIMATORS), help="how activation ranges are chosen")
    group.add_argument(
        "--act_ranges",
        choices=[r.value for r in ActRanges],
        help="timestep: each activation has a range for every timestep of the calibration set (--cali_st), which is "
        "observed and not learned; shared: one for all timesteps (default)",
    )
    group.add_argument(
        "--power_of_two_scales",
        action=argparse.BooleanOptionalAction,
        help="channels of what shortcut convolutions take may have a half, a quarter or an eighth of the step size, on "
        "which the calibration samples vote (default: with dmq)",
    )
    group.add_argument(
        "--bos_aware",
        action="store_true",
        help="leave the first token of a text context in float, which is the same for all texts and may be far larger "
        "than the others: its outputs are constants in the layers that read it, whose ranges are without it (MixDQ)",
    )


def add_calibration_options(parser: argparse.ArgumentParser, resume: bool = True) -> None:
    """Calibration options, named as in Q-Diffusion's scripts.

    Args:
        resume: add ``--resume``; some of EDA-DM's scripts use that name for something else.
    """
    group = parser.add_argument_group("calibration")
    group.add_argument("--cali_ckpt", help="quantized checkpoint to load (native, or a published .pth)")
    if resume:
        group.add_argument("--resume", action="store_true", help="load weights and activation ranges from --cali_ckpt")
    group.add_argument(
        "--resume_w", action="store_true", help="load weights from --cali_ckpt and calibrate activations"
    )
    group.add_argument("--cali_data_path", help="calibration file; without it, one is recorded from the float model")
    group.add_argument("--cali_st", type=int, default=1, help="number of timesteps to calibrate on")
    add_spacing_option(group, "with grip: ends")
    group.add_argument("--cali_n", type=int, default=1024, help="samples per timestep")
    group.add_argument("--cali_batch_size", type=int, help="samples per iteration (default: 32)")
    group.add_argument(
        "--cali_iters",
        type=int,
        help="iterations per block for weights (default: 20000; EDA-DM: 5000, weights and activations together)",
    )
    group.add_argument("--cali_iters_a", type=int, default=5000, help="iterations per block for activations")
    group.add_argument("--cali_lr", type=float, default=4e-4, help="learning rate of activation step sizes")
    group.add_argument(
        "--cali_lr_w", type=float, help="learning rate of rounding (default: 1e-3, higher for few iterations)"
    )
    group.add_argument("--cali_p", type=float, default=2.4, help="norm of the activation error")
    group.add_argument(
        "--cali_seed",
        type=int,
        help="decides the recorded images and the batches of calibration (default: from --seed)",
    )
    group.add_argument(
        "--refit",
        type=int,
        default=0,
        metavar="N",
        help="after calibrating, sample a calibration set with the quantized network and calibrate anew from the float "
        "weights on it, N times (TCAQ-DM; default: 0)",
    )
    group.add_argument("--running_stat", action="store_true", help="set activation ranges by a running average")
    group.add_argument("--rs_sm_only", action="store_true", help="--running_stat for softmax outputs only")
    group.add_argument("--objective", choices=["mse", "fisher"], default="mse", help="weight reconstruction error")
    group.add_argument(
        "--recon_unit", choices=["block", "layer"], default="block", help="fit whole blocks, or layers one by one"
    )
    group.add_argument(
        "--memory_budget",
        "--memory-budget",
        type=float,
        help="GiB that calibration may use on top of the weights, in RAM and on the GPU each; stored activations "
        "beyond it go to disk",
    )
    group.add_argument("--cond", action="store_true", help="the model is conditional")


# Options that only some sampling scripts have, with the value that the other scripts use.
OF_SOME_SCRIPTS = {"sequence": False, "skip_save": False, "skip_grid": False, "n_rows": 0}


def add_run_options(parser: argparse.ArgumentParser, folder: tuple[str, ...] = ("-l", "--logdir")) -> None:
    """The options of every sampling command.

    Args:
        folder: names of the option for the run folder.
    """
    group = parser.add_argument_group("run")
    text = "run folder; repeat the command to continue the run"
    group.add_argument(*folder, dest="logdir", nargs="?", default="none", help=text)
    group.add_argument("--device", help="e.g. cpu, cuda:0; default: CUDA if available")
    group.add_argument(
        "--tf32",
        action="store_true",
        help="faster matrix products on NVIDIA GPUs, with inputs rounded to 10 bits of mantissa",
    )
    group.add_argument("--batch_size", type=int, help="images per batch")
    group.add_argument("--save-npz", action="store_true", help="also write samples.npz (arr_0, uint8 NHWC)")
    group.add_argument("--dry-run", action="store_true", help="print the resolved config as JSON and stop")
    group.add_argument("--verbose", action="store_true", help="write more log lines")
    from qdiff.deploy.runtimes import RUNTIMES
    from qdiff.deploy.torch_runtimes import SIMULATED

    group = parser.add_argument_group("runtime")
    described = "; ".join(f"{name}: {runtime.help}" for name, runtime in RUNTIMES.items() if runtime.help)
    group.add_argument(
        "--runtime",
        choices=list(RUNTIMES),
        default=SIMULATED.name,
        help=f"{described}; the others run an exported ONNX model on the CPU with integer arithmetic",
    )
    group.add_argument(
        "--weight_cache", type=float, default=0.0, help="MiB of dequantized weights to keep, with --runtime torch"
    )
    group.add_argument(
        "--fused_kernels",
        action="store_true",
        help="use the project's Triton kernels for fake quantization on CUDA; the images are the same to the bit (not "
        "timed on a GPU yet)",
    )
    group.add_argument("--onnx", help="exported model (default: export one into the run folder)")
    add_temporal_cache_option(group)
    add_correction_options(parser)
    for name, value in OF_SOME_SCRIPTS.items():
        if parser.get_default(name) is None:
            parser.set_defaults(**{name: value})
