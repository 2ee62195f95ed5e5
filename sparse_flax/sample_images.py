"""Samples of images, as a sheet: whole ones, or the rest of given first rows."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sparse_flax.data import pictures
from sparse_flax.data.folder import BadFileError
from sparse_flax.errors import UserError
from sparse_flax.sample import Given, held_out, read_prompt_file
from sparse_flax.workdir import write_atomically

MARK = (255, 120, 0)  # beside the rows that were given
UNKNOWN = 128  # what was not given, or not sampled yet
SHOWN = 96  # pixels that a small image is enlarged to, or beyond
GAP = 4  # pixels between images


def given(config: ConfigDict, context: int) -> Given:
    """Return the first rows of held-out images, or of the file that is named.

    Raises:
      UserError: there are none, or too many rows are given.
    """
    size, options = config.data.size, config.sample
    if options.rows >= size:
        raise UserError(
            f"sample.rows={options.rows} leaves nothing to sample of the {size} rows "
            f"of an image; try sample.rows={size // 2}"
        )
    if not options.rows:
        if options.prompt_file:
            raise UserError(
                f"sample.prompt_file={options.prompt_file} is given, but sample.rows=0 "
                f"rows of it; try sample.rows={size // 2}"
            )
        return Given([b""] * options.number, context)
    if options.prompt_file:
        read = functools.partial(pictures.read, size=size)
        try:
            image, _ = read_prompt_file(options.prompt_file, read)
        except BadFileError as error:
            raise UserError(
                f"sample.prompt_file={options.prompt_file} {error}; give another file"
            ) from None
        whole = np.repeat(image.reshape(1, -1), options.number, axis=0)
        source, digest = options.prompt_file, ""
    else:
        whole, source, digest = held_out(config, context)
    first = options.rows * size * 3
    prompts = [row[:first].tobytes() for row in whole]
    return Given(prompts, context - first, source, digest, whole)


def write(config: ConfigDict, given: Given, sampled: list[bytes], folder: Path) -> str:
    """Write generated.png, and return what it shows, for a person."""
    size, rows, path = config.data.size, config.sample.rows, folder / "generated.png"
    pairs = zip(given.prompts, sampled, strict=True)
    images = [_image(prompt + rest, size) for prompt, rest in pairs]
    sheet = make_sheet(images, rows, given.whole)
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, "PNG")
    write_atomically(path, content.getvalue())
    what = f"{len(images)} images of {size} x {size} pixels"
    if rows:
        what = (
            f"{len(images)} times: the first {rows} of {size} rows (beside orange), "
            f"completed, the original; given from {given.source}"
        )
    return f"{what}\nsample             {path}"


def make_sheet(
    images: list[np.ndarray], rows: int = 0, originals: np.ndarray | None = None
) -> np.ndarray:
    """Lay out images in a grid that is about square.

    Args:
      images: uint8 [S, S, 3] each.
      rows: how many were given; they are marked at their left.
      originals: uint8 [N, S * S * 3]; where there are any, each image stands between
        what was given of it and its original.

    Returns:
      uint8 [height, width, 3].
    """
    size = len(images[0])
    cells = []
    for number, image in enumerate(images):
        shown = [image]
        if originals is not None:
            original = _image(originals[number].tobytes(), size)
            start = original.copy()
            start[rows:] = UNKNOWN
            shown = [start, image, original]
        marked = [rows, rows, 0][: len(shown)]
        tiles = [_tile(x, n) for x, n in zip(shown, marked, strict=True)]
        if originals is not None:
            tiles.append(np.full((len(tiles[0]), 2 * GAP, 3), 255, np.uint8))
        cells.append(np.concatenate(tiles, axis=1))
    height, width = cells[0].shape[:2]
    columns = min(max(round(math.sqrt(len(cells) * height / width)), 1), len(cells))
    lines = -(-len(cells) // columns)
    sheet = np.full((lines * height + GAP, columns * width + GAP, 3), 255, np.uint8)
    for number, cell in enumerate(cells):
        y, x = number // columns * height, number % columns * width
        sheet[y : y + height, x : x + width] = cell
    return sheet


def _tile(image: np.ndarray, marked: int) -> np.ndarray:
    """Enlarge an image, with a gap above and at the left, which holds the mark."""
    times = -(-SHOWN // len(image))
    side = times * len(image)
    tile = np.full((side + GAP, side + GAP, 3), 255, np.uint8)
    tile[GAP:, GAP:] = image.repeat(times, axis=0).repeat(times, axis=1)
    tile[GAP : GAP + times * marked, 1:GAP] = MARK
    return tile


def _image(content: bytes, size: int) -> np.ndarray:
    content = content.ljust(3 * size**2, bytes([UNKNOWN]))
    return np.frombuffer(content, np.uint8).reshape(size, size, 3)
