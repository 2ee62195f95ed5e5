"""Sample byte by byte: the prompt in one pass, then a loop that stays on the device.

What earlier bytes leave behind is kept in caches (`attention/decode.py`), one for each
layer; a step (`decoder.py`) reads of them what its byte sees.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from sparse_flax.decoder import decoder, prefill, step
from sparse_flax.model import START, VOCABULARY, SparseTransformer
from sparse_flax.progress import duration
from sparse_flax.sharding import batch_shards, whole, whole_sequences

BYTES_PER_CALL = 64  # between two looks at the clock and for a request to stop

# Arrays are for a power of two of bytes, so that few lengths are compiled.
SMALLEST = 64
# A call reads of the caches what is before its end, rounded up to a quarter of the
# length, or the start of a long sequence would cost as much as its end. With many rows
# it is the caches that take the time, and eighths save more than compiling them takes.
SMALLEST_PART = 1024
MANY_ROWS = 16


@whole_sequences()
def generate(
    model: SparseTransformer,
    prompts: Sequence[bytes],
    count: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: object = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[bytes]:
    """Sample `count` bytes that follow each prompt.

    Args:
      model: the weights to sample from.
      prompts: each begins a window, as in training; it may be empty. They are read in
        parallel as far as the shortest goes, so give long ones of about one length.
      count: how many bytes; prompt and sample together must fit the context.
      seed: row n has the seed `seed + n`, and gets the same bytes alone as in a batch
        where the device rounds both alike.
      temperature: divides the logits, above 0; the paper samples at 1.
      top_k: sample from so many of the likeliest bytes only; 0: from all.
      top_p: then from the fewest likeliest ones that have this share of the
        probability, above 0 and at most 1.
      stop: where it becomes true, what was sampled so far is returned.
      say: takes a progress line, every ten seconds.

    Raises:
      ValueError: one of these is out of its range; in a sentence.
    """
    _check(model, prompts, count, temperature, top_k, top_p)
    if not prompts or not count:
        return [b""] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    begin, end = min(lengths), max(lengths) + count
    T = _size(end, model.config.context)
    # On a mesh that splits the batch, each piece has as many rows.
    B = len(prompts) + -len(prompts) % batch_shards()
    rows = [min(row, len(prompts) - 1) for row in range(B)]
    bytes_BT = np.zeros((B, T), np.int32)
    for row, n in enumerate(rows):
        bytes_BT[row, : lengths[n]] = np.frombuffer(prompts[n], np.uint8)
    keys_B = jnp.stack([jax.random.key(seed + n) for n in rows])
    lengths_B = np.array([lengths[n] for n in rows], np.int32)
    filters = (top_k or VOCABULARY, top_p)
    if filters == (VOCABULARY, 1):
        filters = None

    read = bytes_BT[:, : _size(max(begin, 1), model.config.context)]
    caches = prefill(model, inputs(read), begin, T=T)
    weights = decoder(model)
    bytes_BT = jnp.asarray(bytes_BT)
    calls = [
        (first, min(first + BYTES_PER_CALL, end))
        for first in range(begin, end, BYTES_PER_CALL)
    ]
    reaches = [reach(call[1], T, B) for call in calls]

    def arguments(call: tuple[int, int]) -> tuple:
        return weights, caches, bytes_BT, call, lengths_B, keys_B, temperature, filters

    done = begin
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # All compile at once, the later ones while the first are already in use.
        compiled = {
            far: pool.submit(_sample.lower(*arguments(calls[0]), reach=far).compile)
            for far in dict.fromkeys(reaches)
        }
        started = said = time.monotonic()
        for call, far in zip(calls, reaches, strict=True):
            if stop:
                break
            # No part of the estimate: the next bytes do not wait for it again.
            started += _wait(compiled[far], say)
            bytes_BT, caches = _sample(*arguments(call), reach=far)
            bytes_BT.block_until_ready()
            done = call[1]
            now = time.monotonic()
            if now - said > 10:
                said, left = now, (now - started) / (done - begin) * (end - done)
                say(f"sampling: byte {done:,} of {end:,} | eta {duration(left)}")
        pool.shutdown(cancel_futures=True)
    sampled = np.asarray(bytes_BT)[:, :done].astype(np.uint8)
    return [
        sampled[n, length : length + count].tobytes()
        for n, length in enumerate(lengths)
    ]


def _wait(compiled: Future, say: Callable[[str], None]) -> float:
    """Wait for a compiled program, and return for how many seconds."""
    began = time.monotonic()
    try:
        compiled.result(timeout=10)
    except TimeoutError:
        say("sampling: still compiling, which may take a minute")
        compiled.result()
    return time.monotonic() - began


def reach(end: int, T: int, rows: int) -> int:
    """Return how far a call that ends there reads of T positions."""
    part = max(T // (8 if rows >= MANY_ROWS else 4), SMALLEST_PART)
    return min(end + -end % part, T)


def as_bytes(prompt: bytes | np.ndarray) -> bytes:
    """Return integers from 0 to 255 as bytes, and bytes as they are.

    Raises ValueError for anything else.
    """
    if isinstance(prompt, bytes):
        return prompt
    if isinstance(prompt, str):
        raise ValueError(
            f"a prompt of text {prompt[:20]!r} is not bytes; give prompt.encode()"
        )
    values = np.asarray(prompt)
    if values.size and (
        values.ndim != 1
        or not np.issubdtype(values.dtype, np.integer)
        or not 0 <= values.min() <= values.max() <= 255
    ):
        raise ValueError(
            f"a prompt of {values.dtype} {list(values.shape)} from {values.min()} to "
            f"{values.max()} is not bytes; give integers [P] from 0 to 255"
        )
    return values.astype(np.uint8).tobytes()


def inputs(bytes_BT: np.ndarray) -> np.ndarray:
    """Return what the model is given to predict each byte: the one before it."""
    return np.pad(bytes_BT, [(0, 0), (1, 0)], constant_values=START)[:, :-1]


@functools.partial(jax.jit, static_argnames="reach", donate_argnums=(1, 2))
def _sample(
    weights,
    caches,
    bytes_BT,
    first_and_end,
    lengths_B,
    keys_B,
    temperature,
    filters,
    *,
    reach,
):
    """Fill in the bytes of some positions, but for those of a longer prompt."""

    def one(position, bytes_and_caches):
        bytes_BT, caches = bytes_and_caches
        before_B = jax.lax.dynamic_index_in_dim(bytes_BT, position - 1, 1, False)
        input_B = jnp.where(position == 0, START, before_B)
        logits_BN, caches = step(weights, caches, input_B, position, reach)
        logits_BN = whole(logits_BN) / temperature
        if filters is not None:
            logits_BN = likeliest(logits_BN, *filters)
        byte_B = jax.vmap(
            lambda key, logits_N: jax.random.categorical(
                jax.random.fold_in(key, position), logits_N
            )
        )(keys_B, logits_BN)
        given_B = jax.lax.dynamic_index_in_dim(bytes_BT, position, 1, False)
        byte_B = jnp.where(position < lengths_B, given_B, byte_B)
        bytes_BT = jax.lax.dynamic_update_index_in_dim(bytes_BT, byte_B, position, 1)
        return bytes_BT, caches

    return jax.lax.fori_loop(*first_and_end, one, (bytes_BT, caches))


def likeliest(logits_BN: jax.Array, top_k, top_p) -> jax.Array:
    """Set the logits of all but the likeliest bytes to -inf.

    Kept are the `top_k` likeliest and, of those, the fewest whose share of their
    probability is `top_p` or more; of equals, the lower byte.
    """
    order_BN = jnp.argsort(-logits_BN, axis=-1, stable=True)
    place_BN = jnp.argsort(order_BN, axis=-1)
    logits_BN = jnp.where(place_BN < top_k, logits_BN, -jnp.inf)
    p_BN = jnp.take_along_axis(jax.nn.softmax(logits_BN), order_BN, axis=-1)
    before_BN = jnp.cumsum(p_BN, axis=-1) - p_BN
    before_BN = jnp.take_along_axis(before_BN, place_BN, axis=-1)
    return jnp.where((before_BN < top_p) | (place_BN == 0), logits_BN, -jnp.inf)


def _size(length: int, context: int) -> int:
    return min(max(1 << (length - 1).bit_length(), SMALLEST), context)


def _check(model, prompts, count, temperature, top_k, top_p) -> None:
    context = model.config.context
    if count != int(count) or count < 0:
        raise ValueError(f"count={count} must be a whole number from 0 on; try 100")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + count > context:
        raise ValueError(
            f"a prompt of {longest} and a sample of {count} bytes do not fit the "
            f"context of {context}; sample {max(context - longest, 0)} or fewer"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be above 0; try 1.0, or top_k=1 for the "
            "likeliest byte"
        )
    if not 0 <= top_k <= VOCABULARY:
        raise ValueError(
            f"top_k={top_k} must be from 0 (all) to {VOCABULARY}; try "
            f"{min(max(top_k, 0), VOCABULARY)}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; try 1.0")
