"""One sequence over several devices: as on one, for values and gradients."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_attention import assert_close, by_hand, inputs, value_and_gradients
from test_cudnn import EINSUM

from sparse_flax.attention import (
    Blocks,
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    Summaries,
    cudnn,
    explain,
    gathered,
    hopper,
    parallel,
    parts,
    reference,
    sparse_attention,
    union,
)

AXES = ("data", "fsdp", "tensor", "context")
SPEC = P(("data", "fsdp"), "context", "tensor", None)
PATTERNS = [
    Dense(),
    Local(4),
    Columns(4),
    Strided(4),
    Blocks(2),
    Summaries(4, 2),
    Fixed(4, 2),
    PerHead((Strided(4), Fixed(4, 2, rotate=True))),
]
EDGES = [
    Local(1),  # nothing to fetch
    Local(11),  # from three devices
    Local(100),  # from all
    Columns(1),  # fewer columns than devices
    Columns(100),  # only itself
    Strided(1),
    Strided(2),
    Blocks(4),
    Blocks(100),  # all tokens
    Summaries(2, 1),
    Summaries(4, 1, offset=1),
    Fixed(4, 4),
    Fixed(4, 2, rotate=True),
    Fixed(64, 2),  # one block
    PerHead((Local(4), Columns(4))),
]


def mesh_of(*sizes):
    return jax.make_mesh(
        sizes,
        AXES,
        axis_types=(AxisType.Explicit,) * 4,
        devices=jax.devices()[: math.prod(sizes)],
    )


def spread(args, *sizes):
    return [jax.device_put(x, SPEC) for x in args]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [*PATTERNS, *(pytest.param(p, marks=pytest.mark.slow) for p in EDGES)],
    ids=str,
)
def test_equals_one_device(pattern, sizes):
    args = inputs((2, 32, 8, 4, 4, 6))
    with jax.set_mesh(mesh_of(*sizes)):
        got = value_and_gradients(pattern, None)(*spread(args))
    assert got[0].sharding.spec == SPEC
    assert_close(got, by_hand(*args[:3], pattern, args[3]), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_an_axis_of_one_device_sends_nothing(pattern):
    args = inputs((2, 16, 4, 4, 4, 4))
    run = value_and_gradients(pattern, "gathered")
    with jax.set_mesh(mesh_of(1, 1, 1, 1)):
        got = run(*spread(args))
        sent = collectives(run, *spread(args))
    assert_close(got, by_hand(*args[:3], pattern, args[3]), 2e-5)
    assert not sent


@pytest.mark.parametrize("devices", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_any_number_of_devices(devices):
    pattern = PerHead((Fixed(2, 1), Strided(4)))
    args = inputs((1, 24, 2, 2, 4, 4))
    with jax.set_mesh(mesh_of(1, 1, 1, devices)):
        got = value_and_gradients(pattern, None)(*spread(args))
    assert_close(got, by_hand(*args[:3], pattern, args[3]), 2e-5)


@pytest.mark.parametrize(
    "pattern", [Strided(100), Fixed(100, 2), Local(4), Dense()], ids=str
)
def test_scale_is_used_and_a_stride_or_block_may_be_longer_than_the_sequence(pattern):
    q, k, v, _ = inputs((1, 16, 2, 1, 4, 4))
    expected = reference.attend(q, k, v, pattern, 0.8)
    with jax.set_mesh(mesh_of(1, 1, 1, 2)):
        got = jax.jit(functools.partial(sparse_attention, pattern=pattern, scale=0.8))(
            *spread((q, k, v))
        )
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_second_derivatives():
    q, k, v, _ = inputs((1, 16, 1, 1, 4, 4))

    def run(q, k, v):
        return (sparse_attention(q, k, v, Strided(4)) ** 2).sum()

    def curvature(q, k, v):
        return jax.grad(lambda q: (jax.grad(run)(q, k, v) ** 2).sum())(q)

    alone = jax.jit(curvature)(q, k, v)
    with jax.set_mesh(mesh_of(1, 1, 1, 4)):
        together = jax.jit(curvature)(*spread((q, k, v)))
    np.testing.assert_allclose(together, alone, atol=1e-4, rtol=1e-4)


# ---- What is sent ------------------------------------------------------------------


def collectives(run, *args):
    """The kinds of exchange in a compiled program, each with its largest array."""
    program = run.lower(*args).compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    found = {}
    for shape, kind in re.findall(rf"= \(?\w+\[([\d,]*)\].* ({kinds})\(", program):
        size = math.prod(int(x) for x in shape.split(",") if x)
        found[kind] = max(found.get(kind, 0), size)
    return found


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (Local(4), ["collective-permute"]),
        (Columns(8), ["all-to-all"]),
        (Blocks(8), []),
        (Summaries(8, 2), ["all-gather", "reduce-scatter"]),
    ],
    ids=str,
)
def test_no_more_is_sent_than_the_pattern_needs(pattern, kinds):
    B, T, H, K = 1, 256, 2, 4
    with jax.set_mesh(mesh_of(1, 1, 1, 8)):
        args = spread(inputs((B, T, H, H, K, K)))
        sent = collectives(value_and_gradients(pattern, "gathered"), *args)
    kept = set(kinds) - {"reduce-scatter"}
    # A CPU's compiler makes two of a reduce-scatter.
    assert (
        kept <= set(sent) <= {*kinds, *({"all-reduce"} if kinds != list(kept) else ())}
    )
    shard = B * T // 8 * H * K
    most = {
        "collective-permute": B * 3 * H * K,
        "all-to-all": shard,
        "all-gather": B * T // 8 * 2 * H * K,
    }
    for kind in kept:
        assert sent[kind] <= most[kind], (kind, sent)


def test_explains_what_is_sent():
    shape = (1, 1024, 4, 64)
    told = explain(Strided(128), *[shape] * 3, shards=(1, 4, 1), device_kind="cpu")
    assert told.implementation == "gathered"
    assert told.exchanges == (
        "Band(width=128) with 127 keys of the device before",
        "Columns(stride=32, strict=True) all-to-all, 32 columns a device",
    )
    assert "all-to-all" in str(told)
    told = explain(Fixed(128, 32), *[shape] * 3, shards=(1, 4, 1), device_kind="cpu")
    assert "Summaries(size=128, width=32, offset=0) of all" in told.exchanges[-1]
    assert explain(Strided(128), *[shape] * 3, device_kind="cpu").exchanges == ()
    with pytest.raises(ValueError, match="reference needs a sequence whole"):
        explain(Dense(), *[shape] * 3, shards=(1, 4, 1), implementation="reference")


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        (Strided(6), "strides of 6 would cross devices; try 5"),
        (Fixed(4, 2), "blocks of 4 would cross devices; try 5"),
        (PerHead((Local(3), Blocks(20))), "blocks of 20 would cross devices; try 10"),
    ],
    ids=str,
)
def test_refuses_what_would_cross_devices(pattern, nearest):
    args = inputs((1, 40, 2, 2, 4, 4))[:3]
    with (
        jax.set_mesh(mesh_of(1, 1, 1, 4)),
        pytest.raises(ValueError, match=nearest) as error,
    ):
        sparse_attention(*spread(args), pattern)
    assert "\n" not in str(error.value)


def test_refuses_implementations_that_need_the_whole_sequence():
    args = inputs((1, 32, 2, 2, 4, 4))[:3]
    with jax.set_mesh(mesh_of(1, 1, 1, 4)):
        with pytest.raises(ValueError, match="reference needs a sequence whole"):
            sparse_attention(*spread(args), Strided(4), implementation="reference")
        with pytest.raises(ValueError, match="reshard the width"):
            x = jax.device_put(args[0], P(None, None, None, "context"))
            sparse_attention(x, x, x, Strided(4))
        with pytest.raises(ValueError, match=r"q is sharded as .* v as .* alike"):
            sparse_attention(*spread(args[:2]), args[2], Strided(4))


# ---- Kernels -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        Strided(4),
        pytest.param(Local(11), marks=pytest.mark.slow),
        pytest.param(Dense(), marks=pytest.mark.slow),
        pytest.param(Summaries(4, 2), marks=pytest.mark.slow),
        Fixed(4, 2, rotate=True),
    ],
    ids=str,
)
def test_kernels_get_the_statistics_of_the_union(pattern):
    """With plain JAX in cuDNN's place; its gradients see only one share at a time."""
    module = types.SimpleNamespace(
        attend_parts=functools.partial(cudnn.attend_parts, core=EINSUM),
        parts_gradients=functools.partial(cudnn.parts_gradients, core=EINSUM),
    )
    module = Hashable(**vars(module))
    args = inputs((2, 32, 4, 2, 8, 4))

    def run(q, k, v, d_out):
        attend = functools.partial(
            parallel.attend, pattern=pattern, scale=2 * 8**-0.5, axis="context"
        )
        attend = jax.shard_map(
            functools.partial(attend, module=module),
            in_specs=(SPEC,) * 3,
            out_specs=SPEC,
        )
        out, pull = jax.vjp(lambda q, k, v: attend(q / 2, k, v), q, k, v)
        return out, *pull(d_out)

    with jax.set_mesh(mesh_of(2, 1, 1, 4)):
        got = jax.jit(run)(*spread(args))
    assert_close(got, by_hand(*args[:3], pattern, args[3]), 2e-5)


