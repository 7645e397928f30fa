"""Report bad input, and running out of memory, in one sentence with exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from qdiff.cli.out_of_memory import is_out_of_memory, sentence
from qdiff.errors import UserError


def exits_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command's ``main``: a `UserError` is printed without a traceback and exits with code 2.

    The same holds for running out of memory; `memory_advice` around a phase makes the error name the option to change.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            print(f"error: {sentence(error)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted: repeat the same command to continue", file=sys.stderr)
            sys.exit(130)

    return wrapper
