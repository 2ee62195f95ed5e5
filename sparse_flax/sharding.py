"""The mesh, and the one table from dimension letters to mesh axes.

What used to be called pjit is `jax.jit` over arrays that carry a `NamedSharding`. The
axes are Explicit: shardings are part of array types, so a layout that does not fit is
an error that prints both, never a silent copy. The trainer always sets a mesh, if only
of one device; without one (a notebook, a model of your own) every layout here is None
and the same code runs unsharded.

    data     copies of the model, each with its own rows of the batch
    fsdp     as data, but each device keeps only a slice of every parameter
    tensor   heads and feed-forward columns, each on its own device
    context  neighbouring tokens of a sequence (attention/parallel.py says what they
             send each other); where bytes are sampled, rows of the batch instead
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sparse_flax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context")

# The table. A letter that is not here is on every device.
ACTIVATION_AXES: dict[str, str | tuple[str, ...] | None] = {
    "B": ("data", "fsdp"),
    "T": "context",
    "H": "tensor",
    "F": "tensor",
}
SAMPLING_AXES = ACTIVATION_AXES | {"B": ("data", "fsdp", "context"), "T": None}
PARAMETER_AXES = {"D": "fsdp", "H": "tensor", "F": "tensor"}


_axes = contextvars.ContextVar("axes", default=ACTIVATION_AXES)


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """Lay activations out with all tokens of a row on a device, as for sampling."""
    token = _axes.set(SAMPLING_AXES)
    try:
        yield
    finally:
        _axes.reset(token)


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: list | None = None,
) -> Mesh:
    """Make the mesh from the first of some devices, by default of all.

    Raises UserError if there are fewer devices, or if a process would have none.
    """
    sizes = (data, fsdp, tensor, context)
    named = [f"mesh.{axis}={n}" for axis, n in zip(MESH_AXES, sizes, strict=True)]
    said = f"{', '.join(named[:-1])} and {named[-1]}"
    devices = devices or jax.devices()
    needed, there = math.prod(sizes), len(devices)
    if needed > there:
        raise UserError(
            f"{said} need {needed} devices, but there are {there}; try "
            f"mesh.data={there}, and 1 for the others"
        )
    working = {device.process_index for device in devices[:needed]}
    if len(working) < len({device.process_index for device in devices}):
        raise UserError(
            f"{said} leave processes without work, as {needed} of {there} devices are "
            f"used; try mesh.data={max(there * data // needed, 1)}"
        )
    return jax.make_mesh(
        sizes,
        MESH_AXES,
        axis_types=(AxisType.Explicit,) * len(sizes),
        devices=devices[:needed],
    )


def choose_mesh(config: ConfigDict, say: Callable[[str], None]) -> ConfigDict:
    """Return a configuration whose batches go to as many devices as divide them.

    For a command line that names no mesh. One that a configuration gives stays.
    """
    there = jax.device_count()
    if there == 1 or any(n != 1 for n in config.mesh.values()):
        return config
    rows = config.train.batch_size // max(config.train.accumulate, 1)
    rows = math.gcd(rows, config.eval.batch_size)  # 0: as in training
    data = max(n for n in range(1, there + 1) if rows % n == 0)
    chosen = config.copy_and_resolve_references()
    chosen.mesh.data = data
    say(
        f"mesh               none was given: mesh.data={data} of {there} devices, for "
        f"batches of {rows}; --config.mesh.data=1 trains on one"
    )
    return chosen


def activation(letters: str) -> P | None:
    """Return the layout of an activation, such as 'BTHK'; None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    axes = _axes.get()
    return P(*(axes.get(letter) for letter in letters))


def lay_out(x: jax.Array, letters: str) -> jax.Array:
    """Give an array the layout of an activation; without a mesh, leave it as it is."""
    spec = activation(letters)
    return x if spec is None else jax.sharding.reshard(x, spec)


