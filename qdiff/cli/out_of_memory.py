"""Running out of memory, told in one sentence that names the option to change. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from qdiff.errors import UserError

# What is no class of its own: the CPU's allocator, and the libraries that the GPU's allocator does not serve.
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
    "take a smaller batch_size in the config's training section, and begin anew with another --workdir"
)
ANY_PHASE = "free some, or have the command take less at a time, e.g. by a smaller --batch_size"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is one for want of memory, of the machine's or of a GPU's (a kind of RuntimeError, too)."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def sentence(error: BaseException, phase: str | None = None, advice: str = ANY_PHASE) -> str:
    """Return the sentence for an error that `is_out_of_memory`.

    Args:
        phase: what was being done, e.g. "sampling".
        advice: what the user can change, the rest of the sentence.
    """
    kind = "GPU memory" if any(name in str(error) for name in ("CUDA", "CUBLAS", "CUDNN")) else "memory"
    asked = ASKED_FOR.search(str(error))
    during = "" if phase is None else f" while {phase}"
    return f"out of {kind}{during}{f' ({_size(*asked.groups())} were asked for)' if asked else ''}; {advice}"


def _size(number: str, unit: str) -> str:
    return f"{number} {unit}" if unit != "bytes" else f"{float(number) / 2**30:.2f} GiB"


@contextlib.contextmanager
def memory_advice(phase: str, advice: str) -> Iterator[None]:
    """Turn an error for want of memory inside the block into a `UserError` with the advice that fits the phase.

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
    """Return the advice where ``option`` decides how much memory is taken, and its value may change when a run goes on.

    Args:
        batch_size: what was computed at a time.
        kept: what of the run is not lost.
        to_continue: the command goes on where it was, and does not begin anew.
    """
    ending = f" to continue{kept}" if to_continue else ""
    if batch_size == 1:
        return f"one was taken at a time already, so free memory or give --device cpu, and repeat the command{ending}"
    return f"repeat the command with {option} {batch_size // 2} or less{ending}"
