"""Turn bad input into one sentence and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from qdiff.errors import UserError


def exits_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command's ``main``: a `UserError` is printed without a traceback and exits with code 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted: repeat the same command to continue", file=sys.stderr)
            sys.exit(130)

    return wrapper
