"""A pattern's mask, by layer and head, and what it reaches in two steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from sparse_flax import attention
from sparse_flax.attention import Pattern
from sparse_flax.errors import UserError

MOST_TOKENS = 1024  # of a picture
MOST_PANELS = 8  # side by side
FUTURE, NOT, TWO_STEPS, ONE_STEP = range(4)
COLORS = ("#e8e8e8", "#ffffff", "#9ecae1", "#08519c")


def masks(
    patterns: str | Pattern | Sequence[Pattern],
    tokens: int | None = None,
    *,
    heads: int | None = None,
    two_steps: bool = True,
) -> Figure:
    """Draw who sees whom: a row of panels for each layer of the cycle.

    One panel for all heads that see the same. A last one, with `two_steps`, adds what a
    layer reaches through the layer before it, by any of its heads: whether every
    position can learn of every earlier one in two layers (paper, section 4.2).

    Args:
      patterns: a pattern, a cycle of them, or either as text, as in a configuration.
      tokens: side of the mask; by default some times the longest stride or block.
      heads: of a layer; by default as many as differ.
      two_steps: whether to draw the last panel.

    Raises:
      UserError: the text is no pattern, or a number is out of its range.
    """
    cycle = as_cycle(patterns)
    tokens = default_tokens(cycle) if tokens is None else tokens
    if not 2 <= tokens <= MOST_TOKENS:
        raise UserError(
            f"tokens={tokens} must be from 2 to {MOST_TOKENS}, as a mask has the "
            f"square of that in cells; try {min(max(tokens, 2), MOST_TOKENS)}"
        )
    if heads is not None and heads < 1:
        raise UserError(f"heads={heads} must be at least 1; try 1")
    counts = [min(heads or p.head_period, p.head_period) for p in cycle]
    layers = [
        [p.mask(tokens, head) for head in range(n)]
        for p, n in zip(cycle, counts, strict=True)
    ]
    shown = [min(n, MOST_PANELS) for n in counts]
    columns = max(shown) + two_steps
    figure = Figure(
        figsize=(max(2.6 * columns, 5.2), 3.0 * len(cycle)), layout="constrained"
    )
    grid = figure.subplots(len(cycle), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    any_head = [np.any(layer, axis=0) for layer in layers]
    for n, pattern in enumerate(cycle):
        place = f"layer {n} of the cycle: " if len(cycle) > 1 else ""
        for head in range(shown[n]):
            title = _title(pattern, head, heads or counts[n], tokens)
            draw_mask(grid[n, head], layers[n][head], title)
        grid[n, 0].set_axis_on()
        left = counts[n] - shown[n]
        beside = f" ({left} more heads differ)" if left else ""
        grid[n, 0].set_ylabel(
            f"{place}{_short(pattern)}{beside}\nquery", fontsize=8, wrap=True
        )
        grid[n, 0].set_xlabel("key", fontsize=8)
        if two_steps:
            below = any_head[n - 1]  # for the first of the cycle, the last
            reached = in_two_steps(any_head[n], below)
            title = f"in two layers\n{share_of_past(reached):.0%} of the past"
            draw_mask(grid[n, -1], any_head[n], title, reached)
    return figure


def in_two_steps(mask: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return what a layer of one mask learns of through a layer below of another."""
    return (mask.astype(np.float32) @ below) > 0


def share_of_past(mask: np.ndarray) -> float:
    """Return how much of all pairs of a query and a key not after it a mask holds."""
    return mask.sum() / np.tri(len(mask)).sum()


def as_cycle(patterns: str | Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    """Return a cycle of patterns, one a layer.

    Raises UserError if it is none.
    """
    if isinstance(patterns, str):
        try:
            return attention.parse(patterns)
        except ValueError as error:
            raise UserError(str(error)) from None
    cycle = (patterns,) if isinstance(patterns, Pattern) else tuple(patterns)
    for pattern in cycle:
        if not isinstance(pattern, Pattern):
            raise UserError(
                f"{pattern!r} is no pattern; give one such as Strided(8), or its text"
            )
    if not cycle:
        raise UserError("no pattern is given; try Strided(8)")
    return cycle


def default_tokens(cycle: Sequence[Pattern]) -> int:
    """Return a side that shows four of the longest stride, block or window."""
    return min(max(4 * max(map(_longest, cycle)), 32), MOST_TOKENS)


def _longest(pattern: Pattern) -> int:
    if isinstance(pattern, attention.PerHead):
        return max(map(_longest, pattern.patterns))
    return max(
        (v for v in vars(pattern).values() if not isinstance(v, bool)), default=8
    )


def draw_mask(
    axes: Axes, mask: np.ndarray, title: str, reached: np.ndarray | None = None
) -> None:
    """Draw a mask, bool [T, T], dark, and light what is reached besides, if given."""
    states = np.where(mask, ONE_STEP, NOT)
    if reached is not None:
        states = np.where(reached & ~mask, TWO_STEPS, states)
    axes.set_axis_on()
    axes.imshow(
        np.where(np.tri(len(mask), dtype=bool), states, FUTURE),
        cmap=ListedColormap(COLORS),
        vmin=0,
        vmax=len(COLORS) - 1,
        interpolation="nearest" if len(mask) <= 256 else "auto",
    )
    axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])


def _title(pattern: Pattern, head: int, heads: int, tokens: int) -> str:
    same = range(head, heads, pattern.head_period)
    whose = "all heads" if len(same) == heads else "head " + ", ".join(map(str, same))
    pairs = pattern.pairs(tokens, head)
    share = pairs / attention.Dense().pairs(tokens)
    return f"{whose}\n{pairs / tokens:.1f} keys a query, {share:.0%} of dense"


def _short(pattern: Pattern) -> str:
    """Return the pattern's printed form without what is as by default."""
    if isinstance(pattern, attention.PerHead):
        return f"PerHead({', '.join(map(_short, pattern.patterns))})"
    given = [
        str(value) if field.default is dataclasses.MISSING else f"{field.name}={value}"
        for field in dataclasses.fields(pattern)  # type: ignore[arg-type]
        if (value := getattr(pattern, field.name)) != field.default
    ]
    return f"{type(pattern).__name__}({', '.join(given)})"
