"""The public call: checks, the pick of an implementation, and sharded arrays."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import warnings
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from sparse_flax.attention import cudnn, gathered, hopper, parallel, reference, tpu
from sparse_flax.attention.layouts import spec_of, unset_mesh
from sparse_flax.attention.patterns import Pattern

# Fastest first: where none is named, the first that runs on the device and supports
# the call is picked. To add an implementation, add its module here. It has
#   runs_on(device_kind): None, or a sentence that says why not
#   supports(pattern, q, k, v): None, or a sentence that says why not
#   attend(q, k, v, pattern, scale): out
# and, to be used where a sequence is spread over devices (parallel.py),
#   supports_parts(parts, q, k, v): as supports
#   attend_parts(q, k, v, parts, scale): (out, lse)
#   parts_gradients(q, k, v, out, lse, d_out, parts, scale): (dq, dk, dv)
# Kernels with a gradient of their own go through layouts.attend_by, which names what
# they keep for model.REMAT.
IMPLEMENTATIONS: dict[str, ModuleType] = {
    "hopper": hopper,
    "cudnn": cudnn,
    "tpu": tpu,
    "gathered": gathered,
    "reference": reference,
}


def sparse_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attend, each query to the keys that `pattern` lets it see.

    Arguments and layout are those of `jax.nn.dot_product_attention`.

    Args:
      q_BTHK: queries [batch, tokens, heads, width], float.
      k_BTHK: keys [B, T, H_kv, K], where H_kv divides H: query head h uses key and
        value head h // (H / H_kv).
      v_BTHV: values [B, T, H_kv, V]; V may differ from K.
      pattern: who sees whom. Patterns belong to query heads by their index in q_BTHK,
        which in a shard_map or vmap of your own over heads is not the global one.
      scale: a number, not traced, that multiplies q.k; 1/sqrt(K) by default.
      implementation: 'hopper' (kernels for an H100 or H200, reverse mode only),
        'cudnn' (NVIDIA GPUs from Ampere on, reverse mode only), 'tpu' (TPUs from v4
        on, reverse mode only), 'gathered' (any device, differentiable to any order)
        or 'reference' (dense, float32). None
        picks the fastest that supports the call on the device it is traced for: the
        mesh's, else the default one. One named here is used or refused, never
        replaced.

    Returns:
      out_BTHV [B, T, H, V] in v's dtype. Softmax and sums are in float32.

    Raises:
      ValueError: shapes, dtypes, pattern or implementation do not fit; in a sentence.

    Warns once if the device has kernels of its own and they do not support the call.

    Arrays whose types carry a sharding (a mesh with Explicit axes) are computed shard
    by shard: over batch and heads without communication, over tokens with what
    parallel.py says. Keys and values must be sharded as q is.

    A key or value that is not finite can reach rows that do not see it, since a weight
    of 0 times NaN is NaN.
    """
    _check_pattern(pattern, "after q, k and v")
    _check(q_BTHK, k_BTHK, v_BTHV)
    scale = _number(q_BTHK.shape[-1] ** -0.5 if scale is None else scale)
    layout = _layout(q_BTHK, k_BTHK, v_BTHV, pattern)
    devices = layout.devices(1)
    args = [piece(x, layout.shards) for x in (q_BTHK, k_BTHK, v_BTHV)]
    choice = _pick(
        implementation, target_device_kind(), pattern, *args, devices=devices
    )
    if choice.passed_over:
        _warn_once(f"{pattern} runs {choice.name}, since {choice.passed_over}")
    module = IMPLEMENTATIONS[choice.name]
    attend = functools.partial(module.attend, pattern=pattern, scale=scale)
    if devices > 1:
        attend = functools.partial(
            parallel.attend,
            pattern=pattern,
            scale=scale,
            axis=layout.spec[1],
            module=module,
        )
    if layout.mesh is not None:
        attend = jax.shard_map(
            attend,
            mesh=unset_mesh(q_BTHK),
            in_specs=(layout.spec,) * 3,
            out_specs=layout.spec,
            # Splash's results do not say over which axes they vary.
            check_vma=choice.name != "tpu",
        )
    # A caller's code may forbid what this one relies on.
    with jax.numpy_rank_promotion("allow"):
        return attend(q_BTHK, k_BTHK, v_BTHV)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run, and what it costs. Print it."""

    implementation: str
    reason: str
    device_kind: str
    pattern: Pattern
    keys_per_query: float  # mean over queries and heads
    dense_fraction: float  # of the pairs of causal dense attention
    flops: int  # forward pass; a multiplication and an addition are two
    backward_flops: int  # of the pairs alone, without any recomputation
    bytes: int  # q, k, v and out, each moved once
    exchanges: tuple[str, ...] = ()  # what the devices of a sequence send each other

    def __str__(self) -> str:
        """Six lines for a person, and one an exchange."""
        return "\n".join(
            [
                f"{self.pattern} on {self.device_kind}",
                f"  runs         {self.implementation}: {self.reason}",
                f"  keys/query   {self.keys_per_query:,.1f} on average, "
                f"{self.dense_fraction:.2%} of dense",
                f"  forward      {self.flops:,} FLOPs",
                f"  backward     {self.backward_flops:,} FLOPs",
                f"  moves        {self.bytes:,} bytes at least (q, k, v, out once)",
                *(f"  spread       {exchange}" for exchange in self.exchanges),
            ]
        )


def explain(
    pattern: Pattern,
    q: Any,
    k: Any,
    v: Any,
    *,
    device_kind: str | None = None,
    implementation: str | None = None,
    shards: tuple[int, int, int] = (1, 1, 1),
) -> Explanation:
    """Say what `sparse_attention` would run for these arguments, why, and its cost.

    Args:
      pattern: as for `sparse_attention`.
      q, k, v: arrays, `jax.ShapeDtypeStruct`s, or shapes (taken as bfloat16).
      device_kind: as `jax.Device.device_kind`; of the mesh or the default device if
        None.
      implementation: as for `sparse_attention`.
      shards: into how many batch, tokens and heads are cut, each on a device of its own
        or, of the batch, in its turn; what the types of arrays say goes before it.

    Raises:
      ValueError: as `sparse_attention`.
    """
    _check_pattern(pattern, "first")
    if len(shards) != 3 or not all(n == int(n) and n >= 1 for n in shards):
        raise ValueError(
            f"shards={shards} must be three whole numbers (batch, tokens, heads), each "
            "at least 1; try (1, 1, 1)"
        )
    if all(isinstance(x, jax.Array) for x in (q, k, v)):
        layout = _layout(q, k, v, pattern)
        if layout.mesh is not None:
            shards = layout.shards
    q, k, v = (_as_struct(x) for x in (q, k, v))
    _check(q, k, v)
    device_kind = device_kind or target_device_kind()
    if why := parallel.refusal(pattern, q.shape[1], shards[1]):
        raise ValueError(why)
    pieces = (piece(x, shards) for x in (q, k, v))
    choice = _pick(implementation, device_kind, pattern, *pieces, devices=shards[1])
    (B, T, H, K), V = q.shape, v.shape[-1]
    period = pattern.head_period
    pairs = B * sum(pattern.pairs(T, head % period) for head in range(H))
    out_bytes = B * T * H * V * v.dtype.itemsize
    return Explanation(
        implementation=choice.name,
        reason=choice.reason,
        device_kind=device_kind,
        pattern=pattern,
        keys_per_query=pairs / (B * T * H),
        dense_fraction=pairs / (B * H * T * (T + 1) // 2),
        flops=2 * (K + V) * pairs,
        # Five products: the scores again, dP and dV over V, dQ and dK over K.
        backward_flops=2 * (3 * K + 2 * V) * pairs,
        bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in (q, k, v)) + out_bytes,
        exchanges=tuple(parallel.says(pattern, T, shards[1])),
    )


@dataclasses.dataclass(frozen=True)
class _Choice:
    name: str
    reason: str
    passed_over: str = ""  # why a faster one, which has this device, is not used


def _pick(
    implementation: str | None,
    device_kind: str,
    pattern: Pattern,
    q: Any,
    k: Any,
    v: Any,
    *,
    devices: int,
) -> _Choice:
    """Pick for the arrays of one device, of `devices` that hold a sequence."""

    def supports(module: ModuleType) -> str | None:
        if devices == 1:
            return module.supports(pattern, q, k, v)
        return parallel.supports(module, pattern, q, k, v, devices)

    if implementation is None:
        passed_over: list[str] = []
        for name, module in IMPLEMENTATIONS.items():
            if module.runs_on(device_kind):
                continue
            why = supports(module)
            if not why:
                sentences = "; ".join(passed_over)
                reason = "the fastest that supports this call on this device"
                if sentences:
                    reason = f"{reason}, since {sentences}"
                return _Choice(name, reason, sentences)
            passed_over.append(why)
    if implementation not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(str(implementation), IMPLEMENTATIONS, 1, 0)
        raise ValueError(
            f"implementation={implementation!r} is none of "
            f"{', '.join(IMPLEMENTATIONS)}; try {near[0]!r} or None"
        )
    module = IMPLEMENTATIONS[implementation]
    why = module.runs_on(device_kind) or supports(module)
    if why:
        raise ValueError(
            f"implementation={implementation!r}: {why}; or let None pick one"
        )
    return _Choice(implementation, "named by the caller")


def target_device_kind() -> str:
    """Return the device kind that is compiled for: the mesh's, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device
        if not isinstance(device, jax.Device):
            device = jax.devices(device)[0]
    return device.device_kind


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def _short(x: Any) -> str:
    return f"an array {x.shape}" if hasattr(x, "shape") else f"{x!r}"[:80]


