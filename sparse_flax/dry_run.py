"""Sizes and costs of a configuration, without data, network or running anything."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from sparse_flax import attention, flops
from sparse_flax import config as config_lib
from sparse_flax.config_checks import finalize
from sparse_flax.model import SparseTransformer, parameter_count


def run(config: ConfigDict, say: Callable[[str], None] = print) -> None:
    """Print the table of parameters, what attention sees, and FLOPs a step.

    Raises UserError if the configuration is not valid.
    """
    config, notices = finalize(config)
    for notice in notices:
        say(f"NOTE: {notice}")
    model_config = config_lib.model_config(config)
    model = jax.eval_shape(
        lambda key: SparseTransformer(model_config, key), jax.random.key(0)
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = " x ".join(map(str, leaf.shape))
        size = math.prod(leaf.shape)
        say(f"{name.removesuffix('.value'):<24} {shape:>20} {size:>14,}")
    say(f"parameters: {parameter_count(model):,}")
    B, T, H = config.train.batch_size, model_config.context, model_config.heads
    q = k = (B, T, H, model_config.qk_width // H)
    v = (B, T, H, model_config.width // H)
    for pattern in dict.fromkeys(model_config.patterns):
        say(str(attention.explain(pattern, q, k, v)))
    say(f"tokens a step: {B * T:,}")
    say(f"FLOPs a step: {B * flops.train_flops(model_config):.4g} (no recomputation)")
