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
        h = checkpoint_name(h, "product_input")
        q_BTHK = _project_to_heads(h, self.query_DHK, self.query_bias_HK)
        k_BTHK = _project_to_heads(h, self.key_DHK, self.key_bias_HK)
        v_BTHV = _project_to_heads(h, self.value_DHV, self.value_bias_HV)
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
        h = checkpoint_name(h, "product_input")
        f_BTF = _multiply("BTD,DF->BTF", h, self.up_DF)
        # Kept without its bias: the product is then written once, not twice.
        f_BTF = biased_gelu(checkpoint_name(f_BTF, "mlp"), self.up_bias_F[...])
        f_BTF = checkpoint_name(f_BTF, "product_input")
        f_BTD = _project("BTF,FD->BTD", f_BTF, self.down_FD, self.down_bias_D)
        return x_BTD + _dropout(f_BTD, dropout, keys[1])


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return x * sigmoid(1.702 x), the paper's activation function (section 5.2)."""
    return x * jax.nn.sigmoid(1.702 * x)


@jax.custom_vjp
def biased_gelu(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Return quick_gelu(x + bias) in x's dtype; the gradient keeps x and bias alone."""
    return quick_gelu(_float32(x) + bias).astype(x.dtype)


def _gelu_forward(x, bias):
    return biased_gelu(x, bias), (x, bias)


def _gelu_backward(kept, d_out):
    x, bias = kept
    z = _float32(x) + bias
    s = jax.nn.sigmoid(1.702 * z)
    d_x = (_float32(d_out) * s * (1 + 1.702 * z * (1 - s))).astype(x.dtype)
    # Or XLA writes d_x in float32, for the sum.
    d_x = jax.lax.optimization_barrier(d_x)
    return d_x, _float32(d_x).sum(range(x.ndim - bias.ndim))


biased_gelu.defvjp(_gelu_forward, _gelu_backward)


def _linear(config: ModelConfig, key, shape, d_in: int, factor: float = 1.0):
    std = 0.125 / math.sqrt(d_in) if config.init == "paper" else math.sqrt(0.125 / d_in)
    return nnx.Param(factor * std * jax.random.normal(key, shape))


def norm(x: jax.Array, scale_D, bias_D, epsilon: float) -> jax.Array:
    """Layer normalisation in float32, returned in x's dtype."""
    return _norm(epsilon, x, scale_D[...], bias_D[...])


# A gradient of its own keeps two numbers a token; what JAX derives keeps float32 copies
# of the activations, or reduces over the tokens in one more pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(epsilon, x, scale_D, bias_D):
    return _norm_forward(epsilon, x, scale_D, bias_D)[0]


def _norm_forward(epsilon, x, scale_D, bias_D):
    x32 = _float32(x)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    # Both means in one pass over x, as in flax.nnx.LayerNorm.
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True) - jnp.square(mean)
    inverse = jax.lax.rsqrt(jnp.maximum(variance, 0) + epsilon)
    mean, inverse = (checkpoint_name(y, "norm") for y in (mean, inverse))
    out = ((x32 - mean) * inverse * scale_D + bias_D).astype(x.dtype)
    return out, (x, mean, inverse, scale_D)


def _norm_backward(epsilon, kept, d_out):
    del epsilon
    x, mean, inverse, scale_D = kept
    d_out, normal = _float32(d_out), (_float32(x) - mean) * inverse
    d_normal = d_out * scale_D
    d_x = d_normal - jnp.mean(d_normal, axis=-1, keepdims=True)
    d_x -= normal * jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    tokens = tuple(range(x.ndim - 1))
    d_scale_D, d_bias_D = (y.sum(tokens) for y in (d_out * normal, d_out))
    return (inverse * d_x).astype(x.dtype), d_scale_D, d_bias_D


_norm.defvjp(_norm_forward, _norm_backward)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _project(equation: str, x: jax.Array, weight, bias) -> jax.Array:
    """Multiply by a weight and add a bias, in x's dtype."""
    return _biased(_multiply(equation, x, weight), bias[...])


def _multiply(equation: str, x: jax.Array, weight) -> jax.Array:
    out = activation(equation.split("->")[1])
    return jnp.einsum(equation, x, weight[...].astype(x.dtype), out_sharding=out)


def _project_to_heads(x_BTD: jax.Array, weight_DHK, bias_HK) -> jax.Array:
    """Return [B, T, H, K]; one product with all heads side by side.

    A GPU's matrix product adds a bias that is a vector on its way out, and no other.
    """
    (D, H, K), (B, T, _) = weight_DHK.shape, x_BTD.shape
    flat = jnp.reshape(weight_DHK[...].astype(x_BTD.dtype), (D, H * K))
    # H, since a device has whole heads of the flat dimension.
    y = jnp.einsum("BTD,DF->BTF", x_BTD, flat, out_sharding=activation("BTH"))
    y = _biased(y, jnp.reshape(bias_HK[...], (H * K,), out_sharding=activation("H")))
    return jnp.reshape(y, (B, T, H, K), out_sharding=activation("BTHK"))


# The gradient of a bias is a sum over all tokens. JAX's own is in x's dtype, in which a
# GPU then may add up, too: in bfloat16 that was off by a quarter.
@jax.custom_vjp
def _biased(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype)


def _biased_forward(x, bias):
    return _biased(x, bias), bias


def _biased_backward(bias, d_out):
    return d_out, _float32(d_out).sum(range(d_out.ndim - bias.ndim))


_biased.defvjp(_biased_forward, _biased_backward)


def fold_in(keys_B: jax.Array, number: jax.Array | int) -> jax.Array:
    """Derive a key from each row's."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def _dropout(x_BTD: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Zero a fraction `rate` of a row's entries by its own key; scale up the rest.

    The rate is rounded to a multiple of 2**-16, as one entry takes 16 random bits: with
    32 or more, drawing them takes a fifth of a training step on a GPU.
    """
    if keys_B is None or rate == 0:
        return x_BTD
    _, T, D = x_BTD.shape
    # Each device draws its own tokens' bits; which ones they are, no mesh changes.
    draw = functools.partial(
        jax.random.bits, shape=(T, -(-D // 2)), out_sharding=activation("TD")
    )
    # Or XLA computes both halves of a number from the start.
    bits = jax.lax.optimization_barrier(jax.vmap(draw)(keys_B))
    bits_BTD = jax.lax.bitcast_convert_type(bits, jnp.uint16)
    bits_BTD = bits_BTD.reshape(*bits.shape[:2], -1)[..., :D]
    bits_BTD = checkpoint_name(bits_BTD, "dropout")
    dropped = min(round(rate * 2**16), 2**16 - 1)
    kept = x_BTD / (1 - dropped / 2**16)
    return jnp.where(bits_BTD >= dropped, kept, 0).astype(x_BTD.dtype)