@pytest.mark.parametrize("pattern", [Strided(4), Fixed(4, 2), Local(20)], ids=str)
def test_an_implementation_is_asked_about_the_queries_that_it_gets(pattern):
    asked, got = [], []

    def supports_parts(parts, q, k, v):
        asked.append((parts, q.shape, q.dtype))

    def attend_parts(q, k, v, parts, scale):
        got.append((parts, q.shape, q.dtype))
        return gathered.attend_parts(q, k, v, parts, scale)

    module = Hashable(supports_parts=supports_parts, attend_parts=attend_parts)
    q, k, v, _ = inputs((2, 32, 4, 2, 8, 4))
    attend = functools.partial(
        parallel.attend, pattern=pattern, scale=1.0, axis="context", module=module
    )
    with jax.set_mesh(mesh_of(1, 1, 1, 4)):
        attend = jax.shard_map(attend, in_specs=(SPEC,) * 3, out_specs=SPEC)
        jax.eval_shape(attend, *spread((q, k, v)))
    assert not parallel.supports(module, pattern, q[:, :8], k[:, :8], v[:, :8], 4)
    assert set(asked) == set(got)


class Hashable(types.SimpleNamespace):
    """As modules are."""

    __hash__ = object.__hash__


@pytest.mark.skipif(
    jax.__version_info__ < hopper.OLDEST_JAX, reason="the kernels need jax 0.11"
)
@pytest.mark.parametrize(
    ("pattern", "shares"),
    [
        (Strided(4), [(parts.Band(4),), (parts.Columns(4, strict=True),)]),
        (Columns(2), [(parts.Columns(2),)]),
        (Fixed(64, 32), [(parts.OwnBlock(64), parts.Summaries(64, 32))]),
        (Summaries(64, 32), [(parts.Summaries(64, 32), parts.Self())]),
    ],
    ids=str,
)
def test_hopper_computes_parts(pattern, shares):
    """In Pallas's interpreter, which knows one device: shares of nothing fetched."""
    args = [x.astype(jnp.bfloat16) for x in inputs((1, 128, 2, 1, 32, 64))]
    q, k, v, d_out = args
    scale = -0.2
    out, lse = union.merge_all(
        hopper.attend_parts(q, k, v, some, scale, interpret=True) for some in shares
    )
    out = out.astype(q.dtype)
    rest = out, lse, d_out
    gradients = [
        hopper.parts_gradients(q, k, v, *rest, some, scale, interpret=True)
        for some in shares
    ]
    got = (
        out,
        *(sum(x.astype(jnp.float32) for x in g) for g in zip(*gradients, strict=True)),
    )
    exact = functools.partial(reference.attend, pattern=pattern, scale=scale)
    want, pull = jax.vjp(exact, *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(got, (want, *pull(d_out.astype(jnp.float32))), strict=True):
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 7e-3 * jnp.linalg.norm(b)
