"""What a model has learned to look at, over an image, a text or a sound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparse_flax.errors import UserError
from sparse_flax.model import SparseTransformer
from sparse_flax.visualize import over, rows

KINDS = ("text", "image", "audio")
MOST_SHOWN = 8  # layers, and heads of each, where none are chosen


def attention(
    model: SparseTransformer,
    content: bytes | np.ndarray,
    position: int | Sequence[int] | None = None,
    *,
    kind: str | None = None,
    rate: int = 12000,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    shown: int = 1024,
    say: Callable[[str], None] = lambda line: None,
) -> Figure:
    """Draw where each head looks to predict one byte: a row of panels for each layer.

    What is looked at is white on an image or a spectrogram and shaded in a text, as the
    square root of its weight, the greatest of each panel full; above it stands how
    much that is. The byte itself is framed in orange.

    Args:
      model: the weights, off the mesh.
      content: text as bytes, an image uint8 [S, S, 3], or sound as mu-law levels [N].
      position: of the byte to be predicted, as for `attention_rows`; of an image also
        (row, column) or (row, column, colour), by default its middle.
      kind: 'text', 'image' or 'audio'; by default an image if the content is one by its
        shape, else text.
      rate: of audio, samples a second.
      layers, heads: which, by number from 0; by default all, or eight of them, spread
        evenly.
      shown: of a text, so many bytes before the position.
      say: takes a progress line, every ten seconds.

    Raises:
      UserError: one of these is outside of what there is; in a sentence.
    """
    if kind is None:
        kind = "image" if np.ndim(content) == 3 else "text"
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} must be one of {', '.join(map(repr, KINDS))}")
    for name, value, usual in (("rate", rate, 12_000), ("shown", shown, 1024)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1; try {usual}")
    position = _position(content, position, kind)
    config = model.config
    layers = _some(rows.numbers("layer", layers, config.layers), layers)
    heads = _some(rows.numbers("head", heads, config.heads), heads)
    found = rows.attention_rows(
        model, content, position, layers=layers, heads=heads, say=say
    )
    content_N = np.frombuffer(rows.as_bytes(content), np.uint8)
    at = rows.checked_position(position, content_N.size, config.context)
    painter = over.painter(kind, content_N, at, rate, shown)
    width, height = painter.panel
    size = width * len(heads) + 0.3, (height + 0.45) * len(layers) + 0.4
    figure = Figure(figsize=(max(size[0], 3.5), size[1]), layout="constrained")
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    for axes, row in zip(grid.flat, found, strict=True):
        # Input j is byte j - 1; the weights of those after the query are 0.
        w_N = np.zeros(content_N.size + 1, np.float32)
        w_N[row.keys_S] = row.weights_S
        start, w_N = w_N[0], w_N[1:]
        painter.draw(axes, w_N)
        beside = [f"most {w_N.max(initial=0):.1%}"]
        if 0 in row.keys_S:
            beside.append(f"start {start:.1%}")
        if isinstance(painter, over.OverText) and painter.before(w_N):
            beside.append(f"earlier {painter.before(w_N):.1%}")
        axes.set_title(
            f"layer {row.layer}, head {row.head}\n{', '.join(beside)}", fontsize=7
        )
    return figure


def _some(numbers: list[int], chosen: Sequence[int] | None) -> list[int]:
    """Return all that were chosen, or else not too many, the first and the last."""
    if chosen or len(numbers) <= MOST_SHOWN:
        return numbers
    places = np.linspace(0, len(numbers) - 1, MOST_SHOWN).round().astype(int)
    return [numbers[place] for place in places]


def _position(content: bytes | np.ndarray, position: Any, kind: str) -> int | None:
    """Return the position as one number, with the middle of an image for None."""
    if kind != "image":
        if position is not None and np.ndim(position):
            raise UserError(
                f"position {tuple(position)} is for images; give one number for {kind}"
            )
        return position
    content = np.asarray(content)
    size = round((content.size / 3) ** 0.5)
    if not size or content.size != 3 * size**2:
        raise UserError(
            f"{content.size:,} bytes are no square image of 3 colours; give uint8 "
            "[S, S, 3]"
        )
    if position is None:
        return (size // 2 * size + size // 2) * 3
    if not np.ndim(position):
        return position
    place = [*position, 0] if len(position) == 2 else list(position)
    most = (size - 1, size - 1, 2)
    inside = len(place) == 3 and all(
        0 <= x <= y for x, y in zip(place, most, strict=True)
    )
    if not inside:
        raise UserError(
            f"position {tuple(position)} is outside of an image of {size} x {size}; "
            f"give row and column up to {size - 1}, and a colour up to 2 if any"
        )
    return (place[0] * size + place[1]) * 3 + place[2]
