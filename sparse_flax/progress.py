"""Time, for people: durations, rates and when it will be done."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Clock:
    """Steps per second without pauses, and the time left with them."""

    # Steps that a rate is averaged over. A single one would not do: the metrics of a
    # step arrive while the next is running, now sooner and now later.
    WINDOW = 20

    def __init__(self) -> None:
        self._paused = 0.0

    def start(self, step: int) -> None:
        """Begin to count at `step`, after compiling."""
        self._first, self._began, self._paused = step, time.monotonic(), 0.0
        self._marks = collections.deque([(step, self._began)], self.WINDOW + 1)

    def tick(self, step: int) -> None:
        """Note that `step` is done."""
        self._marks.append((step, time.monotonic() - self._paused))

    def rate(self) -> float:
        """Return steps per second over the latest steps, pauses left out."""
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return (last - first) / max(ended - began, 1e-9)

    def left(self, step: int, steps: int) -> float:
        """Return the seconds until `steps`, evaluations and saving included."""
        each = (time.monotonic() - self._began) / max(step - self._first, 1)
        return each * (steps - step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep what happens inside out of the rate."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began


def duration(seconds: float) -> str:
    """Write a time span for a person: 48s, 3m20s, 5h12m, 2d03h."""
    s = round(max(seconds, 0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def line(
    step: int, steps: int, row: dict[str, Any], seconds_left: float, unit: str = "byte"
) -> str:
    """Write the progress line of a training row, in bits by the unit."""
    speed = row["tokens_per_s"]
    parts = [
        f"step {step:,}/{steps:,} ({step / steps:.1%})",
        f"{row['bits_per_byte']:.3f} bits/{unit}",
        f"lr {row['learning_rate']:.2e}",
        "skipped" if row["grad_norm"] is None else f"grad {row['grad_norm']:.2f}",
        f"{speed / 1e3:,.1f}k tok/s" if speed >= 1e3 else f"{speed:,.0f} tok/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    return " | ".join([*parts, f"eta {duration(seconds_left)}"])


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens now."""
    return every > 0 and step > 0 and step % every == 0
