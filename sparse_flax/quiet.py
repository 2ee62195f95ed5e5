"""What Orbax and tensorstore print besides what they raise, kept off the console."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


def worth_showing(record: logging.LogRecord) -> bool:
    """Drop Orbax's chatter, and tracebacks of errors that are raised here anyway."""
    chatter = record.levelno < logging.ERROR or record.exc_info
    return not (chatter and f"{os.sep}orbax{os.sep}" in record.pathname)


logging.getLogger("absl").addFilter(worth_showing)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Hold back what the other reads print, a page a leaf, once one has failed.

    They print from tensorstore's threads and when they are garbage collected.
    """
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled = log.disabled
    log.disabled, sys.unraisablehook = True, lambda unraisable: None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.disabled, sys.unraisablehook = disabled, hook


def leave_out(unraisable: Any) -> None:
    """Leave out what tensorstore's threads print after the failure of one of them."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
