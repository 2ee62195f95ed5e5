"""TPUs that are not here, described for the TPU's own compiler."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_flax.errors import UserError, one_line
from sparse_flax.sharding import MESH_AXES

# Without these the compiler looks for the machine's own TPU, and says that it has none;
# the last lets two of it run at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GENERATIONS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")


def describe(name: str) -> list[jax.Device]:
    """Return the devices of a topology, 'v5e:16x16', to compile for and not to run on.

    Raises UserError if there is no such topology, or no compiler for it.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if not found or found[1] not in GENERATIONS:
        raise UserError(
            f"--topology={name} is not one of {', '.join(GENERATIONS)}, a colon and "
            "the chips along two or three axes; try --topology=v5e:4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler, which runs without a TPU; "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        )
    from jax.experimental import topologies  # which nothing else needs

    options: dict[str, Any] = {}
    if math.prod(map(int, found[2].split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if found[1] == "v4":  # both cores of a chip are one device, as on a real one
        options["chip_config_name"] = "megacore"
    missing = {key: x for key, x in ENVIRONMENT.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        described = topologies.get_topology_desc(name, platform="tpu", **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        why = one_line(error).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={name} is none that the TPU compiler knows ({why}); try "
            f"--topology={found[1]}:{'2x2' if found[1].endswith('e') else '2x2x1'}"
        ) from None
    finally:
        for variable in missing:  # or this would pass for a TPU host
            del os.environ[variable]
    return list(described.devices)


def check_mesh(config: ConfigDict, name: str, devices: int) -> None:
    """Raise UserError unless the mesh is as large as the topology."""
    sizes = [config.mesh[axis] for axis in MESH_AXES]
    if math.prod(sizes) == devices:
        return
    product = " * ".join(
        f"mesh.{axis}={n}" for axis, n in zip(MESH_AXES, sizes, strict=True)
    )
    rows = config.train.batch_size, config.eval.batch_size
    flags = f"--config.mesh.data={devices}"
    if any(row % devices for row in rows):
        flags += "".join(
            f" --config.{group}.batch_size={devices}" for group in ("train", "eval")
        )
    raise UserError(
        f"--topology={name} has {devices} devices, and {product} is "
        f"{math.prod(sizes)}; try {flags}"
    )
