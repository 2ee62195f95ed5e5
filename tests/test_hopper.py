"""Hopper kernels in Pallas's interpreter, and how they are picked, on any machine.

What only the GPU shows is in test_gpu_attention.py.
"""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_flax.attention import (
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    dispatch,
    explain,
    gathered,
    hopper,
    reference,
    sparse_attention,
    support_table,
)
from sparse_flax.attention.layouts import positive, row_products

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < hopper.OLDEST_JAX, reason="the kernels need jax 0.11"
)
H200 = "NVIDIA H200"
# Relative 2-norms: a few roundings to the operands' dtype.
TOLERANCE = {"bfloat16": 5e-3, "float16": 7e-4}


def inputs(shape, dtype="bfloat16"):
    B, T, H, H_kv, K, V = shape
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, H, K), (B, T, H_kv, K), (B, T, H_kv, V), (B, T, H, V)]
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def value_and_gradients(run, args):
    def call(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(d_out)

    return jax.jit(call)(*args)


def assert_equals_the_reference(run, pattern, args):
    scale = args[0].shape[-1] ** -0.5
    exact = functools.partial(reference.attend, pattern=pattern, scale=scale)
    want = value_and_gradients(exact, [x.astype(jnp.float32) for x in args])
    got = value_and_gradients(functools.partial(run, scale=scale), args)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == args[0].dtype and a.shape == b.shape
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < TOLERANCE[str(a.dtype)], (name, error)


@needs_new_jax
@pytest.mark.parametrize(
    ("pattern", "shape", "dtype"),
    [
        (Columns(2), (1, 192, 1, 1, 64, 64), "float16"),  # 96 rows: tiles overlap
        (Columns(1), (1, 130, 1, 1, 64, 64), "bfloat16"),  # long, padded to 192 rows
        (Columns(1), (1, 64, 2, 1, 64, 128), "bfloat16"),  # shared keys
        (Local(96), (1, 128, 1, 1, 64, 64), "bfloat16"),
        (Local(128), (1, 320, 2, 1, 32, 32), "float16"),
        (Local(130), (1, 192, 1, 1, 32, 32), "bfloat16"),  # ring; narrow heads
        (Local(193), (1, 256, 1, 1, 32, 32), "bfloat16"),  # farthest chunk by itself
        (Strided(96), (1, 330, 2, 1, 32, 32), "bfloat16"),  # a walk adds to columns
        (Strided(4), (1, 64, 2, 1, 128, 128), "bfloat16"),  # packed, two warpgroups
        (Strided(5), (1, 118, 1, 1, 64, 64), "bfloat16"),  # 24 rows, zeros, padding
        (Columns(2), (1, 128, 1, 1, 32, 32), "bfloat16"),  # narrow heads
        (Columns(1), (1, 270, 1, 1, 32, 32), "float16"),  # too long for a block
        (Local(520), (1, 576, 1, 1, 64, 64), "bfloat16"),  # too wide for one
        (Strided(1), (1, 270, 1, 1, 32, 64), "bfloat16"),  # both halves walk
        pytest.param(
            *(Columns(1), (1, 192, 2, 1, 128, 128), "bfloat16"),  # walks, wide heads
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(Strided(8), (1, 4, 1, 1, 64, 64), "bfloat16"),  # columns of one token
            marks=pytest.mark.slow,
        ),
        pytest.param(  # the ring adds to the columns' gradients
            *(Strided(130), (1, 1041, 1, 1, 64, 64), "bfloat16"),
            marks=pytest.mark.slow,
        ),
        (
            PerHead((Fixed(64, 32, rotate=True), Columns(4))),
            (1, 128, 4, 2, 64, 64),
            "bfloat16",
        ),
    ],
    ids=str,
)
def test_equals_the_reference(pattern, shape, dtype):
    # The interpreter runs a warpgroup a thread of XLA's pool, which the eight devices
    # of conftest.py make large enough.
    run = functools.partial(hopper.attend, pattern=pattern, interpret=True)
    assert_equals_the_reference(run, pattern, inputs(shape, dtype))


@needs_new_jax
def test_vmap():
    def run(q, k, v, scale):
        one = functools.partial(
            hopper.attend, pattern=Columns(2), scale=scale, interpret=True
        )
        return jax.vmap(lambda *x: one(*(y[None] for y in x))[0])(q, k, v)

    assert_equals_the_reference(run, Columns(2), inputs((2, 64, 1, 1, 64, 64)))


@pytest.fixture
def on_an_h200(monkeypatch):
    monkeypatch.setattr(dispatch, "target_device_kind", lambda: H200)
    dispatch._warn_once.cache_clear()


def count(jaxpr, kernel):
    """Calls of a kernel in a program; a loop's body counts once."""
    calls = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == kernel:
            calls += 1
            continue
        for inner in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)  # closed or not
            calls += count(inner, kernel) if hasattr(inner, "eqns") else 0
    return calls


