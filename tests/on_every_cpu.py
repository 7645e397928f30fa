"""Run the numeric part of the suite as other CPUs would run it: fewer instructions, and one or two threads.

    python tests/on_every_cpu.py [PYTEST ARGUMENTS…]

torch's own kernels, oneDNN and MKL choose their code by the CPU's instructions, and with it the order of sums. Each
setting below makes them believe in a smaller CPU; those that this machine does not have are skipped and named. The
exit code is 1 where a setting fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # this folder holds tests/qdiff, which would be taken for the package

from qdiff.machine.cpu import cpu_name_and_flags  # noqa: E402

NUMERIC = ("tests/qdiff", "tests/ddim", "tests/ldm")
# Options, files, pages and sizes: no result there depends on a kernel.
WITHOUT_KERNELS = tuple(f"--ignore=tests/qdiff/{room}" for room in ("cli", "cost", "io", "machine", "report"))


@dataclass(frozen=True)
class Setting:
    """How a CPU is emulated.

    Attributes:
        name: shown in the table.
        flags: of /proc/cpuinfo that the machine must have.
        beyond: of which it must have one, or the setting emulates what the CPU is anyway.
        aten: ATEN_CPU_CAPABILITY, torch's own kernels.
        onednn: DNNL_MAX_CPU_ISA (of torch) and ONEDNN_MAX_CPU_ISA (of OpenVINO).
        mkl: MKL_ENABLE_INSTRUCTIONS, matrix products.
        threads: of one process.
        openvino: False where OpenVINO cannot be emulated: told of a CPU without AVX, it returns empty outputs.
    """

    name: str
    flags: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()
    aten: str | None = None
    onednn: str | None = None
    mkl: str | None = None
    threads: int = 1
    openvino: bool = True

    def environment(self) -> dict[str, str]:
        chosen = {
            "ATEN_CPU_CAPABILITY": self.aten,
            "DNNL_MAX_CPU_ISA": self.onednn,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "QDIFF_TEST_THREADS": str(self.threads),
            "QDIFF_TEST_WITHOUT": None if self.openvino else "openvino",
        }
        kept = {k: v for k, v in os.environ.items() if k not in chosen}
        return kept | {k: v for k, v in chosen.items() if v is not None}


# What torch, oneDNN and MKL have kernels for above AVX2.
ABOVE_AVX2 = ("avx512f", "avx_vnni", "avx_vnni_int8", "amx_int8")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
SETTINGS = (
    Setting("this CPU, 1 thread"),
    Setting("this CPU, 2 threads", threads=2),
    Setting("no AVX", aten="default", onednn="SSE41", mkl="SSE4_2", openvino=False),
    Setting("AVX2", ("avx2", "fma"), ABOVE_AVX2, "avx2", "AVX2", "AVX2"),
    Setting("AVX2, 2 threads", ("avx2", "fma"), ABOVE_AVX2, "avx2", "AVX2", "AVX2", threads=2),
    Setting("AVX-512 without VNNI", AVX512, ("avx512_vnni",), "avx512", "AVX512_CORE", "AVX512"),
    Setting("AVX-512 with VNNI", (*AVX512, "avx512_vnni"), ("amx_int8",), "avx512", "AVX512_CORE_VNNI", "AVX512"),
)


def main(arguments: list[str]) -> int:
    (_, here), failed = cpu_name_and_flags(), 0
    for setting in SETTINGS:
        missing = [flag for flag in setting.flags if flag not in here]
        if missing:
            print(f"{setting.name:24s} skipped: this CPU has no {', '.join(missing)}", flush=True)
            continue
        if setting.beyond and not any(flag in here for flag in setting.beyond):
            print(f"{setting.name:24s} skipped: it is what this CPU is", flush=True)
            continue
        # Two processes of one thread, or one of two: never more threads than two cores hold.
        workers = ("-n", str(2 // setting.threads), "--dist", "loadfile")
        command = [sys.executable, "-m", "pytest", *workers, *NUMERIC, *WITHOUT_KERNELS, *arguments]
        started = time.monotonic()
        run = subprocess.run(command, cwd=REPOSITORY, env=setting.environment(), capture_output=True, text=True)
        minutes = (time.monotonic() - started) / 60
        failed += run.returncode != 0
        result = (run.stdout.strip().splitlines() or ["no output"])[-1]
        print(f"{setting.name:24s} {'passed' if run.returncode == 0 else 'FAILED'}, {minutes:.1f} min", flush=True)
        if run.returncode != 0:
            print("\n".join(line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))) or result)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
