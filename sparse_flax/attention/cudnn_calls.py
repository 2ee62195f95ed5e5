"""The small dense problems that cuDNN computes, through what jax keeps private.

`jax.nn.dot_product_attention` rounds the log-sum-exp to q's dtype and takes none for
the backward pass, so the primitives below it are called. Nothing else of the package
knows about them.

forward(q, k, v, scale, causal, window) -> (out, lse)
backward(q, k, v, out, lse, d_out, scale, causal, window) -> (dq, dk, dv)
causal: query i sees keys j <= i; of these with a window the last `window`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_flax.attention import gathered, parts
from sparse_flax.attention.layouts import sum_groups
from sparse_flax.attention.pieces import Core

OLDEST_JAX, TOO_NEW_JAX = (0, 10, 2), (0, 13)  # tests/test_cudnn.py lowers the calls


def _bind(which: str, args, scale, causal, window, **more):
    """Call a primitive, 'fwd' or 'bwd'."""
    from jax._src.cudnn import fused_attention_stablehlo as fused  # only when called

    if jax.__version_info__ >= (0, 12):
        more["score_mod"] = None
    q, k, v, *rest = args
    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    # Bias, lengths, offsets and page tables: an empty array means none.
    return getattr(fused, f"_dot_product_attention_{which}_p_wrapper").bind(
        *(q, k, v, *[jnp.zeros(0, q.dtype)] * 7, *rest),
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=window,
        **more,
    )


def _cudnn_forward(q, k, v, scale, causal, window):
    args = scale, causal, window
    out, lse_BHQ = _bind("fwd", (q, k, v), *args, is_training=True)
    return out, lse_BHQ.swapaxes(1, 2)


def _cudnn_backward(q, k, v, out, lse, d_out, *args):
    return _bind("bwd", (q, k, v, lse.swapaxes(1, 2), out, d_out), *args)


CUDNN = Core(_cudnn_forward, _cudnn_backward)


def _self_forward(q, k, v, scale, causal, window):
    """Query i sees key i alone."""
    del causal, window
    out, lse = gathered.CORES[parts.Diagonal](parts.Diagonal(), q, k, v, scale)
    return out.astype(v.dtype), lse


def _self_backward(q, k, v, out, lse, d_out, scale, causal, window):
    del causal, window
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    q, k, v, out, d_out = (x.astype(jnp.float32) for x in (q, k, v, out, d_out))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    p = jnp.exp(scale * jnp.sum(q * k, -1) - lse)[..., None]
    d_logit = p * jnp.sum(d_out * (v - out), -1, keepdims=True) * scale
    dk, dv = (sum_groups(x, heads) for x in (d_logit * q, p * d_out))
    return d_logit * k, dk, dv


# cuDNN wants two keys or more.
SELF = Core(_self_forward, _self_backward)
