"""The lines of scripts/gpu_check.py about the machine."""

from __future__ import annotations

import platform
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Iterator

import torch

from qdiff.benchmark.gpu_check import Line
from qdiff.benchmark.machine import describe_machine, machine_text
from qdiff.cli.processes import choose_device
from qdiff.cli.script import Scripts


def machine_lines(args: Namespace, scripts: Scripts) -> Iterator[Line]:
    """Yield lines about the device, and about the precision of float32 products.

    Raises:
        UserError: the device does not exist.
    """
    device = choose_device(args.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        yield Line("GPU", f"{name}, {total / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free, driver {_driver()}")
    yield Line("host", machine_text(describe_machine(torch.get_num_threads())))
    yield Line("software", f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    values = {"matmul": products, "convolutions": convolutions}
    yield Line("TF32", f"products {_on(products)}, convolutions {_on(convolutions)}", values=values)


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not known"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return (done.stdout.splitlines() or ["not known"])[0].strip()
