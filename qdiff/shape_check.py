"""Try a network without weights, on the meta device: sizes that do not fit are found before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qdiff.errors import UserError, first_line


@contextlib.contextmanager
def check_runs(origin: str, what: str) -> Iterator[None]:
    """Turn what torch says about sizes while a network is built and run on meta tensors into one sentence.

    Args:
        origin: what the config is called in the error.
        what: the keys to look at.
    """
    try:
        with torch.no_grad():
            yield
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{origin} describes a network that cannot run ({first_line(error)}); correct {what}"
        ) from error
