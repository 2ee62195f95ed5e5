"""The Sparse Transformer: embedding, residual blocks, logits (paper, section 5).

Dimension letters, here and everywhere else:

    B batch   T tokens   D width   H heads   K query/key head width   V value head width
    F feed-forward width   N entries of a table, the 256 bytes among them   L layers
    S stride or block   R rows (T/S)   C summary width

Modules hold float32 parameters and nothing else; only jax.jit, jax.grad, jax.checkpoint
and lax.scan transform them, and random keys are arguments. The parameters of all
residual blocks are stacked [L, ..] and scanned over, so that 128 layers compile as fast
as one cycle of patterns.

Initialisation. The paper prints N(0, 0.125/sqrt(d_in)); its authors' code for images
uses that figure's square root, sqrt(0.125/d_in), as the standard deviation. `init`
chooses; 'code' is the default. Ll = number of blocks, e = number of position tables.

    parameter                          'code': std             'paper': std
    token_ND, start_D                  0.01                    0.125 / sqrt(D)
    positions_ND                       0.01 / sqrt(e)          0.125 / sqrt(D e)
    query, key, value, up              sqrt(0.125 / D)         0.125 / sqrt(D)
    out                                the same x sqrt(1 / (2 Ll))
    down                               as out, with d_in = F
    logits_DN, all biases              0                       0
    norm scales                        1                       1

`embedding_std`, where it is not 0, replaces the 0.01 or 0.125 / sqrt(D) of the first
two rows. Zero logits make the loss before training exactly 8 bits a byte.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_flax.attention import Pattern
from sparse_flax.block import Block, fold_in, norm
from sparse_flax.sharding import activation, batch_rows, lay_out, whole

VOCABULARY = 256  # the bytes
START = VOCABULARY  # the input before the first of them

# What the backward pass of a block keeps besides its input; the rest is computed again.
# `attention_out` and `attention_lse` are named inside of the fused kernels, which are
# then not run again; plain attention (`gathered`) is.
ATTENTION = ("qkv", "attention_out", "attention_lse", "residual", "norm")
WITH_MLP = (*ATTENTION, "mlp", "dropout")
REMAT = {
    "none": None,  # keep everything, compute nothing again
    "full": (),
    "attention": ATTENTION,
    "attention+mlp": WITH_MLP,
    "products": (*WITH_MLP, "product_input"),  # all that a product reads or gives
}
INITS = ("code", "paper")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Heads divide the widths, and patterns the layers."""

    context: int  # T at most
    layers: int
    width: int  # D
    heads: int  # H
    qk_width: int  # of all heads together, H * K
    feed_forward: int  # F
    patterns: tuple[Pattern, ...]  # layer r uses patterns[r mod len(patterns)]
    position_shape: tuple[int, ...]  # sizes of the position tables; product >= context
    dropout: float = 0.0
    init: str = "code"
    embedding_std: float = 0.0  # 0: as init says
    dtype: str = "bfloat16"  # of activations and matrix products
    remat: str = "full"
    unroll: int = 1  # pattern cycles in one turn of the loop over layers
    implementation: str | None = None  # of attention; None picks

    def __post_init__(self) -> None:
        """Check what a model would otherwise be silently wrong with.

        Raises ValueError, in a sentence.
        """
        n = len(self.patterns)
        for name, by, what in (
            ("width", self.heads, f"heads={self.heads}"),
            ("qk_width", self.heads, f"heads={self.heads}"),
            ("layers", n, f"the {n} patterns"),
        ):
            value = getattr(self, name)
            if value % by:
                raise ValueError(
                    f"{name}={value} is no multiple of {what}; try "
                    f"{max(round(value / by), 1) * by}"
                )
        if (places := math.prod(self.position_shape)) < self.context:
            raise ValueError(
                f"position_shape={self.position_shape} has {places} places for context="
                f"{self.context} tokens; try ({self.context},)"
            )


