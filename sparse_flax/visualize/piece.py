"""What the command line looks at: a text, picture or sound, given or held out."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sparse_flax.data import audio, pictures
from sparse_flax.data.folder import BadFileError
from sparse_flax.errors import UserError
from sparse_flax.sample import held_out


def content(
    config: ConfigDict,
    *,
    text: str = "",
    file: str = "",
    data: str = "",
    piece: int = 1,
) -> tuple[np.ndarray, str]:
    """Return what to look at, and what it is.

    Args:
      config: finalized, of the model.
      text: given as it is.
      file: of a text, a picture or a recording; its beginning, as far as the context.
      data: of a held-out piece: where data.path is now.
      piece: which one.

    Returns:
      uint8 [N], [S, S, 3] or [N] by config.data.kind, and its source.

    Raises:
      UserError: it cannot be read, or two are given.
    """
    kind, context = config.data.kind, config.model.context
    if text and file:
        raise UserError(f"--text and --file={file} are two texts; give one of them")
    if text:
        if kind != "text":
            raise UserError(
                f"--text is for models of text, and this one's data.kind is {kind!r}; "
                "give a --file"
            )
        return np.frombuffer(text.encode(), np.uint8), "the text that was given"
    if file:
        read = {
            "text": lambda path: np.frombuffer(path.read_bytes(), np.uint8),
            "image": lambda path: pictures.read(path, config.data.size)[0],
            "audio": functools.partial(audio.read, rate=config.data.rate),
        }[kind]
        found = _read(file, read)
        whole = found if kind == "image" else found[:context]
        cut = "" if whole.size == found.size else f", its first {whole.size:,} bytes"
        return whole, f"{file}{cut}"
    return _held_out(config, data, piece)


def _read(name: str, read) -> np.ndarray:
    try:
        path = Path(name).expanduser()
        path.open("rb").close()  # decoders have other words for what is not there
        return read(path)
    except OSError as error:
        raise UserError(
            f"--file={name} cannot be read ({error.strerror}); give the path of a file"
        ) from None
    except BadFileError as error:
        raise UserError(f"--file={name} {error}; give another file") from None


def _held_out(config: ConfigDict, data: str, piece: int) -> tuple[np.ndarray, str]:
    if piece < 1:
        raise UserError(f"--piece={piece} must be at least 1; try 1")
    config = ConfigDict(config.to_dict())
    config.sample.number, config.eval.split = piece, "validation"
    config.data.path = data or config.data.path
    try:
        pieces, source, _ = held_out(config, config.model.context)
    except UserError as error:  # Our flags have other names than the trainer's.
        words = {
            r"(--config\.)?\bdata\.path=": "--data=",
            r"\bsample\.number=": "--piece=",
            r"\bsample\.prompt_file\b": "--file",
            r"use data\.name='bytes' to .*": "leave --data out, or give a --file",
        }
        sentence = str(error)
        for theirs, ours in words.items():
            sentence = re.sub(theirs, ours, sentence)
        raise UserError(sentence) from error
    whole = pieces[-1]
    if config.data.kind == "image":
        whole = whole.reshape(config.data.size, config.data.size, 3)
    return whole, f"piece {piece} of {source}"


def position(text: str, config: ConfigDict) -> int | tuple[int, ...] | None:
    """Read a position: a number, row,column[,colour] of an image, or as in 1.5s.

    Raises UserError if it is none.
    """
    if not text:
        return None
    try:
        if text.endswith("s") and config.data.kind == "audio":
            return round(float(text[:-1]) * config.data.rate)
        numbers = tuple(int(number) for number in text.split(","))
    except (ValueError, OverflowError):
        raise UserError(
            f"--position={text} is not readable; write the number of a byte, as in 100"
            f"{_OTHERWISE[config.data.kind]}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


_OTHERWISE = {
    "text": "",
    "image": ", or row and column, as in 16,20",
    "audio": ", or seconds, as in 0.5s",
}
