"""One residual block of the Sparse Transformer (paper, section 5.2).

Dimension letters and the table of initial values are in model.py.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sparse_flax.attention import Pattern, sparse_attention
from sparse_flax.sharding import activation

if TYPE_CHECKING:
    from sparse_flax.model import ModelConfig


class Block(nnx.Module):
    """One residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, H, F = config.width, config.heads, config.feed_forward
        K, V = config.qk_width // H, D // H
        q, k, v, out, up, down = jax.random.split(key, 6)
        weight = functools.partial(_linear, config)
        branch = math.sqrt(1 / (2 * config.layers))
        self.norm1_scale_D = nnx.Param(jnp.ones(D))
        self.norm1_bias_D = nnx.Param(jnp.zeros(D))
        self.query_DHK = weight(q, (D, H, K), D)
        self.query_bias_HK = nnx.Param(jnp.zeros((H, K)))
        self.key_DHK = weight(k, (D, H, K), D)
        self.key_bias_HK = nnx.Param(jnp.zeros((H, K)))
        self.value_DHV = weight(v, (D, H, V), D)
        self.value_bias_HV = nnx.Param(jnp.zeros((H, V)))
        self.out_HVD = weight(out, (H, V, D), D, branch)
        self.out_bias_D = nnx.Param(jnp.zeros(D))
        self.norm2_scale_D = nnx.Param(jnp.ones(D))
        self.norm2_bias_D = nnx.Param(jnp.zeros(D))
        self.up_DF = weight(up, (D, F), D)
        self.up_bias_F = nnx.Param(jnp.zeros(F))
        self.down_FD = weight(down, (F, D), F, branch)
        self.down_bias_D = nnx.Param(jnp.zeros(D))

    def __call__(
        self,
        x_BTD: jax.Array,
        config: ModelConfig,
        pattern: Pattern,
        keys_B: jax.Array | None,
    ) -> jax.Array:
        """Return the residual stream after this block; `keys_B` None drops nothing."""
        q, k, v = (checkpoint_name(x, "qkv") for x in self.qkv(x_BTD))
        a_BTHV = sparse_attention(
            q, k, v, pattern, implementation=config.implementation
        )
        return self.after_attention(x_BTD, a_BTHV, config.dropout, keys_B)

    def qkv(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the queries [B, T, H, K], keys, and values [B, T, H, V]."""
        h = norm(x_BTD, self.norm1_scale_D, self.norm1_bias_D, 1e-5)
        q_BTHK = _project("BTD,DHK->BTHK", h, self.query_DHK, self.query_bias_HK)
        k_BTHK = _project("BTD,DHK->BTHK", h, self.key_DHK, self.key_bias_HK)
        v_BTHV = _project("BTD,DHV->BTHV", h, self.value_DHV, self.value_bias_HV)
        return q_BTHK, k_BTHK, v_BTHV

    def after_attention(
        self,
        x_BTD: jax.Array,
        a_BTHV: jax.Array,
        dropout: float = 0.0,
        keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Add what the attention heads give to the residual stream, then the MLP."""
        keys = (None, None)
        if keys_B is not None:
            keys = [fold_in(keys_B, branch) for branch in range(2)]
        a_BTD = _project("BTHV,HVD->BTD", a_BTHV, self.out_HVD, self.out_bias_D)
        x_BTD = x_BTD + _dropout(a_BTD, dropout, keys[0])
        x_BTD = checkpoint_name(x_BTD, "residual")
        h = norm(x_BTD, self.norm2_scale_D, self.norm2_bias_D, 1e-5)
        f_BTF = _project("BTD,DF->BTF", h, self.up_DF, self.up_bias_F)
        f_BTF = quick_gelu(checkpoint_name(f_BTF, "mlp"))
        f_BTD = _project("BTF,FD->BTD", f_BTF, self.down_FD, self.down_bias_D)
        return x_BTD + _dropout(f_BTD, dropout, keys[1])


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return x * sigmoid(1.702 x), the paper's activation function (section 5.2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def _linear(config: ModelConfig, key, shape, d_in: int, factor: float = 1.0):
    std = 0.125 / math.sqrt(d_in) if config.init == "paper" else math.sqrt(0.125 / d_in)
    return nnx.Param(factor * std * jax.random.normal(key, shape))


def norm(x: jax.Array, scale_D, bias_D, epsilon: float) -> jax.Array:
    """Layer normalisation in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    normal = (x32 - mean) * jax.lax.rsqrt(variance + epsilon)
    return (normal * scale_D[...] + bias_D[...]).astype(x.dtype)


def _project(equation: str, x: jax.Array, weight, bias) -> jax.Array:
    """Multiply by a weight and add a bias, in x's dtype."""
    out = activation(equation.split("->")[1])
    y = jnp.einsum(equation, x, weight[...].astype(x.dtype), out_sharding=out)
    return y + bias[...].astype(x.dtype)


def fold_in(keys_B: jax.Array, number: jax.Array | int) -> jax.Array:
    """Derive a key from each row's."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def _dropout(x_BTD: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Zero a fraction `rate` of a row's entries by its own key; scale up the rest."""
    if keys_B is None or rate == 0:
        return x_BTD
    shape = x_BTD.shape[1:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys_B)
    return jnp.where(keep, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
