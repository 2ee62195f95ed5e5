"""Every test sees eight CPU devices, unless it asks for a GPU (`pytest -m gpu`)."""

import functools
import os
import sys

import pytest


def _wants_gpu() -> bool:
    """Whether pytest was called with `-m gpu`, before it has read its arguments."""
    given = zip(sys.argv, sys.argv[1:], strict=False)
    return "-mgpu" in sys.argv or ("-m", "gpu") in given


# Workers of pytest-xdist are started with other arguments, but this environment.
if _wants_gpu() or "SPARSE_FLAX_TESTS_ON_GPU" in os.environ:
    os.environ["SPARSE_FLAX_TESTS_ON_GPU"] = "1"
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        count = "--xla_force_host_platform_device_count=8"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()


@pytest.fixture
def compiles_quickly():
    """Leave optimising out, which is most of the time of a small test."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def noisy_model(config):
    """Return a SparseTransformer of the config whose every parameter is noise."""
    # Late, because what is set above must come before jax.
    import jax
    import numpy as np

    from sparse_flax.model import SparseTransformer

    rng = np.random.default_rng(0)
    make = functools.partial(SparseTransformer, config)
    return jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32),
        jax.eval_shape(make, jax.random.key(0)),
    )
