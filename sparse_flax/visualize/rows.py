"""What one position looks at, as numbers: the attention weights of a single query."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from sparse_flax import generate
from sparse_flax.decoder import layer_by_layer
from sparse_flax.errors import UserError
from sparse_flax.model import SparseTransformer
from sparse_flax.progress import duration


@dataclasses.dataclass(frozen=True)
class Row:
    """How one head of one layer spreads its attention.

    Input j is byte j - 1 of the content, and input 0 the start that stands before it.
    """

    layer: int
    head: int
    keys_S: np.ndarray  # int64, ascending: the inputs that the pattern lets it see
    weights_S: np.ndarray  # float32, which sum to 1


def attention_rows(
    model: SparseTransformer,
    content: bytes | np.ndarray,
    position: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Return the attention weights with which the byte at a position is predicted.

    From the model's own queries and keys, and of these the keys that the pattern gives
    the one query: no array of T x T.

    Args:
      model: the weights, off the mesh.
      content: bytes, or integers from 0 to 255 of any shape, such as an image [S, S, 3]
        or mu-law levels [N].
      position: of the byte to be predicted; its query sees the bytes before it. Up to
        the length of the content, which is the byte after it, and by default that, or
        the last one if the context is full.
      layers, heads: which, by number from 0; all by default.
      say: takes a progress line, every ten seconds.

    Returns:
      A row for each layer and head, layer by layer.

    Raises:
      UserError: one of these is outside of what there is; in a sentence.
    """
    config = model.config
    given = np.frombuffer(as_bytes(content), np.uint8)
    position = checked_position(position, given.size, config.context)
    layers = numbers("layer", layers, config.layers)
    heads = numbers("head", heads, config.heads)
    # The same length for every position, so that one program serves all of them.
    inputs_BT = generate.inputs(np.pad(given, (0, 1))[None].astype(np.int32))
    inputs_BT = inputs_BT[:, : config.context]
    rows, began = [], time.monotonic()
    said = began
    for layer, (pattern, (q, k, _)) in enumerate(layer_by_layer(model, inputs_BT)):
        if layer in layers:
            q_HK, k_THK = np.asarray(q)[0, position], np.asarray(k)[0]
            for head in heads:
                keys_S = pattern.keys(position, head)
                group = config.heads // k_THK.shape[1]
                seen_SK = k_THK[keys_S, head // group].astype(np.float32)
                logits_S = seen_SK @ q_HK[head].astype(np.float32)
                weights_S = _softmax(logits_S * q_HK.shape[-1] ** -0.5)
                rows.append(Row(layer, head, keys_S, weights_S))
        if layer == max(layers):
            break
        if (now := time.monotonic()) - said > 10:
            said, done = now, layer + 1
            left = (now - began) / done * (max(layers) + 1 - done)
            say(f"layer {done} of {max(layers) + 1} | eta {duration(left)}")
    return rows


def numbers(what: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    """Return the numbers chosen of so many layers or heads.

    Raises UserError if there is no such one.
    """
    for number in chosen or ():
        if not 0 <= number < count:
            nearest = min(max(number, 0), count - 1)
            raise UserError(
                f"{what} {number} is outside of the model's {count} {what}s, 0 to "
                f"{count - 1}; try {nearest}"
            )
    return sorted(set(chosen)) if chosen else list(range(count))


def checked_position(position: int | None, size: int, context: int) -> int:
    """Return the position, by default the last that there is.

    Raises UserError if it is outside of the content, or that of the context.
    """
    if size > context:
        raise UserError(
            f"{size:,} bytes are more than the model's context of {context:,}; give "
            f"{context:,} or fewer"
        )
    last = min(size, context - 1)
    if position is None:
        return last
    if not 0 <= position <= last:
        raise UserError(
            f"position {position:,} is outside of the {size:,} bytes that are given, "
            f"or the one after them, in a context of {context:,}; try "
            f"{min(max(position, 0), last)}"
        )
    return position


def as_bytes(content: bytes | np.ndarray) -> bytes:
    """Return content of any shape as bytes.

    Raises UserError if it is no integers from 0 to 255.
    """
    try:
        if not isinstance(content, bytes):
            content = np.asarray(content).reshape(-1)
        return generate.as_bytes(content)
    except ValueError as error:
        raise UserError(str(error).replace("a prompt", "content", 1)) from None


def _softmax(logits_S: np.ndarray) -> np.ndarray:
    weights_S = np.exp(logits_S - logits_S.max())
    return weights_S / weights_S.sum()
