"""Patterns: who sees whom (paper, section 4).

A pattern is a frozen dataclass of integers. Its `mask` is the truth, written from the
formula alone; its `parts` say how the same is computed without ever building a T x T
array. Every pattern is causal and lets every query see at least itself.

To add a pattern: write its class here with `_sees` and `parts`, add it to `PATTERNS`
and to `attention/__init__.py`, and some of it to those of `tests/test_attention.py`,
which checks them against their masks in every implementation and fails until there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from sparse_flax.attention import parts as _parts
from sparse_flax.attention.parts import Part


class Pattern:
    """Which keys each query sees; query head h uses `parts(h)`."""

    @property
    def head_period(self) -> int:
        """Heads h and h + head_period see the same keys."""
        return 1

    def _sees(self, i: np.ndarray, j: np.ndarray, head: int) -> np.ndarray:
        """Whether query i sees key j, for j <= i."""
        raise NotImplementedError

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """Split what query head `head` sees into pairwise disjoint parts."""
        raise NotImplementedError

    def mask(self, T: int, head: int = 0) -> np.ndarray:
        """Return bool [T, T]: entry (i, j) says whether query i sees key j."""
        i, j = np.arange(T)[:, None], np.arange(T)[None, :]
        return (j <= i) & np.broadcast_to(self._sees(i, j, head), (T, T))

    def pairs(self, T: int, head: int = 0) -> int:
        """Count the (query, key) pairs of one head, without building the mask."""
        return sum(part.pairs(T) for part in self.parts(head))

    def keys(self, i: int, head: int = 0) -> np.ndarray:
        """Return the keys that query i sees, ascending: int [S], in O(S)."""
        return np.sort(np.concatenate([part.keys(i) for part in self.parts(head)]))

    def picture(self, T: int = 32, head: int = 0) -> str:
        """Draw the mask: a line a query, `#` a key that it sees.

        >>> print(Strided(3).picture(7))
        #......
        ##.....
        ###....
        ####...
        .####..
        ..####.
        #..####
        """
        rows = self.mask(T, head)
        return "\n".join("".join(".#"[int(seen)] for seen in row) for row in rows)


@dataclasses.dataclass(frozen=True)
class Dense(Pattern):
    """Every earlier token: the ordinary causal Transformer."""

    def _sees(self, i, j, head):
        return True

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """All."""
        return (_parts.All(),)


@dataclasses.dataclass(frozen=True)
class Local(Pattern):
    """The last `window` tokens: i - j < window, the query itself included.

    The paper prints l + 1 keys (max(0, i - l) to i); its released kernels and this
    class take l, which is enough for every two-step path.
    """

    window: int

    def __post_init__(self):
        _positive(self, "window")

    def _sees(self, i, j, head):
        return i - j < self.window

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """Band."""
        return (_parts.Band(self.window),)


@dataclasses.dataclass(frozen=True)
class Columns(Pattern):
    """Tokens a multiple of `stride` back: (i - j) mod stride = 0."""

    stride: int

    def __post_init__(self):
        _positive(self, "stride")

    def _sees(self, i, j, head):
        return (i - j) % self.stride == 0

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """Columns with the diagonal."""
        return (_parts.Columns(self.stride),)


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """Local(stride) or Columns(stride): the paper's merged strided head.

    For data whose period is the stride, such as the rows of an image.
    """

    stride: int

    def __post_init__(self):
        _positive(self, "stride")

    def _sees(self, i, j, head):
        return (i - j < self.stride) | ((i - j) % self.stride == 0)

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """Band, and the rows of the columns that it leaves out."""
        return (_parts.Band(self.stride), _parts.Columns(self.stride, strict=True))


@dataclasses.dataclass(frozen=True)
class Blocks(Pattern):
    """The earlier tokens of the query's own block of `block` tokens."""

    block: int

    def __post_init__(self):
        _positive(self, "block")

    def _sees(self, i, j, head):
        return i // self.block == j // self.block

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """OwnBlock."""
        return (_parts.OwnBlock(self.block),)


@dataclasses.dataclass(frozen=True)
class Summaries(Pattern):
    """A slice of `summary` tokens from every earlier block, and the query itself.

    The slice is the last `summary` tokens of a block, or `offset` slices before them.
    The paper leaves rows without a key (all of the first block); here each query also
    sees itself.
    """

    block: int
    summary: int
    offset: int = 0

    def __post_init__(self):
        _check_summary(self)

    def _sees(self, i, j, head):
        return _in_slice(i, j, self.block, self.summary, self.offset) | (j == i)

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """Summaries, and Self for the diagonal."""
        slices = _parts.Summaries(self.block, self.summary, self.offset)
        return (slices, _parts.Self())


