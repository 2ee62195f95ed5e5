"""What was written is what is read: fingerprints and checksums of pytrees of arrays."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of `tree` by dotted path, in tree order."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # nnx puts every array one level down, under `value`.
        name = name.removesuffix(".value") or "value"
        if name in leaves:
            raise ValueError(f"two leaves of the state are called {name}")
        leaves[name] = leaf
    return leaves


def fingerprint(tree: Any) -> str:
    """Return the hex SHA-256 of every leaf's path, dtype, shape and bytes.

    Equal values give equal fingerprints however they are sharded. The host holds one
    leaf at a time. With several processes all of them must call.

    Args:
      tree: a pytree of arrays of any dtype, nnx modules included.
    """
    digest = hashlib.sha256()
    for name, x in named_leaves(tree).items():
        digest.update(f"{name} {describe(x)}\n".encode())
        if not getattr(x, "is_fully_addressable", True):
            x = multihost_utils.process_allgather(x, tiled=True)
        elif isinstance(x, jax.Array):
            # A jax.Array keeps each host copy that it makes for as long as it lives, so
            # copies on the device make them, one shard after the other.
            parts, x = x.addressable_shards, np.empty(x.shape, x.dtype)
            for part in parts:
                if part.replica_id == 0:
                    x[part.index] = jax.device_put(
                        part.data, part.device, may_alias=False
                    )
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@jax.jit
def _examine(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a checksum (uint32) of the bits of `x`, and whether all are finite.

    Each element's bits are mixed with its position, then added up: one changed element
    always shows, several do but for one case in 2**32, and the sharding does not
    matter. It is one fused pass that makes no copy of `x`.
    """
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    finite = jnp.all(jnp.isfinite(x)) if is_float else jnp.bool_(True)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(8 * x.dtype.itemsize, 32)
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    # Counted along the dimensions: flattening would gather a sharded array.
    position = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(bits.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        position = position * jnp.uint32(size % 2**32) + along
    # An invertible mixer: MurmurHash3's finalizer.
    mixed = bits ^ (position * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32), finite


def describe(x: Any) -> str:
    """Return dtype and shape, as in float32[2, 3]."""
    return f"{x.dtype}{list(x.shape)}"


def record(leaves: dict[str, Any]) -> tuple[dict[str, list], list[str]]:
    """Return [description, checksum] by name, and the names that are not finite."""
    seen = jax.device_get({name: _examine(x) for name, x in leaves.items()})
    record = {name: [describe(x), int(seen[name][0])] for name, x in leaves.items()}
    return record, [name for name in leaves if not seen[name][1]]


def seal(step: int, record: dict[str, list]) -> str:
    """Return a digest that guards the record as the record guards the leaves."""
    return hashlib.sha256(
        json.dumps([step, record], sort_keys=True).encode()
    ).hexdigest()
