"""What stands around cuDNN's calls, on any machine.

The layouts, merging and gradients run with plain JAX in cuDNN's place; the calls
themselves are compiled for a GPU as far as a machine without one can. What only a GPU
shows is in test_gpu_cudnn.py.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
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
    cudnn,
    dispatch,
    explain,
    sparse_attention,
)

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"

# ---- The algebra -------------------------------------------------------------------


def _weights(q, k, lse, scale, causal, window):
    """exp(logit - lse) of every head over k's heads repeated; lse None: logits."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    i, j = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    seen = (j <= i) | (not causal)
    if window is not None:
        seen &= i - j < window
    logits = jnp.where(seen, jnp.einsum("BQHW,BSHW->BHQS", q, k) * scale, -jnp.inf)
    return logits if lse is None else jnp.exp(logits - lse.swapaxes(1, 2)[..., None])


def _forward(q, k, v, *args):
    assert q.shape[1] > 1 and k.shape[1] > 1 and q.shape[3] == v.shape[3]
    logits = _weights(q, k, None, *args)
    lse = jax.nn.logsumexp(logits, axis=-1)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    out = jnp.einsum("BHQS,BSHW->BQHW", jnp.exp(logits - lse[..., None]), v)
    return out, lse.swapaxes(1, 2)


def _backward(q, k, v, out, lse, d_out, scale, *args):
    group, H = q.shape[2] // k.shape[2], k.shape[2]
    p = _weights(q, k, lse, scale, *args)
    values = jnp.repeat(v, group, axis=2)
    dp = jnp.einsum("BQHW,BSHW->BHQS", d_out, values)
    delta = jnp.sum(out * d_out, axis=-1).swapaxes(1, 2)[..., None]
    ds = p * (dp - delta) * scale
    dq = jnp.einsum("BHQS,BSHW->BQHW", ds, jnp.repeat(k, group, axis=2))
    dk, dv = (
        jnp.einsum("BHQS,BQHW->BSHW", x, y).reshape(*k.shape[:2], H, group, -1).sum(3)
        for x, y in ((ds, q), (p, d_out))
    )
    return dq, dk, dv


EINSUM = cudnn.Core(_forward, _backward)


def value_and_gradients(run):
    def call(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(d_out)

    return jax.jit(call)


def plain(pattern, scale, core=EINSUM):
    return functools.partial(cudnn.attend, pattern=pattern, scale=scale, core=core)


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [  # B, T, H, H_kv, K, V
        (Dense(), (1, 5, 4, 2, 8, 4)),
        (Dense(), (1, 1, 2, 1, 4, 4)),  # cuDNN wants two keys or more
        (Local(1), (2, 9, 2, 1, 4, 4)),
        (Local(5), (2, 37, 4, 2, 8, 12)),
        (Columns(4), (2, 42, 4, 2, 8, 4)),
        (Blocks(7), (2, 40, 4, 2, 4, 8)),
        (Strided(7), (2, 43, 4, 2, 8, 4)),
        (Strided(20), (2, 40, 4, 2, 8, 8)),  # one row of strictly causal columns
        (Strided(20), (2, 18, 2, 2, 8, 8)),  # none
        (Fixed(4, 2), (2, 43, 4, 2, 8, 4)),  # 11 blocks: levels 1, 2, 4, 8
        (Fixed(8, 3, offset=1), (2, 37, 2, 2, 8, 8)),
        (Summaries(6, 3), (1, 33, 2, 1, 8, 4)),
        (PerHead((Columns(4), Fixed(6, 3, rotate=True))), (2, 17, 4, 2, 4, 8)),
    ],
    ids=str,
)
def test_equals_the_mask(pattern, shape):
    args = inputs(shape, 1)
    got = value_and_gradients(plain(pattern, shape[4] ** -0.5))(*args)
    assert_close(got, by_hand(*args[:3], pattern, args[3]), 2e-5)


