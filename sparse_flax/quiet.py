"""What libraries print besides what they raise or return, kept off the console."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
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


def leave_out(unraisable: Any) -> None:
    """Leave out what tensorstore's threads print after the failure of one of them."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
