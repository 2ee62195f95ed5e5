"""The model for one token at a time: weights laid out for it once, layer by layer.

A step is hundreds of small kernels, and a GPU takes about as long to start one as to
run it. So no layer shares an array with another, which a step would have to cut out of
it; queries, keys and values are one product; and the layers follow each other without
a loop, so that the whole step is launched as one graph. Weights end in the dimension
that is summed over: a product for a single row reads each of them once, in order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from sparse_flax.attention import decode, sparse_attention
from sparse_flax.attention.patterns import Pattern
from sparse_flax.block import norm, quick_gelu
from sparse_flax.model import START, SparseTransformer
from sparse_flax.sharding import activation, lay_out, whole_sequences

Caches = tuple[decode.Cache, ...]  # one a layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of a block. W = K + K + V; norms and biases are float32."""

    norm1_D: tuple[jax.Array, jax.Array]  # scale and bias
    qkv_HWD: jax.Array
    qkv_bias_HW: jax.Array
    out_DHV: jax.Array
    out_bias_D: jax.Array
    norm2_D: tuple[jax.Array, jax.Array]
    up_FD: jax.Array
    up_bias_F: jax.Array
    down_DF: jax.Array
    down_bias_D: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ends:
    """The weights before and behind the layers."""

    token_ND: jax.Array
    start_D: jax.Array
    positions_ND: tuple[jax.Array, ...]
    norm_D: tuple[jax.Array, jax.Array]
    logits_ND: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ends", "layers"],
    meta_fields=["cuts"],
)
@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model's weights in its compute dtype, laid out for `step`."""

    ends: Ends
    layers: tuple[Layer, ...]
    cuts: tuple[int, int]  # where in W the keys and the values begin


def decoder(model: SparseTransformer) -> Decoder:
    """Lay out a model's weights; on a mesh, whole but for what `tensor` splits."""
    config = model.config
    K = config.qk_width // config.heads
    ends, stacked = _laid_out(model)
    layers = tuple(_layer(stacked, layer) for layer in range(config.layers))
    return Decoder(ends, layers, (K, 2 * K))


@jax.jit
def _laid_out(model: SparseTransformer) -> tuple[Ends, Layer]:
    dtype = jnp.dtype(model.config.dtype)

    def put(letters: str, w, dtype=dtype):
        return lay_out(w.astype(dtype), letters)

    as_float32 = functools.partial(put, dtype=jnp.float32)
    b = model.blocks
    qkv = [b.query_DHK[...], b.key_DHK[...], b.value_DHV[...]]
    qkv = [jnp.moveaxis(put("LDHK", w), 1, -1) for w in qkv]
    biases = [b.query_bias_HK[...], b.key_bias_HK[...], b.value_bias_HV[...]]
    biases = [as_float32("LHK", bias) for bias in biases]
    stacked = Layer(
        norm1_D=_both(as_float32, "LD", b.norm1_scale_D, b.norm1_bias_D),
        qkv_HWD=jnp.concatenate(qkv, axis=-2),
        qkv_bias_HW=jnp.concatenate(biases, axis=-1),
        out_DHV=jnp.moveaxis(put("LHVD", b.out_HVD[...]), -1, 1),
        out_bias_D=as_float32("LD", b.out_bias_D[...]),
        norm2_D=_both(as_float32, "LD", b.norm2_scale_D, b.norm2_bias_D),
        up_FD=jnp.swapaxes(put("LDF", b.up_DF[...]), 1, 2),
        up_bias_F=as_float32("LF", b.up_bias_F[...]),
        down_DF=jnp.swapaxes(put("LFD", b.down_FD[...]), 1, 2),
        down_bias_D=as_float32("LD", b.down_bias_D[...]),
    )
    ends = Ends(
        token_ND=put("ND", model.token_ND[...]),
        start_D=put("D", model.start_D[...]),
        positions_ND=tuple(
            as_float32("ND", table[...]) for table in model.positions_ND
        ),
        norm_D=_both(as_float32, "D", model.norm_scale_D, model.norm_bias_D),
        logits_ND=put("DN", model.logits_DN[...]).T,
    )
    return ends, stacked


def _both(put, letters, scale, bias):
    return put(letters, scale[...]), put(letters, bias[...])


@jax.jit
def _layer(stacked, layer):
    return jax.tree.map(
        lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), stacked
    )


def prefill(model: SparseTransformer, inputs_BT, length, *, T: int) -> Caches:
    """Run the first `length` inputs at once, for caches of sequences of up to T.

    Args:
      model: the weights.
      inputs_BT: as the model takes them; what follows `length` of them is ignored.
      length: int32 scalar.
      T: a whole number.

    Returns:
      A cache for each layer.
    """
    return tuple(
        _keep(pattern, T, k, v, length)
        for pattern, (_, k, v) in layer_by_layer(model, inputs_BT)
    )


