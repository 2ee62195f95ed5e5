"""Every pattern and implementation against its mask, for values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparse_flax.attention import (
    Blocks,
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    Summaries,
    decode,
    explain,
    gathered,
    merge,
    parse,
    patterns,
    sparse_attention,
)

PATTERNS = [
    Dense(),
    Local(1),
    Local(5),
    Local(100),
    Columns(1),
    Columns(4),
    Columns(50),
    Strided(1),
    Strided(6),
    Blocks(1),
    Blocks(7),
    Blocks(100),
    Summaries(8, 2),
    Summaries(8, 3, offset=1),
    Fixed(8, 2),
    Fixed(8, 3, offset=1),
    Fixed(8, 8),
    Fixed(8, 2, rotate=True),
    PerHead((Local(4), Columns(4))),
    PerHead((Strided(4), Fixed(6, 2, rotate=True))),
]
# B, T, H, H_kv, K, V: T no multiple, T < block, one row, one head, grouped queries.
SHAPES = [
    (2, 37, 6, 6, 8, 8),
    (1, 5, 4, 2, 8, 4),
    (3, 64, 1, 1, 4, 12),
    (1, 1, 2, 1, 4, 4),
    (2, 40, 6, 3, 4, 8),
]


def inputs(shape, seed=0, dtype=jnp.float32):
    """q, k, v and an output gradient."""
    B, T, H, H_kv, K, V = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, H, K), (B, T, H_kv, K), (B, T, H_kv, V), (B, T, H, V)]
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def by_hand(q, k, v, pattern, d_out):
    """Output and gradients in float64 NumPy, from the mask and the definition."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    H, group = q.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5
    out = np.zeros(d_out.shape)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h in itertools.product(range(q.shape[0]), range(H)):
        mask = pattern.mask(q.shape[1], h)
        logits = np.where(mask, q[b, :, h] @ k[b, :, h // group].T * scale, -np.inf)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out[b, :, h] = weights @ v[b, :, h // group]
        d_weights = d_out[b, :, h] @ v[b, :, h // group].T
        delta = (weights * d_weights).sum(1, keepdims=True)
        d_logits = weights * (d_weights - delta) * scale
        dq[b, :, h] = d_logits @ k[b, :, h // group]
        dk[b, :, h // group] += d_logits.T @ q[b, :, h]
        dv[b, :, h // group] += weights.T @ d_out[b, :, h]
    return out, dq, dk, dv


def value_and_gradients(pattern, implementation):
    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(
            lambda q, k, v: sparse_attention(
                q, k, v, pattern, implementation=implementation
            ),
            q,
            k,
            v,
        )
        return out, *pull(d_out)

    return run


def assert_close(got, expected, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        a = np.asarray(a, np.float64)
        assert not np.isnan(a).any(), name
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("implementation", "shapes"),
    [
        pytest.param("gathered", SHAPES[:1] + SHAPES[-1:], id="gathered"),
        pytest.param("gathered", SHAPES[1:-1], id="edges", marks=pytest.mark.slow),
        pytest.param("reference", SHAPES[-1:], id="reference"),
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_the_mask(pattern, implementation, shapes):
    run = value_and_gradients(pattern, implementation)
    for seed, shape in enumerate(shapes):
        args = inputs(shape, seed)
        assert_close(run(*args), by_hand(*args[:3], pattern, args[3]), 2e-5)


def test_every_pattern_is_among_these():
    assert {type(pattern).__name__ for pattern in PATTERNS} == set(patterns.PATTERNS)


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
def test_random_shapes_and_patterns():
    rng = np.random.default_rng(3)
    for seed in range(8):
        block = int(rng.integers(1, 20))
        summary = int(rng.integers(1, block + 1))
        pattern = [
            Local(block),
            Strided(block),
            Fixed(block, summary, int(rng.integers(0, block // summary))),
            Columns(block),
        ][seed % 4]
        H_kv, group = rng.integers(1, 4, 2)
        shape = (int(rng.integers(1, 3)), int(rng.integers(1, 90)), int(H_kv * group))
        shape += (int(H_kv), int(rng.integers(1, 9)), int(rng.integers(1, 9)))
        args = inputs(shape, seed)
        got = value_and_gradients(pattern, "gathered")(*args)
        assert_close(got, by_hand(*args[:3], pattern, args[3]), 2e-5)


@pytest.mark.parametrize(
    "pattern",
    [Dense(), Local(9), Local(40), Columns(3), Blocks(33), Strided(6), Fixed(8, 4)],
    ids=str,
)
def test_walking_query_chunks_changes_nothing(pattern, monkeypatch):
    shape = (2, 70, 4, 2, 8, 4)
    args = inputs(shape)
    whole = value_and_gradients(pattern, "gathered")(*args)
    monkeypatch.setattr(gathered, "LOGITS", 600)
    monkeypatch.setattr(gathered, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(gathered, "LARGEST_BLOCK", 16)
    walked = value_and_gradients(pattern, "gathered")(*args)
    assert_close(walked, [np.asarray(x, np.float64) for x in whole], 1e-5)
    assert_close(walked, by_hand(*args[:3], pattern, args[3]), 2e-5)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "pattern", [Dense(), Strided(6), Fixed(8, 2, rotate=True)], ids=str
)
def test_bfloat16_to_its_own_error(pattern):
    args = inputs((2, 40, 4, 2, 16, 8), dtype=jnp.bfloat16)
    exact = by_hand(*args[:3], pattern, args[3])
    got = value_and_gradients(pattern, "gathered")(*args)
    assert got[0].dtype == jnp.bfloat16
    for a, b in zip(got, exact, strict=True):
        # bfloat16 keeps 8 bits: an error of some 2^-8 of the largest entry.
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error < 2**-7 * max(np.abs(b).max(), 1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_parts_count_the_pairs_of_the_mask(pattern):
    for T in (1, 2, 7, 8, 9, 31, 64, 101):
        for head in range(pattern.head_period + 1):
            mask = pattern.mask(T, head)
            assert mask.dtype == bool and mask.shape == (T, T)
            assert not np.triu(mask, 1).any() and mask.diagonal().all()
            assert pattern.pairs(T, head) == mask.sum()
            same = pattern.mask(T, head + pattern.head_period)
            np.testing.assert_array_equal(mask, same)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_keys_are_the_rows_of_the_mask(pattern):
    mask_THT = np.stack([pattern.mask(50, head) for head in range(9)], axis=1)
    for i, head in itertools.product(range(50), range(9)):
        keys = pattern.keys(i, head)
        assert keys.dtype == np.int64
        np.testing.assert_array_equal(keys, np.nonzero(mask_THT[i, head])[0])
    seen = pattern.pairs(10**6) - pattern.pairs(10**6 - 1)
    assert pattern.keys(10**6 - 1).shape == (seen,)


def test_masks_from_the_table():
    T = 30
    i, j = np.indices((T, T))
    before = j <= i
    table = {
        Dense(): before,
        Local(4): before & (i - j < 4),
        Columns(4): before & ((i - j) % 4 == 0),
        Strided(4): before & ((i - j < 4) | ((i - j) % 4 == 0)),
        Blocks(8): before & (i // 8 == j // 8),
        Summaries(8, 2, 1): (j // 8 < i // 8) & (4 <= j % 8) & (j % 8 < 6) | (i == j),
        Fixed(8, 2, 3): before
        & ((i // 8 == j // 8) | ((j // 8 < i // 8) & (j % 8 < 2))),
    }
    for pattern, mask in table.items():
        np.testing.assert_array_equal(pattern.mask(T), mask, err_msg=str(pattern))
    rotated = Fixed(8, 2, rotate=True)
    for head in range(8):
        np.testing.assert_array_equal(
            rotated.mask(T, head), Fixed(8, 2, head % 4).mask(T)
        )
    # Paper, section 4: with all slices in turn, the heads of a layer see everything.
    np.testing.assert_array_equal(
        np.logical_or.reduce([rotated.mask(T, h) for h in range(4)]), before
    )


@pytest.mark.parametrize("pattern", [Strided(5), Fixed(5, 2)], ids=str)
def test_two_steps_reach_everything(pattern):
    step = pattern.mask(37).astype(int)
    assert ((step @ step > 0) == np.tri(37, dtype=bool)).all()


def test_picture():
    assert Strided(3).picture(5) == "#....\n##...\n###..\n####.\n.####"
    assert Summaries(2, 1).picture(4) == "#...\n.#..\n.##.\n.#.#"


def test_second_derivatives_and_jvp():
    pattern = PerHead((Strided(4), Fixed(4, 2)))
    q, k, v, d_out = inputs((1, 11, 2, 1, 4, 4))

    def loss(implementation):
        def run(q, k, v):
            out = sparse_attention(q, k, v, pattern, implementation=implementation)
            return jnp.sum(jnp.sin(out) * d_out)

        return run

    tangents = tuple(jnp.cos(x) for x in (q, k, v))
    both = [
        jax.jit(functools.partial(jax.jvp, jax.grad(loss(name), argnums=(0, 1, 2))))(
            (q, k, v), tangents
        )
        for name in ("gathered", "reference")
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_vmap():
    q, k, v, _ = inputs((3, 20, 2, 2, 4, 4))
    attend = jax.jit(functools.partial(sparse_attention, pattern=Strided(4)))
    one_by_one = [attend(q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in range(3)]
    mapped = jax.jit(jax.vmap(lambda *x: attend(*(y[None] for y in x))))
    np.testing.assert_allclose(
        mapped(q, k, v), jnp.stack(one_by_one), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("pattern", [Strided(4), Fixed(4, 2)], ids=str)
def test_runs_where_a_caller_forbids_rank_promotion(pattern):
    q, k, v, d_out = inputs((1, 11, 2, 1, 4, 4))

    def gradient(run):
        return jax.grad(lambda q: jnp.sum(run(q, k, v) * d_out))(q)

    usual = gradient(functools.partial(sparse_attention, pattern=pattern))
    with jax.numpy_rank_promotion("raise"):
        same = gradient(functools.partial(sparse_attention, pattern=pattern))
    np.testing.assert_array_equal(usual, same)


def test_scale_is_used():
    q, k, v, _ = inputs((1, 9, 1, 1, 4, 4))
    a = sparse_attention(q, k, v, Local(3), scale=0.25)
    b = sparse_attention(q / 2, k, v, Local(3), scale=0.5)
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert jnp.abs(a - sparse_attention(q, k, v, Local(3))).max() > 1e-2
    mean = jnp.cumsum(v, axis=1) / jnp.arange(1, 10)[:, None, None]
    np.testing.assert_allclose(
        sparse_attention(q, k, v, Dense(), scale=0), mean, atol=1e-6
    )


@pytest.mark.parametrize("pattern", [Strided(6), Fixed(8, 2)], ids=str)
def test_logits_of_hundreds_do_not_overflow(pattern):
    q, k, v, d_out = inputs((1, 20, 2, 1, 8, 4))
    args = 200 * q, k, v
    got = value_and_gradients(pattern, "gathered")(*args, d_out)
    expected = by_hand(*args, pattern, d_out)
    assert_close(got, expected, 5e-3)


def test_merge_is_exact_and_differentiable_through_all():
    """Softmax over two halves, merged, is softmax over both; -inf halves vanish."""
    keys = jax.random.split(jax.random.key(0), 4)
    logits = jax.random.normal(keys[0], (5, 8))
    values = jax.random.normal(keys[1], (5, 8, 3))
    weights = jax.random.normal(keys[2], (5, 3)), jax.random.normal(keys[3], (5,))
    empty = np.zeros((5, 8), bool)
    empty[1, :4] = empty[2, 4:] = True  # a row without its first or second half

    def half(logits, values, mask):
        logits = jnp.where(mask, -jnp.inf, logits)
        any_left = ~mask.all(-1)
        safe = jnp.where(any_left[:, None], logits, 0.0)
        out = jnp.einsum("RS,RSV->RV", jax.nn.softmax(safe), values)
        lse = jax.nn.logsumexp(safe, axis=-1)
        out = jnp.where(any_left[:, None], out, 0.0)
        return out, jnp.where(any_left, lse, -jnp.inf)

    def merged(logits, values):
        first = half(logits[:, :4], values[:, :4], empty[:, :4])
        second = half(logits[:, 4:], values[:, 4:], empty[:, 4:])
        out, lse = merge(*first, *second)
        return jnp.sum(out * weights[0]) + jnp.sum(lse * weights[1])

    def at_once(logits, values):
        out, lse = half(logits, values, empty)
        return jnp.sum(out * weights[0]) + jnp.sum(lse * weights[1])

    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(merged, (0, 1)))(logits, values)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(at_once, (0, 1)))(logits, values)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    nothing = jnp.full((2,), -jnp.inf), jnp.zeros((2, 3))
    out, lse = merge(nothing[1], nothing[0], nothing[1], nothing[0])
    assert (out == 0).all() and (lse == -jnp.inf).all()
    gradient = jax.grad(lambda x: merge(nothing[1], x, nothing[1], x)[0].sum())
    assert jnp.isfinite(gradient(nothing[0])).all()


@pytest.mark.usefixtures("optimised")
def test_memory_grows_as_the_keys_seen():
    """Four times the tokens, twice the stride: 8 times the memory, not 16."""

    def temporary(T, pattern):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        run = jax.grad(lambda q, k, v: sparse_attention(q, k, v, pattern).sum())
        return (
            jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
        )

    small, large = temporary(4096, Strided(64)), temporary(16384, Strided(128))
    assert 6 < large / small < 10
    # Dense walks its queries: memory grows with the keys of a chunk, not with T x T.
    dense = temporary(2048, Dense()), temporary(8192, Dense())
    assert dense[1] / dense[0] < 5
    # A stride, a block or a window far beyond T is no longer than T.
    for pattern in Columns, Strided, Local, Blocks:
        long, whole = temporary(64, pattern(10**9)), temporary(64, pattern(64))
        assert long <= whole
    for pattern in Fixed, Summaries:
        long, whole = temporary(64, pattern(10**9, 1)), temporary(64, pattern(64, 1))
        assert long <= whole


@pytest.mark.usefixtures("optimised")
def test_shards_compute_alone():
    """Batch and heads over 8 devices: the same values, and no communication."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )
    pattern = Fixed(8, 4, rotate=True)
    args = inputs((2, 40, 8, 8, 4, 4))
    expected = by_hand(*args[:3], pattern, args[3])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, P("data", None, "tensor")) for x in args]
        run = value_and_gradients(pattern, "gathered")
        got = run(*sharded)
        assert got[0].sharding.spec == P("data", None, "tensor", None)
        program = run.lower(*sharded).compile().as_text()
    assert_close(got, expected, 2e-5)
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in program
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="multiple of 4 query"):
        sparse_attention(*sharded[:3], Fixed(8, 2, rotate=True))
    # The arrays' types name their mesh: it need not be set, under jit or not.
    for call in sparse_attention, jax.jit(sparse_attention, static_argnums=3):
        out = call(*sharded[:3], pattern)
        np.testing.assert_allclose(out, expected[0], atol=2e-5)
    cache = decode.prefill(pattern, 48, *sharded[1:3], 39)
    out, _ = decode.step(cache, *(x[:, 39] for x in sharded[:3]), 39)
    np.testing.assert_allclose(out, expected[0][:, 39], atol=2e-5)
    with pytest.raises(ValueError, match=r"q is sharded as .* k as .* alike"):
        sparse_attention(sharded[0], args[1], args[2], pattern)
    # A sequence at a time, under vmap over the sharded axis.
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, P("data")) for x in args[:3]]
        one = jax.vmap(lambda *x: sparse_attention(*(y[None] for y in x), pattern)[0])
        np.testing.assert_allclose(one(*sharded), expected[0], atol=2e-5)


@pytest.mark.parametrize(
    "pattern", [Dense(), Strided(16), Fixed(16, 4), Summaries(16, 4)], ids=str
)
def test_gathered_is_as_exact_as_dense_attention_where_it_is_peaked(pattern):
    q, k, v, d_out = inputs((2, 256, 2, 2, 64, 64))
    q *= 8

    def gradient(attend, *args):
        return jax.vjp(attend, *args[:3])[1](args[3].astype(args[2].dtype))[0]

    def error(attend, exact):
        low = [x.astype(jnp.bfloat16) for x in (q, k, v, d_out)]
        high = [x.astype(jnp.float32) for x in low]
        expected = gradient(exact, *high)
        got = gradient(attend, *low).astype(jnp.float32)
        return jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)

    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    run = functools.partial(
        sparse_attention, pattern=pattern, implementation="gathered"
    )
    assert error(run, run) < 1.5 * error(dense, dense)


def test_explain():
    told = explain(Strided(128), *[(8, 12288, 8, 64)] * 3, device_kind="TPU v5e")
    assert told.implementation == "tpu" and told.device_kind == "TPU v5e"
    # Band and columns by hand: 128 keys less the start, and (96 - 1) / 2 rows.
    pairs = 12288 * 128 - 128 * 127 // 2 + 128 * 96 * 95 // 2
    assert told.keys_per_query == pairs / 12288
    assert told.flops == 8 * 8 * pairs * 4 * 64
    assert told.bytes == 4 * 2 * 8 * 12288 * 8 * 64
    assert told.backward_flops == 8 * 8 * pairs * 10 * 64
    # 2 query heads on 1 key head, and values wider than keys.
    shapes = (3, 4, 2, 8), (3, 4, 1, 8), (3, 4, 1, 32)
    told = explain(Dense(), *shapes, device_kind="cpu")
    assert told.implementation == "gathered"
    assert (told.keys_per_query, told.dense_fraction) == (2.5, 1.0)
    pairs = 3 * 2 * (1 + 2 + 3 + 4)
    assert told.flops == pairs * 2 * (8 + 32)
    assert told.backward_flops == pairs * 2 * (3 * 8 + 2 * 32)
    assert told.bytes == 2 * 3 * 4 * (2 * 8 + 8 + 32 + 2 * 32)
    fixed = explain(Fixed(128, 32, rotate=True), *[(1, 12288, 8, 64)] * 3)
    assert f"{fixed.dense_fraction:.0%}" == "26%"
    q = jnp.ones((1, 4, 2, 8))
    assert "named" in explain(Dense(), q, q, q, implementation="reference").reason
    assert "runs" in str(told)


@pytest.mark.parametrize("name", ["hopper", "cudnn", "tpu"])
def test_an_implementation_for_another_device_is_refused(name):
    shapes = [(1, 1024, 2, 64)] * 3
    with pytest.raises(ValueError, match=f"'{name}': {name} needs .* this is cpu"):
        explain(Strided(128), *shapes, device_kind="cpu", implementation=name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Fixed(128, 32, rotate=True)", (Fixed(128, 32, rotate=True),)),
        ("Columns(96), Local(window=96)", (Columns(96), Local(96))),
        ("PerHead((Local(4), Dense()))", (PerHead((Local(4), Dense())),)),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected
    assert parse(", ".join(map(repr, expected))) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Strided(0)", "stride=0 must be a whole number of at least 1; try 1"),
        ("Stridid(4)", "did you mean 'Strided'"),
        ("Fixed(128, 100, rotate=True)", "try 128"),
        ("Fixed(8, 9)", "summary=9 is wider than block=8"),
        ("Fixed(8, 2, offset=4)", "from 0 to 3"),
        ("Fixed(8, 2, offset=1, rotate=True)", "use offset=0"),
        ("Local()", "does not fit Local(window)"),
        ("Local(1, 2, 3)", "does not fit Local(window)"),
        ("Dense", "lacks its arguments: Dense()"),
        ("Fixed", "lacks its arguments: Fixed(block, summary, offset, rotate)"),
        ("Strided(-4)", "stride=-4 must be a whole number of at least 1; try 1"),
        ("Fixed(8, 2, offset=-1)", "offset=-1 must be a whole number from 0 to 3"),
        ("Fixed(8, 2, offset=True)", "offset=True must be a whole number"),
        ("Fixed(8, 2, rotate='no')", "rotate='no' must be True or False"),
        ("4", "no pattern"),
        ("", "not readable"),
        ("()", "is empty"),
        ("__import__('os')", "none of"),
        ("PerHead(())", "non-empty"),
        ("PerHead(Local(4))", "non-empty"),
        ("Strided(4.0)", "try 4"),
        ("Fixed(8, 2, offset=10.0)", "try 3"),
        ("Strided(stride=3, stride=5)", "each argument of Strided(stride) once"),
    ],
)
def test_parse_errors_are_sentences(text, says):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_heads_that_repeat_are_one_period():
    assert PerHead((Local(4), Local(4))).head_period == 1
    assert PerHead((Local(4), Dense(), Local(4), Dense())).head_period == 2
    assert PerHead((Local(4), Dense(), Local(4))).head_period == 3


def test_numpy_numbers_are_numbers():
    made = Fixed(np.int32(8), np.int64(2), np.int8(1), np.bool_(False))
    assert repr(made) == repr(Fixed(8, 2, 1, False))


def test_call_errors_are_sentences():
    q = jnp.ones((1, 4, 6, 8))
    for args, says in [
        ((q, q[:, :, :4], q[:, :, :4], Dense()), "try 2 key heads"),
        ((q, q[..., :4], q, Dense()), "same width"),
        ((q, q[:, :3], q[:, :3], Dense()), "must agree"),
        ((q[0], q, q, Dense()), "four dimensions"),
        ((q, q.astype(jnp.bfloat16), q, Dense()), "one floating-point dtype"),
        ((q, q, q, "strided"), "no pattern"),
        ((Dense(), q, q, q), "after q, k and v"),
        ((None, q, q, Dense()), "q=None is no array"),
        ((q[:, :0], q[:, :0], q[:, :0], Dense()), "no dimension may be 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            sparse_attention(*args)
    with pytest.raises(ValueError, match="try 'gathered'"):
        sparse_attention(q, q, q, Dense(), implementation="gatherd")
    with pytest.raises(ValueError, match="known when traced"):
        jax.grad(lambda x: sparse_attention(q, q, q, Dense(), scale=x).sum())(0.3)
    with pytest.raises(ValueError, match=r"shards=\(1, 0, 1\) must .* try \(1, 1, 1\)"):
        explain(Dense(), q, q, q, shards=(1, 0, 1))
    with pytest.raises(ValueError, match="is no pattern"):
        explain(q, q, q, Dense())


def test_attention_stands_alone():
    """Importing it imports nothing else of the package, and no flax."""
    import subprocess
    import sys

    program = (
        "import sys, sparse_flax.attention;"
        "print([m for m in sys.modules if m == 'flax' or m.startswith('sparse_flax.')"
        " and not m.startswith('sparse_flax.attention')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
