"""SIGTERM and Ctrl-C as a request that the loop answers between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from sparse_flax import processes


class StopRequest:
    """Remembers the first SIGTERM or Ctrl-C; a second one acts at once, as ever.

    Polled between training steps, evaluation batches and pieces of a sample. What is
    killed without a question loses what came after the last checkpoint, and no more.

    With several processes all of them poll equally often, and learn at the same poll of
    what came to any of them: jax's own handler of SIGTERM, which is the notice of
    maintenance on TPUs as well, agrees with the others upon one.
    """

    def __init__(self) -> None:
        self.signal: str = ""  # the name of the signal that came
        self._former: dict[int, Any] = {}
        self._polls = 0

    def __bool__(self) -> bool:
        if processes.count() > 1 and not self.signal:
            from jax.experimental import multihost_utils

            self._polls += 1
            if multihost_utils.reached_preemption_sync_point(self._polls):
                self.signal = "SIGTERM"
        return bool(self.signal)

    @property
    def status(self) -> int:
        """The exit status: 0, or 128 plus the signal's number, as shells have it.

        Whoever starts a job again has to know that this one is not finished.
        """
        return 128 + signal.Signals[self.signal] if self.signal else 0

    def listen(self) -> None:
        """Install the handlers, if this is the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._former = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)
            if number == signal.SIGINT or processes.count() == 1
        }

    def ignore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.ignore()
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # whose handler tells the others
        else:
            self.signal = signal.Signals(number).name
