"""Floating-point operations of the model, and the peaks of the devices that do them."""

from __future__ import annotations

from sparse_flax.model import ModelConfig

# Vendors' dense bfloat16 peaks in FLOP/s for one device as JAX counts devices, by what
# `device_kind` begins with; float16 where a GPU has no bfloat16 tensor cores.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak(device_kind: str) -> float | None:
    """Return a device's peak in FLOP/s, or None where we know of none (a CPU, say)."""
    for prefix in sorted(PEAKS, key=len, reverse=True):
        # Whole words: an L40 is no L4.
        rest = device_kind.removeprefix(prefix)
        if rest != device_kind and not rest[:1].isalnum():
            return PEAKS[prefix]
    return None


def forward_flops(config: ModelConfig, T: int | None = None) -> int:
    """Count one forward pass over one sequence of T tokens (the context if None).

    Matrix products only, a multiplication and an addition counted as two; in attention
    the (query, key) pairs that the pattern allows. Biases, norms and activations are
    left out, as is the embedding, a table look-up.
    """
    T = T or config.context
    D, F, H, QK = config.width, config.feed_forward, config.heads, config.qk_width
    K, V = QK // H, D // H
    # Weights of q, k, v, out, up and down, each used once per token.
    weights = 2 * D * QK + 2 * D * D + 2 * D * F
    per_layer = 2 * T * weights * config.layers
    pairs = sum(
        pattern.pairs(T, head % pattern.head_period)
        for pattern in config.patterns
        for head in range(H)
    )
    cycles = config.layers // len(config.patterns)
    logits = 2 * T * D * config.vocabulary
    return per_layer + 2 * (K + V) * pairs * cycles + logits


def train_flops(config: ModelConfig, T: int | None = None) -> int:
    """Count forward and backward of one sequence: three forwards, no recomputation."""
    return 3 * forward_flops(config, T)