def put_batch(batch: Any, B: int | None = None) -> Any:
    """Place arrays [B] or [B, T] on the mesh, if there is one.

    Each process places the pieces of its own devices.

    Args:
      batch: a tree of host arrays.
      B: rows of the whole batch, where these are the `own_rows` of it alone.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jax.tree.map(jnp.asarray, batch)
    if batch_sharding(1).is_fully_addressable:
        return jax.tree.map(
            lambda x: jax.device_put(x, batch_sharding(np.ndim(x))), batch
        )
    own = None if B is None else own_rows(B)

    def place(x: np.ndarray) -> jax.Array:
        rows = np.arange(len(x)) if own is None else own

        def piece(index: Any) -> np.ndarray:
            wanted = np.arange(B or len(x))[index[0]]
            return x[np.searchsorted(rows, wanted)][:, *index[1:]]

        shape = B or len(x), *x.shape[1:]
        return jax.make_array_from_callback(shape, batch_sharding(x.ndim), piece)

    return jax.tree.map(place, batch)


def own_rows(B: int) -> np.ndarray:
    """Return the numbers of the rows of a batch that devices of this process hold.

    Raises UserError if the mesh cannot split the batch.
    """
    if B % batch_shards():
        nearest = max(B // batch_shards(), 1) * batch_shards()
        raise UserError(
            f"a batch of {B} rows does not split over the {batch_shards()} devices of "
            f"mesh.data x mesh.fsdp; try {nearest}"
        )
    there = batch_sharding(1).addressable_devices_indices_map((B,)).values()
    return np.unique(np.concatenate([np.arange(B)[index] for index in there]))


def batch_sharding(dimensions: int) -> NamedSharding:
    """Return how the mesh holds an array [B] or [B, T]."""
    spec = activation("BT"[:dimensions])
    assert spec is not None, "a mesh is set"
    return NamedSharding(jax.sharding.get_mesh(), spec)


def batch_rows(B: int) -> jax.Array:
    """Return the row numbers of a batch, int32 [B], each on its row's device."""
    return lay_out(jnp.arange(B), "B")


def split_batch(batch: Any, parts: int) -> Any:
    """Split the rows of arrays into micro-batches [parts, B / parts, ..].

    Row i goes to micro-batch i mod parts, so that each device keeps its own rows.
    """

    def split(x: jax.Array) -> jax.Array:
        # Said, because a single row a micro-batch leaves it open which dimension it is.
        spec = activation("BT"[: x.ndim])
        rows = None if spec is None else P(spec[0], None, *spec[1:])
        shape = x.shape[0] // parts, parts, *x.shape[1:]
        return jnp.swapaxes(jnp.reshape(x, shape, out_sharding=rows), 0, 1)

    return jax.tree.map(split, batch)


def batch_shards() -> int:
    """Return over how many pieces the mesh splits a batch; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in _axes.get()["B"] or ())


def whole(x: jax.Array) -> jax.Array:
    """Gather an array onto every device; without a mesh, return it as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, P())


def parameter_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return a NamedSharding for each leaf, from the letters that end its name.

    `blocks.up_DF` has the letters DF, and a leading layer dimension: leading dimensions
    beyond the letters are on every device, as is a leaf whose name ends in no letters,
    such as a step count, or in D alone: fsdp slices matrices, not vectors.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        letters = dimension_letters(path)
        if letters in ("", "D") or len(letters) > len(leaf.shape):
            # Not P(), which is the same layout but another cache key of jit.
            return NamedSharding(mesh, P(*(None,) * len(leaf.shape)))
        leading = (None,) * (len(leaf.shape) - len(letters))
        axes = (PARAMETER_AXES.get(letter) for letter in letters)
        return NamedSharding(mesh, P(*leading, *axes))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def dimension_letters(path: tuple) -> str:
    """Return the letters that end a parameter's name, 'DF' for `.blocks.up_DF`."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    found = [re.search(r"_([A-Z]+)$", name) for name in names]
    letters = [match.group(1) for match in found if match]
    return letters[-1] if letters else ""
