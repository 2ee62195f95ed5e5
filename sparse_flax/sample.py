"""Samples of a text, into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_flax.generate import generate
from sparse_flax.model import SparseTransformer
from sparse_flax.workdir import write_atomically

BETWEEN = b"\n--- next sample ---\n"  # samples in a file


def write_samples(
    model: SparseTransformer,
    prompt: bytes,
    path: Path,
    *,
    number: int,
    count: int,
    **options: Any,
) -> str:
    """Continue a prompt in several ways, into a file.

    Args:
      model: the weights to sample from.
      prompt: what is continued.
      path: of the file.
      number: of samples.
      count: bytes of each.
      options: those of `generate`, among them the seed of the first sample.

    Returns:
      What was written, for a person.
    """
    sampled = generate(model, [prompt] * number, count, **options)
    write_atomically(path, BETWEEN.join(prompt + sample for sample in sampled))
    pieces = ["--- prompt ---", shown(prompt)]
    for sample in sampled:
        pieces += ["--- continued ---", shown(sample)]
    return "\n".join([*pieces, "---"])


def shown(text: bytes) -> str:
    """Return bytes as text, those that are none escaped."""
    return text.decode("utf-8", "backslashreplace")
