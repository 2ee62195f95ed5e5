"""SIGTERM and Ctrl-C as a request that the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Remembers the first SIGTERM or Ctrl-C; a second one acts at once, as ever.

    Polled between training steps, evaluation batches and pieces of a sample. A bonus:
    what was saved by `checkpoint.every_steps` is safe in any case.
    """

    def __init__(self) -> None:
        self.signal: str = ""  # the name of the signal that came
        self._former: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.signal)

    def listen(self) -> None:
        """Install the handlers, if this is the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._former = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)
        }

    def ignore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = signal.Signals(number).name
        self.ignore()