def test_the_backward_pass_runs_where_a_caller_forbids_rank_promotion():
    q, k, v, d_out = inputs((1, 9, 1, 1, 4, 4), 1)
    _, pull = jax.vjp(plain(Strided(3), 0.5), q, k, v)
    usual = pull(d_out)
    with jax.numpy_rank_promotion("raise"):
        same = pull(d_out)
    for a, b in zip(usual, same, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_second_derivative_is_refused_in_a_sentence():
    q, k, v, _ = inputs((1, 9, 1, 1, 4, 4), 1)
    run = plain(Strided(3), 0.5)

    def gradient(q):
        return jax.grad(lambda q: run(q, k, v).sum())(q)

    gradient(q)
    for twice in (jax.jacfwd(gradient), jax.grad(lambda q: gradient(q).sum())):
        with pytest.raises(NotImplementedError, match="pass implementation='gathered'"):
            twice(q)


@pytest.mark.parametrize("pattern", [Strided(5), Fixed(3, 2)], ids=str)
@pytest.mark.parametrize("T", [1, 4, 7, 13, 22, 39])
def test_pieces_are_disjoint_and_make_up_the_mask(pattern, T):
    """Shown by where the folds bring the numbers 1 .. T."""
    pieces = list(cudnn._pieces(pattern.parts(), T))

    @jax.jit
    def folded(x):
        return [(piece.fold_q(x), piece.fold_kv(x)) for piece in pieces]

    seen = np.zeros((T + 1, T + 1), int)  # 0 is padding
    places = folded(jnp.arange(1, T + 1).reshape(1, T, 1, 1))
    for piece, both in zip(pieces, places, strict=True):
        q, k = (np.moveaxis(x[..., 0], 1, 2).reshape(-1, x.shape[1]) for x in both)
        i, j = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
        mask = (j <= i) | (not piece.causal)
        if piece.window is not None:
            mask &= i - j < piece.window
        at_i, at_j = np.nonzero(mask)
        np.add.at(seen, (q[:, at_i], k[:, at_j]), 1)
    assert not seen[1:, 0].any(), "a real query sees padding"
    np.testing.assert_array_equal(seen[1:, 1:], pattern.mask(T))


def test_large_logits_where_queries_look_at_themselves():
    """Strict columns and a band, where self is nearly all or nearly none of the sum."""
    q, k, v, d_out = inputs((1, 24, 2, 2, 8, 8))
    for sign in (1, -1):
        args = 6 * q, sign * 6 * q + k, v, d_out
        got = value_and_gradients(plain(Strided(6), 1.0))(*args)
        want = by_hand(args[0] * 8**0.5, args[1], v, Strided(6), d_out)
        want = want[0], want[1] * 8**0.5, *want[2:]
        for a, b in zip(got, want, strict=True):
            a = np.asarray(a, np.float64)
            assert np.isfinite(a).all()
            np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_vmap_and_checkpoint():
    args = inputs((3, 20, 2, 1, 4, 4))
    run = plain(Strided(4), 0.5)
    whole = value_and_gradients(run)(*args)

    def mapped(q, k, v):
        one = jax.checkpoint(
            lambda *x: run(*(y[None] for y in x))[0],
            policy=jax.checkpoint_policies.save_only_these_names("attention_out"),
        )
        return jax.vmap(one)(q, k, v)

    for a, b in zip(value_and_gradients(mapped)(*args), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_vmap_over_queries_alone():
    q, k, v, _ = inputs((3, 9, 2, 1, 4, 4))
    run = jax.jit(plain(Strided(4), 0.5))
    both = jax.vmap(run, (0, None, None))(jnp.stack([q, -q]), k, v)
    np.testing.assert_allclose(both[0], run(q, k, v), atol=2e-6)
    np.testing.assert_allclose(both[1], run(-q, k, v), atol=2e-6)


# ---- The calls ---------------------------------------------------------------------


def program(run, q, k, v):
    """Lower value and gradients for a GPU; give its calls of cuDNN and its text."""

    def call(q, k, v):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(out)

    lowered = jax.jit(call).trace(q, k, v).lower(lowering_platforms=("cuda",))
    calls = []
    for line in lowered.as_text().split("\n"):
        if found := re.search(r"@__cudnn\$(\w+)\(.*backend_config = \"(.*?)\",", line):
            text = re.sub(r"\\(..)", lambda x: chr(int(x[1], 16)), found[2])
            settings = json.loads(text)["cudnn_fmha_backend_config"]
            shape = settings["intermediate_tensor_shape"]["dimensions"]
            calls.append(
                (
                    found[1],
                    tuple(map(int, shape)),  # batch, heads, queries, keys
                    settings["mask_type"],
                    settings["sliding_window_length"],
                )
            )
    return calls, lowered.as_text()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Dense(), [((2, 4, 1000, 1000), "CAUSAL", 0)]),
        (Local(100), [((2, 4, 1000, 1000), "CAUSAL", 100)]),
        (Local(1000), [((2, 4, 1000, 1000), "CAUSAL", 0)]),
        (Columns(64), [((2, 256, 16, 16), "CAUSAL", 0)]),
        (Blocks(64), [((32, 4, 64, 64), "CAUSAL", 0)]),
        (
            Strided(64),
            [((2, 4, 1000, 1000), "CAUSAL", 64), ((2, 256, 15, 15), "CAUSAL", 0)],
        ),
        (
            Fixed(250, 16),
            [
                ((8, 4, 250, 250), "CAUSAL", 0),
                ((4, 4, 250, 16), "NO_MASK", 0),
                ((2, 4, 500, 32), "NO_MASK", 0),
            ],
        ),
        (
            PerHead((Local(100), Columns(64))),
            [((2, 2, 1000, 1000), "CAUSAL", 100), ((2, 128, 16, 16), "CAUSAL", 0)],
        ),
    ],
    ids=str,
)
def test_calls_of_cudnn_forward_and_backward(pattern, expected):
    """Also the proof that this jax has the private calls as they are used."""
    q = jax.ShapeDtypeStruct((2, 1000, 4, 60), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 1000, 2, 60), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((2, 1000, 2, 32), jnp.bfloat16)
    calls, text = program(plain(pattern, 0.125, cudnn.CUDNN), q, k, v)
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        assert sorted(x[1:] for x in calls if x[0] == name) == sorted(expected)
    assert len(calls) == 2 * len(expected)
    assert "1000x1000" not in text  # nor any other T x T array
    assert "x64xbf16" in text and "x60xbf16" in text  # width 60 is padded to 64


