"""Report running out of memory in one sentence that names the option to change. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from qdiff.errors import UserError

# Errors without an exception class of their own: from the CPU's allocator, and from libraries that do not use the
# GPU's allocator.
MESSAGES = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "bad_alloc",
)
# "Tried to allocate 2.50 GiB", "you tried to allocate 4096 bytes"
ASKED_FOR = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
SMALLER_TRAINING_BATCH = (
    "give a smaller batch_size in the config's training section, and start again with another --workdir"
)
ANY_PHASE = "free some, or let the command use less at a time, e.g. with a smaller --batch_size"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that RAM or GPU memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def sentence(error: BaseException, phase: str | None = None, advice: str = ANY_PHASE) -> str:
    """Return the sentence for an error that `is_out_of_memory`.

    Args:
        phase: the work in progress, e.g. "sampling".
        advice: what the user can change; the end of the sentence.
    """
    kind = "GPU memory" if any(name in str(error) for name in ("CUDA", "CUBLAS", "CUDNN")) else "memory"
    asked = ASKED_FOR.search(str(error))
    during = "" if phase is None else f" while {phase}"
    return f"out of {kind}{during}{f' ({_size(*asked.groups())} were asked for)' if asked else ''}; {advice}"


def _size(number: str, unit: str) -> str:
    return f"{number} {unit}" if unit != "bytes" else f"{float(number) / 2**30:.2f} GiB"


@contextlib.contextmanager
def memory_advice(phase: str, advice: str) -> Iterator[None]:
    """Turn running out of memory inside the block into a `UserError` with advice that fits the phase.

    Args:
        phase, advice: see `sentence`.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(sentence(error, phase, advice)) from error


def smaller_batch(batch_size: int, option: str = "--batch_size", kept: str = "", to_continue: bool = True) -> str:
    """Return advice to lower ``option``, which decides the memory use and may change when a run is continued.

    Args:
        batch_size: the present batch size.
        kept: the part of the run that is not lost, as the end of the sentence.
        to_continue: the repeated command continues the run, and does not start again.
    """
    ending = f" to continue{kept}" if to_continue else ""
    if batch_size == 1:
        return f"the batch size was 1 already, so free memory or give --device cpu, and repeat the command{ending}"
    return f"repeat the command with {option} {batch_size // 2} or less{ending}"
