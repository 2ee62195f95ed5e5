"""Samples of a text, into a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sparse_flax.generate import generate
from sparse_flax.model import SparseTransformer
from sparse_flax.workdir import write_atomically

BETWEEN = b"\n--- next sample ---\n"  # samples in a file


def write_samples(
    model: SparseTransformer,
    text: np.ndarray,
    options: ConfigDict,
    path: Path,
    *,
    seed: int,
    stop: object,
    say: Callable[[str], None],
) -> str:
    """Continue the beginning of a text in several ways, into a file.

    Args:
      model: the weights to sample from.
      text: uint8 [N].
      options: config.eval; its prompt_bytes, samples and sample_bytes (0: none).
      path: of the file.
      seed: of the first sample; the others have the next ones.
      stop, say: as for `generate`.

    Returns:
      What was written, for a person; empty where nothing was.
    """
    if not options.sample_bytes:
        return ""
    prompt = text[: options.prompt_bytes].tobytes()
    unfiltered = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options = ConfigDict(
        {
            "count": options.sample_bytes,
            "number": options.samples,
            "seed": seed,
            **unfiltered,
        }
    )
    return write(model, prompt, options, path, stop=stop, say=say)


def write(
    model: SparseTransformer,
    prompt: bytes,
    options: ConfigDict,
    path: Path,
    *,
    stop: object,
    say: Callable[[str], None],
) -> str:
    """Continue a prompt by config.sample into a file; return it for a person."""
    sampled = generate(
        model,
        [prompt] * options.number,
        options.count,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=stop,
        say=say,
    )
    write_atomically(path, BETWEEN.join(prompt + sample for sample in sampled))
    pieces = ["--- prompt ---", shown(prompt)]
    for sample in sampled:
        pieces += ["--- continued ---", shown(sample)]
    return "\n".join([*pieces, "---"])


def shown(text: bytes) -> str:
    """Return bytes as text, those that are none escaped."""
    return text.decode("utf-8", "backslashreplace")


def continue_text(
    model: SparseTransformer,
    prompt: bytes,
    count: int,
    *,
    seed: int,
    temperature: float = 1.0,
    stop: object = False,
    say: Callable[[str], None] = print,
) -> bytes:
    """Sample up to `count` bytes that follow `prompt`.

    Args:
      model: the weights to sample from.
      prompt: at least a byte less than the model's context; it begins a window, as in
        training.
      count: how many bytes; prompt and sample together must fit the context.
      seed: the same seed gives the same bytes.
      temperature: divides the logits, above 0; the paper samples at 1.
      stop: where it becomes true, what was sampled so far is returned.
      say: takes a progress line, every ten seconds.
    """
    options = {"temperature": temperature, "stop": stop, "say": say}
    return generate(model, [prompt], count, seed=seed, **options)[0]
