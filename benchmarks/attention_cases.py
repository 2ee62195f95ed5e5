"""What benchmarks/attention.py measures: the paper's shapes, growth, the crossover."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_flax import attention
from sparse_flax.attention import Columns, Dense, Fixed, Local, Strided
from sparse_flax.attention.patterns import Pattern

CUDNN = "dense cuDNN"  # by jax.nn.dot_product_attention
# 'reference' is no way to compute.
WAYS = (*(name for name in attention.IMPLEMENTATIONS if name != "reference"), CUDNN)

# Case: ((B, T, H, K, V), patterns). Sizes are the paper's, and a longer one.
CASES = {
    "enwik8": (
        (8, 12288, 8, 64, 64),
        [
            Strided(128),
            Columns(128),
            Local(128),
            Fixed(128, 32),
            Fixed(128, 32, rotate=True),
        ],
    ),
    "cifar10": ((32, 3072, 2, 128, 128), [Strided(96), Columns(96), Local(96)]),
    "cifar10_half": ((32, 3072, 2, 64, 128), [Strided(96), Columns(96), Local(96)]),
    "imagenet64": ((8, 12288, 16, 32, 32), [Strided(128), Columns(128), Local(128)]),
    "audio": ((2, 65536, 8, 64, 64), [Strided(256), Columns(256), Local(256)]),
    "long": ((1, 1048576, 8, 64, 64), [Strided(1024)]),
}

HEADS, WIDTH = 8, 64
# Growth: as many tokens in each batch, so that no T is bound by launches, and fewer for
# dense attention, whose cost a sequence does not depend on the batch here either. Past
# DENSE_T a call of it takes seconds.
GROWTH_T = tuple(4**n for n in range(6, 11))
GROWTH_TOKENS, DENSE_TOKENS, DENSE_T = 2**20, 2**18, 2**18
# The crossover: a training batch of that many tokens.
CROSSOVER_T = tuple(2**n for n in range(8, 13))
CROSSOVER_TOKENS = 2**17
SMALLEST_BLOCK = 64  # of Fixed there: no kernel is made for smaller ones

SECTIONS = ("cases", "growth", "crossover")


@dataclasses.dataclass(frozen=True)
class Task:
    """One row to measure."""

    section: str
    case: str  # of CASES, or the number of tokens
    shape: tuple[int, int, int, int, int]  # B, T, H, K, V
    pattern: Pattern
    implementation: str

    @property
    def key(self) -> str:
        """Name it, for people and in the record of a process."""
        return f"{self.section} {self.case} {self.pattern} {self.implementation}"

    @property
    def tuned(self) -> bool:
        """Whether XLA looks for the fastest of many products, which takes minutes."""
        return self.implementation == "gathered"

    def row(self) -> dict[str, Any]:
        """Return what is known before it is measured."""
        return {
            "section": self.section,
            "case": self.case,
            "shape_BTHKV": list(self.shape),
            "pattern": repr(self.pattern),
            "implementation": self.implementation,
        }


def side(T: int) -> int:
    """Return the power of two at or above sqrt(T)."""
    return 2 ** math.ceil(math.log2(T) / 2)


def todo(
    sections: Sequence[str],
    cases: Sequence[str],
    device_kind: str,
    named: Sequence[str] = WAYS,
) -> list[Task]:
    """List what this device can measure, what is `tuned` last."""
    tasks: list[Task] = []
    if "cases" in sections:
        for case in cases:
            shape, patterns = CASES[case]
            for pattern in patterns:
                names = _implementations(pattern, shape, device_kind)
                tasks += [Task("cases", case, shape, pattern, name) for name in names]
            if _has_cudnn(shape, device_kind):
                tasks.append(Task("cases", case, shape, Dense(), CUDNN))
    if "growth" in sections:
        for T in GROWTH_T:
            shape = batch_of(GROWTH_TOKENS, T)
            tasks.append(_picked("growth", shape, Strided(side(T)), device_kind))
            tasks += _dense("growth", batch_of(DENSE_TOKENS, T), device_kind)
    if "crossover" in sections:
        for T in CROSSOVER_T:
            shape, l = batch_of(CROSSOVER_TOKENS, T), side(T)
            block = max(l, SMALLEST_BLOCK)
            fixed = Fixed(block, block // 4)
            for pattern in (Strided(l), fixed, Columns(l), Local(l)):
                tasks.append(_picked("crossover", shape, pattern, device_kind))
            tasks += _dense("crossover", shape, device_kind)
    tasks = [task for task in tasks if task.implementation in named]
    return sorted(tasks, key=lambda task: task.tuned)


def batch_of(tokens: int, T: int) -> tuple[int, int, int, int, int]:
    """Return the shape of a batch of so many tokens in sequences of T."""
    return max(1, tokens // T), T, HEADS, WIDTH, WIDTH


def _picked(section: str, shape, pattern: Pattern, device_kind: str) -> Task:
    """What runs where no implementation is named."""
    q, v = _structs(shape)
    chosen = attention.explain(pattern, q, q, v, device_kind=device_kind)
    return Task(section, f"T={shape[1]}", shape, pattern, chosen.implementation)


def _dense(section: str, shape, device_kind: str) -> list[Task]:
    if not _has_cudnn(shape, device_kind):
        return []
    return [Task(section, f"T={shape[1]}", shape, Dense(), CUDNN)]


def _implementations(pattern, shape, device_kind) -> list[str]:
    """What takes this call on this device, but for 'reference'."""
    q, v = _structs(shape)
    return [
        name
        for name, module in attention.IMPLEMENTATIONS.items()
        if name in WAYS
        and not module.runs_on(device_kind)
        and not module.supports(pattern, q, q, v)
    ]


def _has_cudnn(shape, device_kind: str) -> bool:
    _, T, _, K, V = shape
    return "NVIDIA" in device_kind and K == V and T <= DENSE_T  # it takes one width


def _structs(shape) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    B, T, H, K, V = shape
    return tuple(
        jax.ShapeDtypeStruct((B, T, H, width), jnp.bfloat16) for width in (K, V)
    )