class SparseTransformer(nnx.Module):
    """Predict the next byte of a sequence, for every position at once.

    >>> model = SparseTransformer(config, jax.random.key(0))
    >>> logits_BTN = model(inputs_BT)
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Draw the parameters; the same key gives the same model on any device."""
        N, D, tables = VOCABULARY, config.width, len(config.position_shape)
        std = 0.125 / math.sqrt(D) if config.init == "paper" else 0.01
        std = config.embedding_std or std
        token, start, positions, blocks = jax.random.split(key, 4)
        self.token_ND = nnx.Param(std * jax.random.normal(token, (N, D)))
        self.start_D = nnx.Param(std * jax.random.normal(start, (D,)))
        self.positions_ND = nnx.List(
            nnx.Param(std / math.sqrt(tables) * jax.random.normal(table_key, (n, D)))
            for table_key, n in zip(
                jax.random.split(positions, tables), config.position_shape, strict=True
            )
        )
        self.blocks = jax.vmap(functools.partial(Block, config))(
            jax.random.split(blocks, config.layers)
        )
        self.norm_scale_D = nnx.Param(jnp.ones(D))
        self.norm_bias_D = nnx.Param(jnp.zeros(D))
        self.logits_DN = nnx.Param(jnp.zeros((D, N)))
        self.config = config

    def __call__(
        self,
        inputs_BT: jax.Array,
        dropout_key: jax.Array | None = None,
        rows_B: jax.Array | None = None,
    ) -> jax.Array:
        """Return logits [B, T, 256] in float32.

        Args:
          inputs_BT: integers; entry t is the byte before the one to be predicted at t,
            `START` (256) where there is none. T may be less than the context.
          dropout_key: a `jax.random.key`; None leaves dropout out.
          rows_B: the rows' numbers in the whole batch, where this is only a part of it;
            0 to B - 1 by default. A row's dropout depends on its number alone.
        """
        T = inputs_BT.shape[1]
        if self.config.context < T:
            raise ValueError(
                f"{T} tokens are more than the model's context of {self.config.context}"
                f"; give {self.config.context} or fewer"
            )
        x_BTD = self.embed(inputs_BT)
        keys_B = None
        if dropout_key is not None:
            rows_B = batch_rows(inputs_BT.shape[0]) if rows_B is None else rows_B
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, rows_B)
        return self.logits(self._run_blocks(x_BTD, keys_B))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return the logits [B, T, 256] that the last block's output gives, float32."""
        h = norm(x_BTD, self.norm_scale_D, self.norm_bias_D, 1e-6)
        # Float32 logits from compute-dtype operands: the sum is kept, not rounded.
        return jnp.einsum(
            "BTD,DN->BTN",
            h,
            self.logits_DN[...].astype(h.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=activation("BTN"),
        )

    def generate(
        self,
        prompts: Sequence[bytes | np.ndarray],
        count: int,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> np.ndarray:
        """Continue each prompt by `count` bytes, uint8 [N, count].

        Prompts are bytes, or integers [N, P]: the first rows of images, the first
        samples of clips. The rest is as `generate.generate` says.

        >>> model.generate([b"def ", b""], 100, temperature=0.9)[0].tobytes()
        >>> model.generate(images_NT[:, : 16 * 32 * 3], 16 * 32 * 3)  # the lower halves

        Raises:
          ValueError: a prompt is no bytes, or as `generate`.
        """
        from sparse_flax import generate  # late: it is written in terms of this module

        if isinstance(prompts, bytes | str):
            raise ValueError(f"prompts={prompts[:20]!r} is one prompt; give a list")
        given = [generate.as_bytes(prompt) for prompt in prompts]
        sampled = generate.generate(
            self,
            given,
            count,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        return np.frombuffer(b"".join(sampled), np.uint8).reshape(len(given), count)

    def embed(self, inputs_BT: jax.Array) -> jax.Array:
        """Embed each input byte with that byte's own position, never its target's.

        The paper's sequence of embeddings is shifted right as a whole, behind a learned
        start vector without a position.
        """
        dtype = jnp.dtype(self.config.dtype)
        T = inputs_BT.shape[1]
        # One-hot products: a gather's transpose is a scatter-add, which a GPU sums in
        # no fixed order. START is out of range and so embeds to zero.
        one_hot_BTN = jax.nn.one_hot(inputs_BT, VOCABULARY, dtype=dtype)
        x_BTD = jnp.einsum(
            "BTN,ND->BTD",
            one_hot_BTN,
            self.token_ND[...].astype(dtype),
            out_sharding=activation("BTD"),
        )
        position_TD = self._positions(T - 1).astype(dtype)
        position_TD = jnp.pad(position_TD, [(1, 0), (0, 0)])
        position_TD = lay_out(position_TD, "TD")
        start_D = self.start_D[...].astype(dtype)
        is_start_BT1 = (inputs_BT == START)[..., None]
        return jnp.where(is_start_BT1, start_D, x_BTD + position_TD)

    def _positions(self, T: int) -> jax.Array:
        """Sum one row of each table per token: the digits of its mixed-radix index."""
        shape, D = self.config.position_shape, self.config.width
        rows = max(-(-T // math.prod(shape[1:])), 1)
        total: Any = 0.0
        for axis, table_ND in enumerate(self.positions_ND):
            ones = [1] * len(shape)
            table_ND = whole(table_ND[...])
            if axis == 0:
                table_ND = table_ND[:rows]
            ones[axis] = table_ND.shape[0]
            total = total + table_ND.reshape(*ones, D)
        return total.reshape(-1, D)[:T]

    def cycles(self) -> tuple[Block, jax.Array]:
        """Return the blocks and their numbers, [L / p, p, ..] for p patterns."""
        shape = -1, len(self.config.patterns)
        blocks = jax.tree.map(lambda w: w.reshape(*shape, *w.shape[1:]), self.blocks)
        return blocks, jnp.arange(self.config.layers).reshape(shape)

    def _run_blocks(self, x_BTD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """Scan over the pattern cycles, each block rematerialised on its own.

        Without a loop where `unroll` reaches their number: nothing is then copied into
        stacks over layers, and compiling takes longer.
        """
        config = self.config
        blocks, layers = self.cycles()
        cycles = len(layers)
        is_loop = config.unroll < cycles

        def apply(x_BTD, block, layer, keys_B, pattern):
            layer_keys_B = None if keys_B is None else fold_in(keys_B, layer)
            return block(x_BTD, config, pattern, layer_keys_B)

        if (kept := REMAT[config.remat]) is not None:
            apply = jax.checkpoint(
                apply,
                policy=jax.checkpoint_policies.save_only_these_names(*kept),
                # A loop keeps the two passes apart by itself, if it holds all cycles.
                prevent_cse=not is_loop or cycles % config.unroll > 0,
                static_argnums=(4,),
            )

        def cycle(x_BTD, blocks_and_layers):
            blocks, layers = blocks_and_layers
            for place, pattern in enumerate(config.patterns):
                block = jax.tree.map(lambda w: w[place], blocks)  # noqa: B023
                x_BTD = apply(x_BTD, block, layers[place], keys_B, pattern)
            return x_BTD, None

        if is_loop:
            x_BTD, _ = jax.lax.scan(
                cycle, x_BTD, (blocks, layers), unroll=config.unroll
            )
            return x_BTD
        # Split, not indexed: the gradients are then put together once, not added up.
        structure: Any
        leaves, structure = jax.tree.flatten((blocks, layers))
        for turn in zip(
            *(jax.lax.split(x, (1,) * cycles) for x in leaves), strict=True
        ):
            x_BTD, _ = cycle(x_BTD, structure.unflatten([x[0] for x in turn]))
        return x_BTD


def parameter_count(model: SparseTransformer) -> int:
    """Count the parameters, also of a model of `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
