"""What libraries print besides what they raise or return, kept off the console."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging as absl_logging


def worth_showing(record: logging.LogRecord) -> bool:
    """Drop Orbax's and TFDS' chatter, and tracebacks of errors that are raised here."""
    chatter = record.levelno < logging.ERROR or record.exc_info
    noisy = ("orbax", "tensorflow_datasets")
    return not (
        chatter and any(f"{os.sep}{x}{os.sep}" in record.pathname for x in noisy)
    )


absl_logging.get_absl_logger().addFilter(worth_showing)


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


def leave_out_closed_loops() -> None:
    """Leave out what tensorstore's threads print after the failure of one of them.

    From now on, since some of it comes when they are garbage collected.
    """
    former = sys.unraisablehook
    if getattr(former, "func", None) is not _unless_closed_loop:
        sys.unraisablehook = functools.partial(_unless_closed_loop, former)


def _unless_closed_loop(former: Callable[[Any], None], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        former(unraisable)
