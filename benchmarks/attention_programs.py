"""The programs that benchmarks/attention.py times, compiled side by side."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

from benchmarks.attention_cases import CUDNN, Task
from sparse_flax.attention import Dense, sparse_attention

# Past so many tokens dense attention in float32 takes minutes, and tells nothing new.
EXACT_DENSE_T = 2**17


def attend(pattern, implementation, q, k, v):
    """The call that is timed."""
    if implementation == CUDNN:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    return sparse_attention(q, k, v, pattern, implementation=implementation)


def structs(shape, dtype=jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    """q, k, v and the output's gradient."""
    B, T, H, K, V = shape
    return [jax.ShapeDtypeStruct((B, T, H, width), dtype) for width in (K, K, V, V)]


def inputs(shape) -> list[jax.Array]:
    """Random values for them."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, structs(shape), strict=True)
    ]


def value_and_gradients(run):
    """(q, k, v, d_out) -> (out, dq, dk, dv)."""

    def call(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(d_out)

    return call


class Compiler:
    """Compiles programs side by side, each once in all processes.

    Tracing and compiling take far longer than the timing. The first process keeps its
    executables in a folder for the others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, {}
        self._pool = concurrent.futures.ThreadPoolExecutor(min(12, os.cpu_count() or 1))

    def start(self, task: Task, with_errors: bool) -> list[concurrent.futures.Future]:
        """Begin to compile what a row needs."""
        futures = [self.forward(task), self.both(task)]
        if with_errors and self.has_exact(task):
            futures.append(self.exact(task.pattern, part_shape(task)))
            if shape := dense_shape(task):
                futures += [self.exact(Dense(), shape), self.cudnn(shape)]
        return futures

    @staticmethod
    def has_exact(task: Task) -> bool:
        """Whether float32 attention can be had in reasonable time."""
        return task.pattern != Dense() or task.shape[1] <= EXACT_DENSE_T

    def forward(self, task: Task):
        """(q, k, v) -> out."""
        run = functools.partial(attend, task.pattern, task.implementation)
        return self._get("forward", task.key, run, structs(task.shape)[:3])

    def both(self, task: Task):
        """(q, k, v, d_out) -> (out, dq, dk, dv)."""
        run = functools.partial(attend, task.pattern, task.implementation)
        run = value_and_gradients(run)
        return self._get("both", task.key, run, structs(task.shape))

    def exact(self, pattern, shape):
        """The same in float32."""
        run = value_and_gradients(functools.partial(attend, pattern, "gathered"))
        args = structs(shape, jnp.float32)
        # Looking for the fastest way takes far longer than the slowest.
        return self._get(
            "exact", f"{pattern} {shape}", run, args, {"xla_gpu_autotune_level": 0}
        )

    def cudnn(self, shape):
        """Dense attention by cuDNN."""
        run = value_and_gradients(functools.partial(attend, Dense(), CUDNN))
        return self._get("cudnn", str(shape), run, structs(shape))

    def _get(self, what: str, name: str, run, args, options=None):
        key = f"{what} {name}"
        if key not in self._made:
            self._made[key] = self._pool.submit(self._compile, key, run, args, options)
        return self._made[key]

    def _compile(self, key: str, run, args, options):
        path = self._folder / "".join(x if x.isalnum() else "_" for x in key)
        if path.exists():
            try:
                kept = pickle.loads(path.read_bytes())
                return serialize_executable.deserialize_and_load(
                    *kept, execution_devices=jax.devices()[:1]
                )
            except (jax.errors.JaxRuntimeError, ValueError) as problem:
                print(f"  {key}: compiled again, since {problem}", flush=True)
        with jax.default_matmul_precision("highest" if options else "default"):
            compiled = jax.jit(run).lower(*args).compile(options)
        try:
            kept = pickle.dumps(serialize_executable.serialize(compiled))
        except (jax.errors.JaxRuntimeError, ValueError) as problem:
            print(f"  {key}: not kept, since {problem}", flush=True)
            return compiled
        new = path.with_suffix(".new")
        new.write_bytes(kept)
        new.replace(path)
        return compiled


def part_of(arrays, heads: int, width: int | None = None, dtype=None):
    """Return the last sequence's last heads of each, of that width and dtype."""
    return [x[-1:, :, -heads:, :width].astype(dtype or x.dtype) for x in arrays]


def part_shape(task: Task) -> tuple[int, int, int, int, int]:
    """Return the shape of the part that errors are taken in."""
    _, T, _, K, V = task.shape
    return 1, T, task.pattern.head_period, K, V


def dense_shape(task: Task) -> tuple[int, int, int, int, int] | None:
    """Return that of dense cuDNN's error, or None: not here, or over too many tokens.

    cuDNN takes one width, so where q and v differ the narrower is compared.
    """
    _, T, _, K, V = task.shape
    if "NVIDIA" not in jax.devices()[0].device_kind or T > EXACT_DENSE_T:
        return None
    return 1, T, 1, min(K, V), min(K, V)


def worst_error(got, exact) -> float:
    """Return the worst relative 2-norm of the errors of out, dq, dk and dv."""
    return max(
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(got, exact, strict=True)
    )
