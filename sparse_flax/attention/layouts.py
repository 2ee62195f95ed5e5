"""What stands around kernels: what they take, gradient, padding, vmap, shared heads."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

DTYPES = ("bfloat16", "float16")
Version = tuple[int, int, int] | tuple[int, int]
MOST_BLOCKS = 65535  # of a CUDA grid, along its second and third axis
WIDEST_HEAD = 128  # of hopper's registers, and of cuDNN on Ampere


def jax_refusal(name: str, oldest: Version, too_new: Version) -> str | None:
    """Return None, or why `name`, which makes private calls, does not take this jax."""
    if oldest <= jax.__version_info__ < too_new:
        return None
    first, after = (".".join(map(str, version)) for version in (oldest, too_new))
    return (
        f"{name} needs a jax from {first} to before {after}, whose private calls it "
        f"knows, and this is {jax.__version__}"
    )


def refusal(name: str, q: Any, v: Any) -> str | None:
    """Return None, or why `name` takes no arrays of this dtype or these widths."""
    if np.dtype(q.dtype).name not in DTYPES:
        return (
            f"{name} computes {' and '.join(DTYPES)}, not {q.dtype}; try q, k and v in "
            "bfloat16"
        )
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST_HEAD:
        return f"{name} takes heads up to {WIDEST_HEAD} wide, not {widest}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_by(forward, backward, plan, q, k, v):
    """Return the output of kernels that have kernels for their gradient.

    Args:
      forward: (plan, q, k, v) -> (out, log-sum-exp).
      backward: (plan, q, k, v, out, log-sum-exp, d_out) -> (dq, dk, dv).
      plan: hashable; what is attended to, and how.
    """
    del backward
    return over_batch(functools.partial(forward, plan), q, k, v)[0]


def _attend_forward(forward, backward, plan, q, k, v):
    del backward
    out, lse = _kept(*over_batch(functools.partial(forward, plan), q, k, v))
    return out, (q, k, v, out, lse)


def _attend_backward(forward, backward, plan, residuals, d_out):
    del forward
    with jax.numpy_rank_promotion("allow"):  # as in the call, which is over by now
        return over_batch(functools.partial(backward, plan), *residuals, d_out)


attend_by.defvjp(_attend_forward, _attend_backward)


def _once(run):
    """Refuse to differentiate run, which is what a second derivative would do."""
    once = jax.custom_jvp(run)

    @once.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "fused kernels (hopper, cudnn, tpu) have a first derivative, in reverse "
            "mode; for others pass implementation='gathered'"
        )

    return once


def spec_of(x: jax.Array) -> tuple:
    """The mesh axes that each dimension is sharded over by x's type, or None."""
    spec = [
        axes[0] if isinstance(axes, tuple) and len(axes) == 1 else axes
        for axes in jax.typeof(x).sharding.spec
    ]
    return (*spec, *[None] * (x.ndim - len(spec)))


def unset_mesh(x: jax.Array) -> Any:
    """The mesh of x's type, to name it to jax.shard_map; None if jax.set_mesh has."""
    if jax.sharding.get_abstract_mesh().axis_names:
        return None
    return jax.typeof(x).sharding.mesh


def up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


def fit(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Pad with zeros. Padded keys lie after every real query."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def positive(scale: float, q: jax.Array) -> tuple[float, jax.Array]:
    """Return another scale, above 0, and queries that make the same logits with it.

    The kernels hide scores, and take the largest, before they scale.
    """
    if scale > 0:
        return scale, q
    return -scale or 1.0, q * (-1.0 if scale else 0.0)


def sum_groups(x_BTHK: jax.Array, heads: int) -> jax.Array:
    """Add up the gradients of the query heads that share a key head."""
    B, T, H, K = x_BTHK.shape
    if heads == H:
        return x_BTHK
    x = x_BTHK.reshape(B, T, heads, H // heads, K)
    return jnp.sum(x, axis=3, dtype=jnp.float32).astype(x.dtype)


def over_batch(run, *args):
    """Call run, which has no derivative; under vmap, join the mapped axis to the batch.

    A kernel mapped as it is would gain a dimension, and its copies may have five.
    """
    mapped = jax.custom_batching.custom_vmap(_once(run))

    @mapped.def_vmap
    def _(size, in_batched, *args):
        args = [
            x if batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, batched in zip(args, in_batched, strict=True)
        ]
        outs = over_batch(run, *(x.reshape(-1, *x.shape[2:]) for x in args))
        outs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in outs)
        return outs, (True,) * len(outs)

    return mapped(*args)


def _kept(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Name the results, so that a policy of jax.checkpoint can keep them."""
    # Without it XLA runs the kernel twice in a scan over layers: once for what comes
    # after, and once into the stack of results that the backward pass will read.
    out, lse = jax.lax.optimization_barrier((out, lse))
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


def row_products(out_BTHV: jax.Array, d_out_BTHV: jax.Array) -> jax.Array:
    """Return rowsum(out * d_out) in float32, by head: (B, H, T).

    XLA reads both once. As an einsum it took up to a third longer, on an H200.
    """
    products = out_BTHV.astype(jnp.float32) * d_out_BTHV.astype(jnp.float32)
    return products.sum(-1).swapaxes(1, 2)
