"""Running out of memory ends a command with one sentence, the option to change, and exit code 2."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.out_of_memory import is_out_of_memory, memory_advice, sentence, smaller_batch
from qdiff.errors import UserError

OF_GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1 GiB is free. "
    "Including non-PyTorch memory, this process has 22.48 GiB memory in use."
)
OF_CPU = (
    "[enforce fail at alloc_cpu.cpp:126] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "2147483648 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = [
    torch.OutOfMemoryError(OF_GPU),
    RuntimeError(OF_CPU),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("float32")),
]
OTHERS = [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), UserError("CUDA out of memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_every_kind_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_left_alone(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error)), memory_advice("sampling", "give less"):
        raise error


def test_what_the_allocators_really_say():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, dtype=np.uint8)
    assert is_out_of_memory(caught.value)


def test_sentences():
    assert sentence(torch.OutOfMemoryError(OF_GPU), "sampling", "stop") == (
        "out of GPU memory while sampling (2.50 GiB were asked for); stop"
    )
    assert sentence(RuntimeError(OF_CPU), "sampling", "stop") == (
        "out of memory while sampling (2.00 GiB were asked for); stop"
    )
    assert sentence(MemoryError()).startswith("out of memory; free some") and "--batch_size" in sentence(MemoryError())


def test_the_phase_gives_the_advice_and_the_innermost_comes_first():
    with (
        pytest.raises(UserError, match="while calibrating; give --memory_budget") as caught,
        memory_advice("sampling", "give --batch_size"),
        memory_advice("calibrating", "give --memory_budget"),
    ):
        raise MemoryError
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_smaller_batch():
    assert smaller_batch(9, kept=": x") == "repeat the command with --batch_size 4 or less to continue: x"
    assert "one was taken at a time already" in smaller_batch(1) and "--device cpu" in smaller_batch(1)
    assert smaller_batch(9, to_continue=False) == "repeat the command with --batch_size 4 or less"


def test_the_systems_own_words_for_it():
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)"))
    assert not is_out_of_memory(OSError(errno.ENOENT, "No such file"))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_a_command_exits_with_2_and_one_line(error, capsys):
    @exits_cleanly
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of ")


def test_other_errors_of_a_command_keep_their_traceback():
    @exits_cleanly
    def main():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main()
