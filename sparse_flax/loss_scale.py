"""Dynamic loss scaling, for float16: a GPU without bfloat16 has nothing else.

Float16 ends at 65,504 and has nothing between 0 and 6e-8, where many gradients lie. So
the loss is multiplied by a scale before the backward pass and the gradient divided by
it after; the scale doubles now and then, and a gradient that overflows halves it and
costs one skipped step (paper, section 6; Micikevicius et al. 2018).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# As in the authors' later code: twice as much after 2,000 good steps.
GROWS_AFTER = 2000
SMALLEST, LARGEST = 1.0, 2.0**32


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LossScale:
    """The scale and the good steps since it last changed; both scalars."""

    scale: jax.Array  # float32
    good_steps: jax.Array  # int32

    @classmethod
    def start(cls, scale: float) -> LossScale:
        """Begin with `scale`."""
        return cls(jnp.float32(scale), jnp.int32(0))

    def can_fall(self) -> jax.Array:
        """Whether there is a smaller scale to try."""
        return self.scale > SMALLEST

    def after(self, good: jax.Array) -> LossScale:
        """Return the scale for the next step; `good`: the gradient was finite."""
        good_steps = jnp.where(good, self.good_steps + 1, 0)
        grown = good_steps >= GROWS_AFTER
        scale = jnp.where(good, jnp.where(grown, 2.0, 1.0), 0.5) * self.scale
        return LossScale(
            jnp.clip(scale, SMALLEST, LARGEST), jnp.where(grown, 0, good_steps)
        )
