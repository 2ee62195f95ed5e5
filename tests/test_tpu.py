"""Attention on TPUs: its layouts, calls and gradients, with the kernels interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_attention import assert_close, by_hand, inputs

from sparse_flax.attention import (
    Blocks,
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    Summaries,
    dispatch,
    explain,
    sparse_attention,
    splash_calls,
    tpu,
)

V5E = "TPU v5 lite"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks, and several tiles in each, of sequences that stay small."""
    monkeypatch.setattr(splash_calls, "BLOCK", 128)
    monkeypatch.setattr(tpu, "BLOCK", 128)
    monkeypatch.setattr(tpu, "CHUNK", 256)
    monkeypatch.setattr(tpu, "NARROWEST_HEAD", 4)
    splash_calls._plan.cache_clear()
    yield
    splash_calls._plan.cache_clear()


def value_and_gradients(run):
    def call(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(d_out)

    return jax.jit(call)


def plain(pattern, scale):
    return functools.partial(tpu.attend, pattern=pattern, scale=scale, interpret=True)


def calls_of_splash(pattern, shape):
    """How often a forward pass calls it."""
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = functools.partial(tpu.attend, pattern=pattern, scale=1.0)
    return str(jax.make_jaxpr(run)(q, q, q)).count("name=splash_m")


@pytest.mark.parametrize(
    ("pattern", "shape", "calls"),
    [  # B, T, H, H_kv, K, V
        (Dense(), (1, 130, 2, 1, 8, 4), 1),
        (Dense(), (1, 40, 2, 1, 8, 4), 0),  # under 128 rows
        (Local(1), (1, 300, 1, 1, 4, 8), 2),
        (Local(130), (2, 600, 2, 1, 4, 8), 2),  # chunks: the first, and two others
        (Columns(2), (1, 270, 2, 1, 8, 4), 1),
        (Blocks(130), (1, 270, 2, 1, 4, 8), 1),
        (Strided(2), (2, 259, 2, 1, 8, 8), 3),  # a row of columns that sees nothing
        (Strided(20), (1, 200, 2, 2, 8, 4), 1),  # band by splash, columns not
        (Fixed(128, 3, offset=1), (1, 300, 2, 1, 8, 4), 1),
        (Summaries(6, 3), (1, 33, 2, 1, 8, 4), 0),
        (PerHead((Local(5), Columns(2))), (1, 256, 2, 2, 4, 4), 2),
    ],
    ids=str,
)
def test_equals_the_mask(pattern, shape, calls):
    args = inputs(shape, 1)
    run = value_and_gradients(plain(pattern, shape[4] ** -0.5))
    assert_close(run(*args), by_hand(*args[:3], pattern, args[3]), 2e-5)
    assert calls_of_splash(pattern, shape[:3] + shape[4:5]) == calls