@needs_new_jax
@pytest.mark.usefixtures("on_an_h200")
@pytest.mark.parametrize(("keep", "runs"), [((), 2), (("out", "lse"), 1)])
@pytest.mark.parametrize(
    ("pattern", "forward", "backward"),
    [
        (
            Strided(128),
            ("columns_forward", "band_forward"),
            ("columns_backward", "band_backward"),
        ),
        (
            Fixed(128, 32, rotate=True),
            ("fixed_forward",),
            ("fixed_summary_gradients", "fixed_block_gradients"),
        ),
    ],
    ids=str,
)
def test_a_checkpoint_policy_keeps_the_result(pattern, forward, backward, keep, runs):
    """Inside scan and checkpoint: with both names kept no kernel runs twice."""
    names = [f"attention_{name}" for name in keep]
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(q, k, v):
        def layer(q, _):
            run = jax.checkpoint(
                lambda q: sparse_attention(q, k, v, pattern), policy=policy
            )
            return run(q), None

        out, _ = jax.lax.scan(layer, q, length=2)
        return out.astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((1, 12288, 2, 64), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, q, q)
    for kernel in forward:
        assert count(program.jaxpr, kernel) == runs, kernel
    for kernel in backward:
        assert count(program.jaxpr, kernel) == 1, kernel


@needs_new_jax
@pytest.mark.usefixtures("on_an_h200")
@pytest.mark.parametrize("pattern", [Strided(64), Fixed(64, 32, rotate=True)], ids=str)
def test_sharded_results_keep_their_sharding(pattern):
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "tensor", "other"), axis_types=(AxisType.Explicit,) * 3
    )
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    q = jax.ShapeDtypeStruct((4, 1024, 4, 64), jnp.bfloat16, sharding=sharding)

    def call(q, k, v, d_out):
        run = functools.partial(sparse_attention, pattern=pattern)
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(d_out)

    with jax.set_mesh(mesh):
        program = jax.jit(call).trace(q, q, q, q)
    for result in program.jaxpr.out_avals:
        assert result.sharding.spec == P("data", None, "tensor", None)
    assert "psum" not in str(program.jaxpr)


@needs_new_jax
@pytest.mark.usefixtures("on_an_h200")
def test_the_fastest_is_picked_and_what_falls_back_says_so_once():
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = functools.partial(sparse_attention, pattern=Strided(64))
        assert "columns_forward" in str(jax.make_jaxpr(run)(q, q, q))
    run = functools.partial(sparse_attention, pattern=Dense())
    with pytest.warns(UserWarning, match=r"Dense\(\) runs cudnn, since hopper"):
        jax.eval_shape(run, q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(run, q, q, q)


@needs_new_jax
@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "says"),
    [
        (Strided(128), (1, 1024, 2, 64), "float32", "in bfloat16"),
        (Strided(128), (1, 1024, 2, 256), "bfloat16", "up to 128 wide, not 256"),
        (
            PerHead((Local(8), Dense())),
            (1, 64, 2, 64),
            "bfloat16",
            "no kernels for Dense",
        ),
        (Local(128), (1, 2**22, 1, 64), "bfloat16", "1 sequences of 4194304 tokens"),
        (Columns(1024), (32, 266_240, 16, 32), "bfloat16", "try fewer at a time"),
        (Fixed(64, 8), (2**16, 64, 1, 64), "bfloat16", "over 65536 sequences"),
    ],
    ids=str,
)
def test_what_is_refused_by_name_says_why(pattern, shape, dtype, says):
    q = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError) as error:
        explain(pattern, q, q, q, device_kind=H200, implementation="hopper")
    assert says in str(error.value) and "\n" not in str(error.value)
    told = explain(pattern, q, q, q, device_kind=H200)
    assert told.implementation != "hopper" and says in told.reason


