"""Every test sees eight CPU devices, unless it asks for a GPU (`pytest -m gpu`)."""

import os
import sys


def _wants_gpu() -> bool:
    """Whether pytest was called with `-m gpu`, before it has read its arguments."""
    given = zip(sys.argv, sys.argv[1:], strict=False)
    return "-mgpu" in sys.argv or ("-m", "gpu") in given


if not _wants_gpu():
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        count = "--xla_force_host_platform_device_count=8"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
