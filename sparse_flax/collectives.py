"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

NAMES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
CALL = re.compile(rf" = (.*?) ({'|'.join(NAMES)})(-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def count(program: str) -> dict[str, tuple[int, int]]:
    """Return how often each collective stands in a program, and its results' bytes.

    A collective in a loop counts once. Where a call starts one and another awaits it,
    the first returns its operands too, so of its arrays the largest is counted.
    """
    found: dict[str, tuple[int, int]] = {}
    for shapes, name, start in CALL.findall(program):
        sizes = list(_sizes(shapes)) or [0]
        calls, total = found.get(name, (0, 0))
        found[name] = calls + 1, total + (max(sizes) if start else sum(sizes))
    return found


def _sizes(shapes: str) -> Iterator[int]:
    for _, bits, dimensions in ARRAY.findall(shapes):
        elements = math.prod(int(n) for n in dimensions.split(",") if n)
        yield elements * max(int(bits or 8) // 8, 1)