_keep = jax.jit(decode.prefill, static_argnums=(0, 1))


def layer_by_layer(model: SparseTransformer, inputs_BT) -> Iterator[tuple]:
    """Run the layers one after the other, without dropout.

    Each is compiled once for all layers of a pattern, and what they compute is nowhere
    together in one array: the caches of a prompt may be most of the memory.

    Yields:
      For each layer its pattern, and its queries, keys and values (q_BTHK, k_BTHK,
      v_BTHV).
    """
    config = model.config
    x_BTD = _embedded(model, inputs_BT)
    for layer in range(config.layers):
        pattern = config.patterns[layer % len(config.patterns)]
        x_BTD, qkv = _run(
            model.blocks,
            layer,
            x_BTD,
            pattern=pattern,
            implementation=config.implementation,
        )
        yield pattern, qkv


# Each jit below is called in one layout alone, which is no part of its cache's key.
@whole_sequences()
@jax.jit
def _embedded(model, inputs_BT):
    return model.embed(inputs_BT)


@whole_sequences()
@functools.partial(jax.jit, static_argnames=("pattern", "implementation"))
def _run(blocks, layer, x_BTD, *, pattern: Pattern, implementation):
    block = _layer(blocks, layer)
    q, k, v = block.qkv(x_BTD)
    a_BTHV = sparse_attention(q, k, v, pattern, implementation=implementation)
    return block.after_attention(x_BTD, a_BTHV), (q, k, v)


def step(
    decoder: Decoder, caches: Caches, input_B, position, reach: int
) -> tuple[jax.Array, Caches]:
    """Return the logits [B, 256] after one more input, float32, and the caches with it.

    Args:
      decoder: the weights.
      caches: of the inputs before `position`.
      input_B: integers, the input of each row at `position`.
      position: int32 scalar below `reach`.
      reach: as for `decode.step`.
    """
    ends = decoder.ends
    x_BD = _embed(ends, input_B, position)
    kept = []
    for layer, cache in zip(decoder.layers, caches, strict=True):
        h_BD = norm(x_BD, *layer.norm1_D, 1e-5)
        qkv_BHW = _product("BD,HWD->BHW", h_BD, layer.qkv_HWD) + layer.qkv_bias_HW
        q, k, v = jnp.split(qkv_BHW.astype(x_BD.dtype), decoder.cuts, axis=-1)
        a_BHV, cache = decode.step(cache, q, k, v, position, reach=reach)
        a_BD = _product("BHV,DHV->BD", a_BHV, layer.out_DHV) + layer.out_bias_D
        x_BD = x_BD + a_BD.astype(x_BD.dtype)
        h_BD = norm(x_BD, *layer.norm2_D, 1e-5)
        f_BF = _product("BD,FD->BF", h_BD, layer.up_FD) + layer.up_bias_F
        f_BF = quick_gelu(f_BF).astype(x_BD.dtype)
        f_BD = _product("BF,DF->BD", f_BF, layer.down_DF) + layer.down_bias_D
        x_BD = x_BD + f_BD.astype(x_BD.dtype)
        kept.append(cache)
    h_BD = norm(x_BD, *ends.norm_D, 1e-6)
    return _product("BD,ND->BN", h_BD, ends.logits_ND), tuple(kept)


def _embed(ends: Ends, input_B, position) -> jax.Array:
    """Do as `SparseTransformer.embed`, for the input at one position."""
    shape = tuple(len(table_ND) for table_ND in ends.positions_ND)
    digits = jnp.unravel_index(position - 1, shape)
    position_D = sum(
        jax.lax.dynamic_index_in_dim(table_ND, digit, keepdims=False)
        for digit, table_ND in zip(digits, ends.positions_ND, strict=True)
    )
    x_BD = ends.token_ND.at[input_B].get(mode="clip", out_sharding=activation("BD"))
    x_BD = x_BD + position_D.astype(x_BD.dtype)
    return jnp.where((input_B == START)[:, None], ends.start_D, x_BD)


def _product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply rows by a weight whose last dimensions are summed over, into float32."""
    letters, out = equation.split("->")
    if x.shape[0] > 1:
        at = activation(out)
        return jnp.einsum(
            equation, x, w, preferred_element_type=jnp.float32, out_sharding=at
        )
    # A matrix product of one row is none; this is read as a sum along each weight row.
    summed = letters.index(",") - 1
    x = jnp.expand_dims(x, tuple(range(1, 1 + w.ndim - summed)))
    xw = x.astype(jnp.float32) * w.astype(jnp.float32)
    return jnp.sum(xw, axis=tuple(range(-summed, 0)))
