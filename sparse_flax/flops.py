"""Floating-point operations of the model."""

from __future__ import annotations

from sparse_flax.model import VOCABULARY, ModelConfig


def forward_flops(config: ModelConfig, T: int | None = None) -> int:
    """Count one forward pass over one sequence of T tokens (the context if None).

    Matrix products only, a multiplication and an addition counted as two; in attention
    the (query, key) pairs that the pattern allows. Biases, norms and activations are
    left out, as is the embedding, a table look-up.
    """
    products = _products(config, T or config.context)
    return sum(products.values())


def train_flops(config: ModelConfig, T: int | None = None) -> int:
    """Count forward and backward of one sequence: three forwards, no recomputation."""
    return 3 * forward_flops(config, T)


def recomputed_flops(config: ModelConfig, T: int | None = None) -> int:
    """Count what the backward pass of one sequence does again, by `config.remat`.

    What an implementation of attention does again within itself is left out, as are
    the down projection and the logits: nothing in the backward pass needs them. Of
    attention itself fused kernels do less than is counted, where remat keeps it.
    """
    products = _products(config, T or config.context)
    again = {
        "none": (),
        "full": ("qkv", "attention", "out", "up"),
        "attention": ("attention", "up"),
        "attention+mlp": ("attention",),
        "products": ("attention",),
    }
    return sum(products[name] for name in again[config.remat])


def _products(config: ModelConfig, T: int) -> dict[str, int]:
    """Count a forward pass of T tokens by product, over all layers."""
    D, F, H, QK = config.width, config.feed_forward, config.heads, config.qk_width
    K, V = QK // H, D // H
    pairs = sum(
        pattern.pairs(T, head % pattern.head_period)
        for pattern in config.patterns
        for head in range(H)
    )
    cycles = config.layers // len(config.patterns)
    # Weights are used once per token.
    per_weight = 2 * T * config.layers
    return {
        "qkv": per_weight * (2 * D * QK + D * D),
        "attention": 2 * (K + V) * pairs * cycles,
        "out": per_weight * D * D,
        "up": per_weight * D * F,
        "down": per_weight * D * F,
        "logits": 2 * T * D * VOCABULARY,
    }
