"""Factorized attention: pure functions of q, k and v.

    from sparse_flax.attention import sparse_attention, Strided
    out_BTHV = sparse_attention(q_BTHK, k_BTHK, v_BTHV, Strided(128))

This package imports nothing else of sparse_flax, and no flax.

    patterns.py    who sees whom: Dense, Local, Columns, Strided, Blocks, Summaries, ...
    parse.py       patterns from their printed form
    parts.py       the six disjoint parts that patterns are unions of, and their cores
    dispatch.py    sparse_attention and explain: checks, the pick, sharded calls
    support.py     support_table: which implementation takes which call
    heads.py       heads that see the same keys run together
    decode.py      one new token over a cache that keeps what can still be seen
    stores.py      where decoding keeps keys and values
    layouts.py     what stands around kernels: what they take, gradient, vmap
    parallel.py    a sequence that is spread over devices, part by part
    union.py       merge: attention over a union of disjoint key sets
    reference.py   implementation: dense masked softmax in float32
    gathered.py    implementation: blocks and views in plain XLA, any device
    cudnn.py       implementation: calls of cuDNN, NVIDIA GPUs from Ampere on
    cudnn_calls.py what cuDNN computes, through what jax keeps private
    pieces.py      what cudnn and tpu share: pieces of a union, merged backward too
    tpu.py         implementation: splash attention and einsums, TPUs from v4 on
    splash_calls.py what splash computes, through what jax keeps private
    hopper/        implementation: kernels for NVIDIA's H100 and H200
"""

from sparse_flax.attention import decode
from sparse_flax.attention.dispatch import (
    IMPLEMENTATIONS,
    Explanation,
    explain,
    sparse_attention,
    target_device_kind,
)
from sparse_flax.attention.parse import parse
from sparse_flax.attention.patterns import (
    Blocks,
    Columns,
    Dense,
    Fixed,
    Local,
    Pattern,
    PerHead,
    Strided,
    Summaries,
)
from sparse_flax.attention.support import support_table
from sparse_flax.attention.union import merge

__all__ = [
    "IMPLEMENTATIONS",
    "Blocks",
    "Columns",
    "Dense",
    "Explanation",
    "Fixed",
    "Local",
    "Pattern",
    "PerHead",
    "Strided",
    "Summaries",
    "decode",
    "explain",
    "merge",
    "parse",
    "sparse_attention",
    "support_table",
    "target_device_kind",
]
