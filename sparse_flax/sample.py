"""Continue a text, byte by byte.

Each byte costs a whole forward pass over prompt and continuation: exact for any
pattern, and slow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sparse_flax.model import START, SparseTransformer
from sparse_flax.progress import duration
from sparse_flax.sharding import batch_shards, whole
from sparse_flax.workdir import write_atomically

BYTES_PER_CALL = 16
BETWEEN = b"\n--- next sample ---\n"  # samples in a file


def write_samples(
    model: SparseTransformer,
    text: np.ndarray,
    options: ConfigDict,
    path: Path,
    *,
    seed: int,
    stop: object,
    say: Callable[[str], None],
) -> str:
    """Continue the beginning of a text in several ways, into a file.

    Args:
      model: the weights to sample from.
      text: uint8 [N].
      options: config.eval; its prompt_bytes, samples and sample_bytes (0: none).
      path: of the file.
      seed: of the first sample; the others have the next ones.
      stop, say: as for `continue_text`.

    Returns:
      What was written, for a person; empty where nothing was.
    """
    if not options.sample_bytes:
        return ""
    prompt = text[: options.prompt_bytes].tobytes()
    sampled = [
        continue_text(
            model, prompt, options.sample_bytes, seed=seed + n, stop=stop, say=say
        )
        for n in range(options.samples)
    ]
    write_atomically(path, BETWEEN.join(prompt + sample for sample in sampled))
    pieces = ["--- prompt ---", shown(prompt)]
    for sample in sampled:
        pieces += ["--- continued ---", shown(sample)]
    return "\n".join([*pieces, "---"])


def shown(text: bytes) -> str:
    """Return bytes as text, those that are none escaped."""
    return text.decode("utf-8", "backslashreplace")


def continue_text(
    model: SparseTransformer,
    prompt: bytes,
    count: int,
    *,
    seed: int,
    temperature: float = 1.0,
    stop: object = False,
    say: Callable[[str], None] = print,
) -> bytes:
    """Sample up to `count` bytes that follow `prompt`.

    Args:
      model: the weights to sample from.
      prompt: at least a byte less than the model's context; it begins a window, as in
        training.
      count: how many bytes; prompt and sample together must fit the context.
      seed: the same seed gives the same bytes.
      temperature: divides the logits, above 0; the paper samples at 1.
      stop: where it becomes true, what was sampled so far is returned.
      say: takes a progress line, every ten seconds.
    """
    length = len(prompt) + count
    if length > model.config.context:
        raise ValueError(
            f"a prompt of {len(prompt)} and a sample of {count} bytes do not fit the "
            f"context of {model.config.context}; sample "
            f"{max(model.config.context - len(prompt), 0)} or fewer"
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; try 1.0")
    # One row, padded: what lies behind the place being sampled is never seen.
    steps = -(-count // BYTES_PER_CALL)
    size = min(len(prompt) + steps * BYTES_PER_CALL, model.config.context)
    bytes_T = np.zeros(size, np.int32)
    bytes_T[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    bytes_T, key = jnp.asarray(bytes_T), jax.random.key(seed)
    started = said = time.monotonic()
    for step in range(steps):
        if stop:
            count = min(count, step * BYTES_PER_CALL)
            break
        place = len(prompt) + step * BYTES_PER_CALL
        bytes_T = _sample(model, bytes_T, place, key, temperature)
        bytes_T.block_until_ready()
        now = time.monotonic()
        if now - said > 10:
            said, left = now, (now - started) / (step + 1) * (steps - step - 1)
            say(f"sampling: byte {place:,} of {length:,} | eta {duration(left)}")
    sampled = np.asarray(bytes_T)[len(prompt) : len(prompt) + count]
    return sampled.astype(np.uint8).tobytes()


@functools.partial(jax.jit, donate_argnums=1)
def _sample(model, bytes_T, start, key, temperature):
    """Fill in the next few bytes from `start` on, on the device."""

    def one(i, bytes_T):
        inputs_T = jnp.concatenate([jnp.array([START]), bytes_T[:-1]])
        # On a mesh that splits the batch, each piece has the same row.
        inputs_BT = jnp.broadcast_to(inputs_T, (batch_shards(), inputs_T.size))
        logits_N = whole(model(inputs_BT))[0, i] / temperature
        byte = jax.random.categorical(jax.random.fold_in(key, i), logits_N)
        return bytes_T.at[i].set(byte, mode="drop")

    return jax.lax.fori_loop(start, start + BYTES_PER_CALL, one, bytes_T)