def _check_pattern(pattern: Any, place: str) -> None:
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"pattern={_short(pattern)} is no pattern, which comes {place}; try "
            "Strided(128)"
        )


def _check(q: Any, k: Any, v: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "shape"):
            raise ValueError(f"{name}={_short(x)} is no array")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (len(q.shape) == len(k.shape) == len(v.shape) == 4):
        raise ValueError(
            f"{shapes}: each must have four dimensions (batch, tokens, heads, width)"
        )
    if 0 in q.shape + k.shape + v.shape:
        raise ValueError(f"{shapes}: no dimension may be 0")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{shapes}: batch and tokens must agree in all, heads in k and v"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: q and k must have the same width")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{shapes}: {k.shape[2]} key heads do not divide {q.shape[2]} query heads; "
            f"try {math.gcd(q.shape[2], k.shape[2])} key heads"
        )
    dtypes = {np.dtype(x.dtype) for x in (q, k, v)}
    if len(dtypes) > 1 or not jax.numpy.issubdtype(q.dtype, jax.numpy.floating):
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: all must have one floating-point "
            "dtype; cast them to q's, or to float32"
        )


def _number(scale: Any) -> float:
    try:
        return float(scale)
    except (TypeError, ValueError):  # jax's error for what is traced is the first
        raise ValueError(
            f"scale={scale!r} must be a number that is known when traced; multiply q "
            "by one that is not, and pass scale=1.0"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How arrays (B, T, H, ..) lie on a mesh; on none if `mesh` is None."""

    mesh: Any = None
    spec: P = dataclasses.field(default_factory=lambda: P(None, None, None, None))

    def devices(self, dimension: int) -> int:
        """Over how many devices a dimension is spread."""
        axes = self.spec[dimension] or ()
        axes = (axes,) if isinstance(axes, str) else axes
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def shards(self) -> tuple[int, int, int]:
        """Into how many batch, tokens and heads are cut."""
        return self.devices(0), self.devices(1), self.devices(2)


def _layout(q, k, v, pattern: Pattern) -> _Layout:
    """Read off how q is sharded, and check that each device can compute its shard."""
    sharding, spec = jax.typeof(q).sharding, spec_of(q)
    for name, other in (("k", spec_of(k)), ("v", spec_of(v))):
        if other != spec:
            raise ValueError(
                f"q is sharded as {P(*spec)} and {name} as {P(*other)}; all three must "
                "be alike, so reshard them first"
            )
    if not any(spec):
        return _Layout()
    batch, tokens, heads, width = spec
    if width or isinstance(tokens, tuple):
        raise ValueError(
            f"q is sharded as {sharding.spec}; only batch, heads and, over one mesh "
            "axis, tokens may be, so reshard the width to None and tokens to one axis "
            "first"
        )
    layout = _Layout(sharding.mesh, P(batch, tokens, heads, None))
    shards, H, period = layout.devices(2), q.shape[2], pattern.head_period
    # Heads keep their global pattern only if each device starts a new period.
    if shards > 1 and (H % shards or (H // shards) % period or k.shape[2] % shards):
        raise ValueError(
            f"{H} query and {k.shape[2]} key heads over {shards} devices: each device "
            f"needs whole key heads and a multiple of {period} query heads (the period "
            f"of {pattern}); shard heads over fewer devices"
        )
    if why := parallel.refusal(pattern, q.shape[1], layout.devices(1)):
        raise ValueError(why)
    return layout


def piece(x: Any, shards: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    """What is left of an array that is cut along batch, tokens and heads."""
    cut = (max(n // m, 1) for n, m in zip(x.shape[:3], shards, strict=True))
    return jax.ShapeDtypeStruct((*cut, x.shape[3]), x.dtype)


def _as_struct(x: Any) -> jax.ShapeDtypeStruct:
    if hasattr(x, "shape"):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(tuple(x), jax.numpy.bfloat16)
