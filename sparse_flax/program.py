"""What a compiled program holds, read from its text."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}$", re.M | re.S)
CALL = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
KERNEL = re.compile(r'%([\w-]+?)[\d.]* = .*custom_call_target="tpu_custom_call"')
LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
COUNTED = re.compile(r'known_trip_count":\{"n":"(\d+)"')
LIMIT = re.compile(r"[su]\d+\[\]\S* constant\((\d+)\)")
CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:called|branch)_computations=\{([^}]*)\}"
)


class Sent(NamedTuple):
    """A kind of collective: how often it runs in a program, and its results' bytes."""

    calls: int
    bytes: int


def collectives(program: str) -> dict[str, Sent]:
    """Return what one device takes part in, by name, loops with all their turns.

    How often a loop turns is read from its limit, as `lax.scan` writes it; a loop whose
    limit is not in the program counts once, and each branch of a condition as taken.
    Where a call starts a collective and another awaits it, the first returns its
    operands too, so of its arrays the largest is counted.
    """
    texts = {name: text for _, name, text in COMPUTATION.findall(program)}

    @functools.cache
    def sent(name: str) -> dict[str, Sent]:
        found: dict[str, Sent] = {}
        for shapes, kind, start in CALL.findall(texts.get(name, "")):
            sizes = list(_sizes(shapes)) or [0]
            _add(found, kind, Sent(1, max(sizes) if start else sum(sizes)), 1)
        for called, turns in _called(name, texts):
            for kind, more in sent(called).items():
                _add(found, kind, more, turns)
        return found

    entry = next(name for mark, name, _ in COMPUTATION.findall(program) if mark)
    return sent(entry)


def kernels(program: str) -> dict[str, int]:
    """Return how often each Pallas kernel for TPUs stands in a program, by name."""
    names = KERNEL.findall(program)
    return {name: names.count(name) for name in sorted(set(names))}


def _add(found: dict[str, Sent], kind: str, more: Sent, turns: int) -> None:
    old = found.get(kind, Sent(0, 0))
    found[kind] = Sent(old.calls + turns * more.calls, old.bytes + turns * more.bytes)


def _called(name: str, texts: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Yield each computation that one calls, and how often."""
    for line in texts.get(name, "").split("\n"):
        if loop := LOOP.search(line):
            condition, body = loop.groups()
            limits = COUNTED.findall(line) or LIMIT.findall(texts.get(condition, ""))
            yield body, int(limits[0]) if len(limits) == 1 else 1
            continue
        for one, several in CALLED.findall(line):
            for called in filter(None, [one, *re.split(r",\s*", several)]):
                yield called.removeprefix("%"), 1


def _sizes(shapes: str) -> Iterator[int]:
    for _, bits, dimensions in ARRAY.findall(shapes):
        elements = math.prod(int(n) for n in dimensions.split(",") if n)
        yield elements * max(int(bits or 8) // 8, 1)
