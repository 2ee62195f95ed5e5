"""Samples of a text, into a file; and what samples of any kind continue."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sparse_flax import processes
from sparse_flax.data import sources
from sparse_flax.errors import UserError
from sparse_flax.generate import generate
from sparse_flax.model import SparseTransformer
from sparse_flax.workdir import write_atomically

BETWEEN = b"\n--- next sample ---\n"  # samples in a file


@dataclasses.dataclass(frozen=True)
class Given:
    """What is given of each sample, and how many bytes are to follow."""

    prompts: list[bytes]
    count: int
    source: str = ""  # of what is given, for a person
    fingerprint: str = ""  # of the data whose split it is from, if it is from any
    whole: np.ndarray | None = None  # uint8 [N, T], of which `prompts` is the beginning


def given(config: ConfigDict, context: int) -> Given:
    """Return the text that config.sample says to continue.

    Raises:
      UserError: prompt and prompt_file are both given, the file cannot be read, or
        prompt and sample do not fit the context.
    """
    options = config.sample
    if options.prompt and options.prompt_file:
        raise UserError(
            f"sample.prompt_file={options.prompt_file} and sample.prompt are two "
            "prompts; give one of them"
        )
    prompt = os.fsencode(options.prompt)
    if options.prompt_file:
        prompt = read_prompt_file(options.prompt_file, Path.read_bytes)
    room = context - len(prompt)
    if options.count > room:
        nearest = (
            f"sample.count={room}"
            if room > 0
            else f"a prompt of {max(context - options.count, 0)} bytes or fewer"
        )
        raise UserError(
            f"sample.count={options.count} bytes after a prompt of {len(prompt)} do "
            f"not fit model.context={context}; try {nearest}"
        )
    return Given([prompt] * options.number, options.count)


def read_prompt_file(name: str, read: Any) -> Any:
    """Return what `read` makes of the path of sample.prompt_file, or say why not."""
    path = Path(name).expanduser()
    try:
        path.open("rb").close()  # decoders have other words for what is not there
        return read(path)
    except OSError as error:
        raise UserError(
            f"sample.prompt_file={name} cannot be read ({error.strerror}); give the "
            "path of a file"
        ) from error


def held_out(config: ConfigDict, cut: int) -> tuple[np.ndarray, str, str]:
    """Draw sample.number different pieces of the split that config.eval names.

    The first ones are the same however many are asked for.

    Args:
      config: finalized.
      cut: bytes of each piece.

    Returns:
      uint8 [N, cut], where they come from, and the fingerprint of those data.

    Raises:
      UserError: the data cannot be had, or the split has fewer.
    """
    splits, split = sources.load(config.data), config.eval.split
    data, number = getattr(splits, split), config.sample.number
    if data.ndim == 1:
        data = data[: data.size // cut * cut].reshape(-1, cut)
    if not len(data):
        raise UserError(
            f"the {split} split of {splits.source} has fewer than the {cut:,} bytes of "
            "one piece; give more data, or a file by sample.prompt_file"
        )
    if len(data) < number:
        raise UserError(
            f"sample.number={number} is more than the {len(data)} pieces of {cut:,} "
            f"bytes that the {split} split of {splits.source} has; try "
            f"sample.number={len(data)}"
        )
    # The legacy generator, whose stream numpy has frozen.
    chosen = np.random.RandomState(0).permutation(len(data))[:number]
    pieces = np.asarray(data[chosen, :cut])
    return pieces, f"{splits.source}: {split}", splits.fingerprint


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
    prompts = [prompt] * number
    return _write(prompts, generate(model, prompts, count, **options), path)


def write(config: ConfigDict, given: Given, sampled: list[bytes], folder: Path) -> str:
    """Write generated.txt, and return what it holds, for a person."""
    path = folder / "generated.txt"
    return f"{_write(given.prompts, sampled, path)}\nsample             {path}"


def _write(prompts: list[bytes], sampled: list[bytes], path: Path) -> str:
    whole = [prompt + text for prompt, text in zip(prompts, sampled, strict=True)]
    if processes.is_first():
        write_atomically(path, BETWEEN.join(whole))
    pieces = ["--- prompt ---", shown(prompts[0])]
    for text in sampled:
        pieces += ["--- continued ---", shown(text)]
    return "\n".join([*pieces, "---"])


def shown(text: bytes) -> str:
    """Return bytes as text, those that are none escaped."""
    return text.decode("utf-8", "backslashreplace")