@needs_new_jax
def test_what_vmap_makes_too_many_is_a_sentence():
    q = jax.ShapeDtypeStruct((2**15, 2, 64, 1, 64), jnp.bfloat16)
    run = functools.partial(hopper.attend, pattern=Local(128), scale=0.125)
    with pytest.raises(ValueError, match=r"takes up to 65535 .* fewer sequences"):
        jax.eval_shape(jax.vmap(run), q, q, q)


@needs_new_jax
@pytest.mark.slow
@pytest.mark.parametrize(("window", "width"), [(128, 64), (70, 32)])
def test_a_walk_that_refills_its_buffers_is_the_other_kernel_s_gradient(window, width):
    """With ten query tiles a block; fewer would do for so short a sequence."""
    from sparse_flax.attention.hopper import band, band_walk

    q, k, v, d_out = inputs((1, 640, 1, 1, width, width), "float16")
    out, lse = gathered.attend_parts(q, k, v, Local(window).parts(), 0.125)
    delta = jnp.sum(out * d_out, axis=-1).swapaxes(1, 2)
    args = q, k, v, d_out, lse.swapaxes(1, 2), delta, 0.125, window
    want = band.backward(*args, interpret=True)
    got = band_walk.backward(*args, each=10, interpret=True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=2e-3)


@needs_new_jax
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (Columns(64), (1, 65536, 2, 64)),
        (Columns(64), (1, 12288, 2, 128)),
        (Strided(700), (1, 16384, 2, 64)),
        (Strided(1024), (1, 2**20, 8, 64)),
        (Local(1), (1, 1024, 2, 64)),
        (Strided(8), (1, 4, 2, 64)),
        (Columns(8), (1, 1, 2, 96)),
    ],
    ids=str,
)
def test_no_length_is_too_long_or_short(pattern, shape):
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert explain(pattern, q, q, q, device_kind=H200).implementation == "hopper"

    def call(q, k, v, d_out):
        run = functools.partial(hopper.attend, pattern=pattern, scale=0.125)
        return jax.vjp(run, q, k, v)[1](d_out)

    for gradient in jax.eval_shape(call, q, q, q, q):
        assert gradient.shape == shape


def test_other_devices_and_older_versions():
    q = (1, 12288, 2, 64)
    told = explain(Strided(128), q, q, q, device_kind=H200)
    if jax.__version_info__ < hopper.OLDEST_JAX:
        assert told.implementation == "cudnn" and "jax 0.11" in told.reason
    else:
        assert told.implementation == "hopper"
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA H2000", "cpu", "TPU v5e"):
        told = explain(Strided(128), q, q, q, device_kind=device)
        assert told.implementation != "hopper" and "hopper" not in told.reason
    for device in ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H20"):
        assert hopper.runs_on(device) is None
    with pytest.raises(ValueError, match="hopper"):
        sparse_attention(
            *[jnp.ones((1, 64, 1, 64))] * 3, Local(8), implementation="hopper"
        )


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.2])
def test_a_positive_scale_makes_the_same_logits(scale):
    q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    other, moved = positive(scale, q)
    assert other > 0
    np.testing.assert_array_equal(other * moved, scale * q)


def test_row_products_are_summed_unrounded():
    out, d_out = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 64), "bfloat16")
    exact = np.einsum("BTHV,BTHV->BHT", *(np.float64(x) for x in (out, d_out)))
    np.testing.assert_allclose(row_products(out, d_out), exact, atol=1e-5)


def test_support_table():
    table = support_table()
    lines = table.split("\n")
    assert "hopper | cudnn | tpu | gathered | reference" in lines[0]
    strided = next(line for line in lines if "| `Strided(stride=128)`" in line)
    works = jax.__version_info__ >= hopper.OLDEST_JAX
    assert ("| yes | yes | yes | yes | yes |" in strided) == works
    assert all(line.startswith("|") for line in lines[: lines.index("")])
    assert lines[-1].split(". ")[1].startswith(("hopper", "cudnn"))
    notes = dict(line.split(". ", 1) for line in lines[lines.index("") + 1 :])
    heads = [cell.strip() for cell in lines[0].split("|")]
    referred = set()
    for line in lines[: lines.index("")]:
        for name, cell in zip(heads, line.split("|"), strict=True):
            if found := re.search(r"no \((\d+)\)", cell):
                assert notes[found[1]].startswith(name)
                referred.add(found[1])
    assert referred == notes.keys()
