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
    # Compiling is most of the time of a small test, and optimising most of compiling.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        count = "--xla_force_host_platform_device_count=8"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Keep compiled programs on disk, also for the commands that are started.

    A folder for each worker, because a file is there before it is whole.
    """
    if "SPARSE_FLAX_TESTS_ON_GPU" in os.environ:
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    for name, value in {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()


@pytest.fixture
def optimised():
    """Let XLA optimise: of tests about what it makes, and some of each layer here."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
