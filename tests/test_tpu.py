"""Attention on TPUs: its layouts, calls and gradients, with the kernels interpreted."""

import functools

import jax
import jax.numpy as jnp
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


def slow(*case):
    """Of what the other cases leave out too little is new to run it every time."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("pattern", "shape", "calls"),
    [  # B, T, H, H_kv, K, V
        (Dense(), (1, 40, 2, 1, 8, 4), 0),  # under 128 rows
        slow(Dense(), (1, 130, 2, 1, 8, 4), 1),
        slow(Local(1), (1, 300, 1, 1, 4, 8), 2),
        (Local(130), (2, 600, 2, 1, 4, 8), 2),  # chunks: the first, and two others
        slow(Columns(2), (1, 270, 2, 1, 8, 4), 1),
        slow(Blocks(130), (1, 270, 2, 1, 4, 8), 1),
        (Strided(2), (2, 259, 2, 1, 8, 8), 3),  # a row of columns that sees nothing
        slow(Strided(20), (1, 200, 2, 2, 8, 4), 1),  # band by splash, columns not
        (Fixed(128, 3, offset=1), (1, 300, 2, 1, 8, 4), 1),
        slow(Summaries(6, 3), (1, 33, 2, 1, 8, 4), 0),
        slow(PerHead((Local(5), Columns(2))), (1, 256, 2, 2, 4, 4), 2),
    ],
    ids=str,
)
def test_equals_the_mask(pattern, shape, calls):
    args = inputs(shape, 1)
    run = value_and_gradients(plain(pattern, shape[4] ** -0.5))
    assert_close(run(*args), by_hand(*args[:3], pattern, args[3]), 2e-5)
    assert calls_of_splash(pattern, shape[:3] + shape[4:5]) == calls


def test_shards_compute_alone_what_one_device_does(monkeypatch):
    """Through sparse_attention, which must tell shard_map what splash does not."""
    monkeypatch.setattr(dispatch, "target_device_kind", lambda: V5E)
    attend = functools.partial(tpu.attend, interpret=True)
    monkeypatch.setattr(tpu, "attend", attend)
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )
    args = inputs((2, 140, 2, 2, 4, 4))
    run = value_and_gradients(functools.partial(sparse_attention, pattern=Blocks(140)))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, P("data", None, "tensor")) for x in args]
        compiled = run.lower(*sharded).compile()
        got = compiled(*sharded)
    assert got[0].sharding.spec == P("data", None, "tensor", None)
    assert_close(got, by_hand(*args[:3], Blocks(140), args[3]), 2e-5)
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text()


@pytest.mark.parametrize("pattern", [Local(100), Blocks(256)], ids=str)
def test_masks_do_not_grow_with_the_sequence(pattern):
    """Those of columns grow with their rows, those of dense attention with T."""

    def masks(T):
        what = tpu.Union(pattern.parts(), 1.0, fits=True, interpret=False)
        q = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.bfloat16)
        sizes = []
        for piece, _, args in what.calls(q):
            rows, keys = (
                jax.eval_shape(fold, q).shape[1]
                for fold in (piece.fold_q, piece.fold_kv)
            )
            sizes.append(splash_calls._plan(rows, keys, args[1])[-2:])
        return sizes

    assert masks(2**12) == masks(2**16)


@pytest.mark.parametrize(
    ("device_kind", "runs"),
    [
        (V5E, True),
        ("TPU v4", True),
        ("TPU v5", True),
        ("TPU v6 lite", True),
        ("TPU7x", True),
        ("TPU v3", False),
        ("TPU v2", False),
        ("NVIDIA H200", False),
        ("cpu", False),
    ],
)
def test_which_devices_it_runs_on(device_kind, runs):
    assert (tpu.runs_on(device_kind) is None) == runs
    told = explain(Dense(), *[(1, 256, 2, 512)] * 3, device_kind=device_kind)
    assert told.implementation == ("tpu" if runs else "gathered")


def test_what_is_refused_says_why(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.float16)
    told = explain(Dense(), q, q, q, device_kind=V5E)
    assert told.implementation == "gathered" and "in bfloat16" in told.reason
    with pytest.raises(ValueError, match="in bfloat16"):
        explain(Dense(), q, q, q, device_kind=V5E, implementation="tpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
    assert "to before 0.13" in tpu.supports(Dense(), q, q, q)