@pytest.mark.parametrize(("keep", "runs"), [((), 2), (("out", "lse"), 1)])
def test_a_checkpoint_policy_keeps_the_result(keep, runs):
    names = [f"attention_{name}" for name in keep]
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    run = jax.checkpoint(plain(Dense(), 0.125, cudnn.CUDNN), policy=policy)
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    calls, _ = program(run, q, q, q)
    assert [x[0] for x in calls].count("fmhaSoftmax") == runs
    assert len(calls) == runs + 1


@pytest.fixture
def on_an_a100(monkeypatch):
    monkeypatch.setattr(dispatch, "target_device_kind", lambda: A100)


@pytest.mark.usefixtures("on_an_a100")
def test_shards_call_cudnn_alone():
    mesh = jax.make_mesh(
        (2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    q = jax.ShapeDtypeStruct((4, 256, 8, 64), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh):
        run = functools.partial(sparse_attention, pattern=Strided(32))
        calls, text = program(run, q, q, q)
    shapes = {x[1] for x in calls}
    assert shapes == {(2, 2, 256, 256), (2, 64, 7, 7)} and len(calls) == 4
    assert "all_gather" not in text and "all_to_all" not in text


# ---- The pick ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_kind", "runs"),
    [
        (A100, True),
        (H100, True),
        ("NVIDIA A10G", True),
        ("NVIDIA RTX A6000", True),
        ("NVIDIA L4", True),
        ("NVIDIA L40S", True),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", True),
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA RTX 6000 Ada Generation", True),
        ("NVIDIA RTX 2000 Ada Generation", True),
        ("NVIDIA GB200", True),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", True),
        ("NVIDIA R200", True),  # not heard of: a new one
        ("Tesla T4", False),
        ("NVIDIA T4G", False),
        ("Tesla V100-SXM2-16GB", False),
        ("NVIDIA V100", False),
        ("Quadro RTX 8000", False),
        ("NVIDIA TITAN RTX", False),
        ("NVIDIA GeForce RTX 2080 Ti", False),
        ("NVIDIA GeForce GTX 1660", False),
        ("AMD Instinct MI300X", False),
        ("TPU v3", False),
        ("cpu", False),
    ],
)
def test_which_devices_it_runs_on(device_kind, runs):
    assert (cudnn.runs_on(device_kind) is None) == runs
    told = explain(Dense(), *[(1, 256, 2, 64)] * 3, device_kind=device_kind)
    assert told.implementation == ("cudnn" if runs else "gathered")


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "says"),
    [
        (Dense(), (1, 64, 2, 64), "float32", "in bfloat16"),
        (Dense(), (1, 64, 2, 256), "bfloat16", "up to 128 wide, not 256"),
        (Fixed(8, 1), (1, 64, 2, 64), "bfloat16", "try 2"),
        (Blocks(2), (2, 2**17, 1, 64), "bfloat16", "gets 131072 seq"),
        (Columns(2**15), (1, 2**17, 4, 64), "bfloat16", "of 131072 heads"),
        (PerHead((Dense(), Fixed(8, 1))), (1, 64, 2, 64), "bfloat16", "try 2"),
    ],
    ids=str,
)
def test_what_is_refused_says_why(pattern, shape, dtype, says):
    q = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=says):
        explain(pattern, q, q, q, device_kind=A100, implementation="cudnn")
    told = explain(pattern, q, q, q, device_kind=A100)
    assert told.implementation == "gathered" and says in told.reason


def test_the_pick_is_by_what_one_device_has_at_a_time():
    q = jax.ShapeDtypeStruct((8, 2**20, 2, 64), jnp.bfloat16)
    told = [
        explain(Blocks(128), q, q, q, device_kind=A100, shards=(n, 1, 1))
        for n in (1, 8)
    ]
    assert [x.implementation for x in told] == ["gathered", "cudnn"]
    assert told[0].flops == told[1].flops
    # A stride beyond the sequence makes no more columns than it has tokens.
    q = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.bfloat16)
    assert explain(Columns(10_000), q, q, q, device_kind=A100).implementation == "cudnn"


def test_an_unknown_jax_is_refused(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
    monkeypatch.setattr(jax, "__version__", "0.13.0")
    assert "0.10.2 to before 0.13" in cudnn.supports(Dense(), q, q, q)
