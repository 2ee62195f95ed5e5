"""Samples of audio, as WAV files: from silence, or the rest of given first seconds."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path

import numpy as np
import soundfile
from ml_collections import ConfigDict

from sparse_flax.data import audio
from sparse_flax.data.folder import BadFileError
from sparse_flax.errors import UserError
from sparse_flax.sample import Given, held_out, read_prompt_file
from sparse_flax.workdir import write_atomically


def given(config: ConfigDict, context: int) -> Given:
    """Return the first seconds of held-out clips, or of the file that is named.

    Raises:
      UserError: there are none, or given and sampled ones do not fit the context.
    """
    rate, options = config.data.rate, config.sample
    first = round(options.given_seconds * rate)
    count = context - first
    if options.seconds:
        count = max(round(options.seconds * rate), 1)
    half = _seconds(context // 2, rate)
    if first + count > context or count <= 0:
        room = _seconds(context - first, rate)
        nearest = (
            f"sample.seconds={room:g} or less"
            if room > 0
            else f"sample.given_seconds={half:g} and sample.seconds=0"
        )
        raise UserError(
            f"sample.given_seconds={options.given_seconds:g} and sample.seconds="
            f"{options.seconds:g} do not fit the {context / rate:.2f} seconds that "
            f"model.context={context} is at {rate:,} Hz; try {nearest}"
        )
    if not first:
        if options.prompt_file:
            raise UserError(
                f"sample.prompt_file={options.prompt_file} is given, but "
                f"sample.given_seconds=0 of it; try sample.given_seconds={half:g}"
            )
        return Given([b""] * options.number, count)
    if options.prompt_file:
        read = functools.partial(audio.read, rate=rate)
        try:
            levels = read_prompt_file(options.prompt_file, read)
        except BadFileError as error:
            raise UserError(
                f"sample.prompt_file={options.prompt_file} {error}; give another file"
            ) from None
        if levels.size < first:
            raise UserError(
                f"sample.given_seconds={options.given_seconds:g} is more than the "
                f"{levels.size / rate:.2f} seconds of {options.prompt_file}; try "
                f"sample.given_seconds={_seconds(levels.size, rate):g}"
            )
        prompts = [levels[:first].tobytes()] * options.number
        return Given(prompts, count, options.prompt_file)
    whole, source, digest = held_out(config, context)
    return Given([row[:first].tobytes() for row in whole], count, source, digest)


def _seconds(samples: int, rate: int) -> float:
    """Return how long that is, rounded down to what can be read and still fits."""
    return math.floor(samples / rate * 1000) / 1000


def write(config: ConfigDict, given: Given, sampled: list[bytes], folder: Path) -> str:
    """Write generated-1.wav and so on, and return what they hold, for a person."""
    rate, lines = config.data.rate, []
    for number, prompt in enumerate(given.prompts):
        path = folder / f"generated-{number + 1}.wav"
        levels = np.frombuffer(prompt + sampled[number], np.uint8)
        content = io.BytesIO()
        samples = audio.mulaw_decode(levels)
        soundfile.write(content, samples, rate, format="WAV", subtype="PCM_16")
        write_atomically(path, content.getvalue())
        begin, end = len(prompt) / rate, levels.size / rate
        what = f"{begin:.2f} s given, " if prompt else ""
        lines.append(f"sample             {path}: {what}sampled to {end:.2f} s")
    if given.source:
        lines.append(f"given              from {given.source}")
    return "\n".join(lines)
