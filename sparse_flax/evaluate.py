"""Bits per byte of held-out data, every byte scored once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_flax.model import SparseTransformer
from sparse_flax.progress import duration
from sparse_flax.sharding import put_batch, split_batch

Batch = dict[str, Any]  # of arrays

# What bits are counted by, for each data.kind: a dim is a colour of a pixel, one byte.
UNITS = {"text": "byte", "image": "dim", "audio": "byte"}


def cross_entropy(logits_BTN: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the cost of each byte in nats, [B, T] float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTN, targets_BT)


@jax.jit
def _summed(model: SparseTransformer, batch: Batch) -> jax.Array:
    nats_BT = cross_entropy(model(batch["inputs_BT"]), batch["targets_BT"])
    return jnp.sum(nats_BT * batch["weights_BT"], dtype=jnp.float32)


def is_finite(model: SparseTransformer, batch: Batch, parts: int = 1) -> bool:
    """Whether the cost of a training batch is finite, in `parts` micro-batches."""
    return bool(_is_finite(model, batch, parts))


@functools.partial(jax.jit, static_argnums=2)
def _is_finite(model: SparseTransformer, batch: Batch, parts: int) -> jax.Array:
    def summed(part: Batch) -> jax.Array:
        return jnp.sum(cross_entropy(model(part["inputs_BT"]), part["targets_BT"]))

    return jnp.isfinite(jax.lax.map(summed, split_batch(batch, parts))).all()


def bits_per_byte(
    model: SparseTransformer,
    batches: Iterable[Batch],
    *,
    count: int,
    stop: object,
    say: Callable[[str], None],
) -> float | None:
    """Average the cost of the bytes that `batches` give a weight.

    A byte sees what comes before it in its own window only, so the first bytes of a
    window cost more than those that follow: see `evaluation_batches`.

    Args:
      model: the weights to evaluate.
      batches: as from `data.batches.evaluation_batches`.
      count: how many batches there are, for the progress line.
      stop: where it becomes true, the evaluation is given up.
      say: takes a progress line, every ten seconds.

    Returns:
      Bits per byte, or None if it was given up.
    """
    nats, scored = 0.0, 0.0
    started = said = time.monotonic()
    waiting: list[jax.Array] = []
    for done, batch in enumerate(batches):
        if stop:
            return None
        waiting.append(_summed(model, put_batch(batch)))
        scored += float(batch["weights_BT"].sum())
        if len(waiting) > 1:  # one batch runs while the one before it is fetched
            nats += float(waiting.pop(0))
        now = time.monotonic()
        if now - said > 10 and done:
            said, left = now, (now - started) / done * (count - done)
            say(f"evaluating: batch {done:,} of {count:,} | eta {duration(left)}")
    nats += sum(map(float, waiting))
    return nats / scored / math.log(2)