@dataclasses.dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own block, or the summary slice of an earlier one: the paper's
    merged fixed head, for text.

    With `rotate`, head h takes the slice `offset = h mod (block / summary)`: the
    paper's "different sub-blocks for different heads". With constant block and summary
    the cost is a constant fraction of dense, about summary / block, not n sqrt(n).
    """

    block: int
    summary: int
    offset: int = 0
    rotate: bool = False

    def __post_init__(self):
        _check_summary(self)
        if not isinstance(self.rotate, bool | np.bool_):
            raise ValueError(
                f"Fixed: rotate={self.rotate!r} must be True or False; try True"
            )
        object.__setattr__(self, "rotate", bool(self.rotate))
        if self.rotate and self.offset:
            raise ValueError(
                f"Fixed: offset={self.offset} cannot be combined with rotate=True, "
                "which gives each head its own; use offset=0"
            )
        if self.rotate and self.block % self.summary:
            raise ValueError(
                f"Fixed: summary={self.summary} does not divide block={self.block}, as "
                f"rotate=True requires; try {_nearest_divisor(self)}"
            )

    @property
    def head_period(self) -> int:
        """Offsets in a block with rotate, else 1."""
        return self.block // self.summary if self.rotate else 1

    def _offset(self, head: int) -> int:
        return head % self.head_period if self.rotate else self.offset

    def _sees(self, i, j, head):
        own = i // self.block == j // self.block
        return own | _in_slice(i, j, self.block, self.summary, self._offset(head))

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """OwnBlock and Summaries."""
        slices = _parts.Summaries(self.block, self.summary, self._offset(head))
        return (_parts.OwnBlock(self.block), slices)


@dataclasses.dataclass(frozen=True)
class PerHead(Pattern):
    """Head h uses patterns[h mod len(patterns)]: the paper's separate heads."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self):
        if isinstance(self.patterns, Iterable):
            object.__setattr__(self, "patterns", tuple(self.patterns))
            wrong = [p for p in self.patterns if not isinstance(p, Pattern)]
        else:
            wrong = [self.patterns]
        if wrong or not self.patterns:
            raise ValueError(
                f"PerHead: patterns={self.patterns!r} must be a non-empty tuple of "
                "patterns, such as (Local(128), Columns(128))"
            )

    @property
    def head_period(self) -> int:
        """The least p such that heads h and h + p always see the same keys."""
        n = len(self.patterns)
        # Where the patterns themselves repeat sooner, so do the heads.
        n = next(
            m for m in range(1, n + 1) if self.patterns[:m] * (n // m) == self.patterns
        )
        # A pattern repeats after so many visits, each n heads on.
        periods = [p.head_period for p in self.patterns[:n]]
        return n * math.lcm(*(period // math.gcd(period, n) for period in periods))

    def of_head(self, head: int) -> Pattern:
        """The pattern of query head `head`."""
        return self.patterns[head % len(self.patterns)]

    def _sees(self, i, j, head):
        return self.of_head(head)._sees(i, j, head)

    def parts(self, head: int = 0) -> tuple[Part, ...]:
        """The parts of the head's own pattern."""
        return self.of_head(head).parts(head)


PATTERNS = {
    p.__name__: p
    for p in (Dense, Local, Columns, Strided, Blocks, Summaries, Fixed, PerHead)
}


def _whole(pattern: Pattern, name: str) -> int | None:
    """Return a field as an int, which NumPy's integers become; None if it is none."""
    value = getattr(pattern, name)
    if isinstance(value, np.integer):
        value = int(value)
        object.__setattr__(pattern, name, value)
    # In Python True is an int, and no width.
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _nearest(pattern: Pattern, name: str, low: int, high: int = 2**31) -> int:
    """Return the whole number from low to high that is nearest to a field."""
    value = getattr(pattern, name)
    if not isinstance(value, int | float) or value != value:
        return low
    return round(min(max(value, low), high))


def _positive(pattern: Pattern, *names: str) -> None:
    for name in names:
        value = _whole(pattern, name)
        if value is None or value < 1:
            raise ValueError(
                f"{type(pattern).__name__}: {name}={getattr(pattern, name)!r} must be "
                f"a whole number of at least 1; try {_nearest(pattern, name, 1)}"
            )


def _check_summary(pattern: Any) -> None:
    _positive(pattern, "block", "summary")
    name, block, summary = type(pattern).__name__, pattern.block, pattern.summary
    if summary > block:
        raise ValueError(
            f"{name}: summary={summary} is wider than block={block}; try {block}"
        )
    most = block // summary - 1
    offset = _whole(pattern, "offset")
    if offset is None or not 0 <= offset <= most:
        raise ValueError(
            f"{name}: offset={pattern.offset!r} must be a whole number from 0 to {most}"
            f", so that the slice lies inside the block; try "
            f"{_nearest(pattern, 'offset', 0, most)}"
        )


def _nearest_divisor(pattern: Fixed) -> int:
    divisors = [d for d in range(1, pattern.block + 1) if pattern.block % d == 0]
    return min(divisors, key=lambda d: (abs(d - pattern.summary), d))


def _in_slice(i, j, block: int, summary: int, offset: int):
    place = j % block
    low, high = block - (offset + 1) * summary, block - offset * summary
    return (j // block < i // block) & (low <= place) & (place < high)
