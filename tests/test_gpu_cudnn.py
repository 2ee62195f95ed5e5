"""The calls of cuDNN on a GPU that they are for; run with `pytest -m gpu`."""

import functools

import jax
import numpy as np
import pytest
from test_gpu_attention import (
    check_in_checkpoint_scan_and_vmap,
    cudnn_errors,
    errors,
    exact,
    inputs,
    poison,
    seed,  # noqa: F401, a fixture
    value_and_gradients,
)

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
    gathered,
    reference,
)

pytestmark = pytest.mark.gpu

# B, T, H, H_kv, K, V: few and short, since each costs two dense compilations.
SHAPE = (2, 1024, 2, 2, 64, 64)
ODD = (2, 1022, 4, 2, 64, 64)  # grouped queries, and padding
UNEVEN = (2, 1021, 4, 2, 64, 64)  # jax.nn.dot_product_attention refuses odd lengths
HALF = (2, 1024, 2, 2, 64, 128)
WIDE = (2, 1024, 2, 2, 128, 128)
NARROW = (2, 1024, 2, 2, 40, 24)

CASES = [
    (Dense(), SHAPE, "bfloat16"),
    (Dense(), ODD, "bfloat16"),
    (Dense(), HALF, "bfloat16"),
    (Dense(), NARROW, "bfloat16"),
    (Local(100), SHAPE, "bfloat16"),
    (Columns(32), SHAPE, "bfloat16"),
    (Columns(60), ODD, "bfloat16"),
    (Strided(32), SHAPE, "bfloat16"),
    (Strided(32), SHAPE, "float16"),
    (Strided(60), ODD, "bfloat16"),
    (Strided(600), ODD, "bfloat16"),  # one row of strictly causal columns
    (Strided(32), WIDE, "bfloat16"),
    (Blocks(128), WIDE, "bfloat16"),
    (Fixed(128, 32), SHAPE, "float16"),
    (Fixed(60, 7, offset=1), ODD, "bfloat16"),
    (Summaries(128, 8), SHAPE, "bfloat16"),
    (PerHead((Strided(32), Fixed(64, 32))), SHAPE, "bfloat16"),
]


@pytest.fixture(autouse=True)
def _on_an_ampere_gpu():
    why = cudnn.runs_on(jax.devices()[0].device_kind)
    if why:
        pytest.skip(why)


@pytest.mark.parametrize(("pattern", "shape", "dtype"), CASES, ids=str)
def test_cudnn_on_views_is_as_exact_as_dense_cudnn(pattern, shape, dtype, seed):  # noqa: F811
    args = inputs(shape, dtype, seed)
    kwargs = {"pattern": pattern, "scale": shape[4] ** -0.5}
    run = value_and_gradients(functools.partial(cudnn.attend, **kwargs))
    poison(args)
    first = run(*args)
    got = errors(first, exact(functools.partial(reference.attend, **kwargs), args))
    ratios = np.array(got) / np.array(cudnn_errors(shape, dtype, seed))
    spread = np.zeros(4)  # relative 2-norm of the largest difference between two runs
    for _ in range(20):
        poison(args[:1])
        again = run(*args)
        first_exact = [np.asarray(x, np.float32) for x in first]
        spread = np.maximum(spread, errors(again, first_exact))
    print(
        f"{pattern} {shape} {dtype}: errors {got}, {ratios} of dense cuDNN's, spread "
        f"over 20 runs {spread}"
    )
    # A union of two calls rounds twice, which makes 1.41 of it.
    assert np.isfinite(got).all() and ratios.max() <= 1.5, (seed, got, ratios)
    # cuDNN adds up dq in no fixed order; what that changes is below the rounding.
    assert spread[0] == 0 and (spread <= got).all(), (seed, got, spread)


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (Dense(), (1, 1, 2, 1, 64, 64)),
        (Dense(), (1, 2, 2, 1, 64, 64)),
        (Local(2), UNEVEN),
        (Columns(400), UNEVEN),  # 3 rows
        (Strided(2), (1, 5, 2, 2, 64, 64)),
        (PerHead((Strided(32), Fixed(64, 32))), UNEVEN),  # sums gradients in bfloat16
        (Fixed(2, 2), (1, 9, 2, 2, 64, 64)),
        (Strided(2**14), (1, 2**15 + 5, 2, 2, 64, 64)),  # 2**15 heads
        (Blocks(16), (1, 16 * cudnn.MOST_BLOCKS, 1, 1, 64, 64)),  # as many sequences
    ],
    ids=str,
)
def test_the_shortest_and_the_most(pattern, shape, seed):  # noqa: F811
    args = inputs(shape, "bfloat16", seed)
    kwargs = {"pattern": pattern, "scale": 0.125}
    got = value_and_gradients(functools.partial(cudnn.attend, **kwargs))(*args)
    want = exact(functools.partial(gathered.attend, **kwargs), args)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a = np.asarray(a, np.float32)
        # A query that sees one key has no gradient: then both are all but 0.
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1.0)
        # That of one query may nearly cancel, too; what is wrong is off by about 1.
        assert error < 5e-2, (name, error)


def test_cudnn_in_checkpoint_scan_and_vmap():
    attend = functools.partial(cudnn.attend, pattern=Strided(64), scale=0.125)
    check_in_checkpoint_scan_and_vmap(attend, T=512)
