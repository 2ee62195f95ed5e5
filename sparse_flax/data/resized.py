"""ImageNet scaled down to 64 x 64, in the npz batches of image-net.org.

That is train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz, each with
`data`, uint8 [N, 3 * 64 * 64], all of an image's red bytes first. They are copied once
into the cache of `folder.py`, with the bytes of a pixel side by side.
"""

from __future__ import annotations

import contextlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparse_flax.data import archives, folder
from sparse_flax.errors import UserError, one_line

TRAIN, TEST = "train_data_batch_*.npz", "val_data.npz"
_IMAGE = 3 * 64 * 64  # bytes
_ROWS = 4096  # read at a time


def files(root: Path) -> list[Path]:
    """Return the batches in a folder or below, of train in order of their numbers."""
    train = sorted(root.rglob(TRAIN), key=lambda f: (len(f.name), f.name))
    return [*train, *sorted(root.rglob(TEST))]


def read(
    root: Path,
    data_folder: str,
    held_out: int,
    draw: Callable[[int, int], np.ndarray],
) -> tuple[list[np.ndarray], str]:
    """Map train, validation and test from the cache, after filling it.

    Args:
      root: the folder that the batches are in.
      data_folder: data.folder.
      held_out: how many images of train validate, or 5% if that is fewer.
      draw: draws so many of a total, as bool [total].

    Returns:
      Three arrays of uint8 [N, 64, 64, 3], and where they come from.

    Raises:
      UserError: a batch is damaged or of another shape, or one kind is missing.
    """
    train = [file for file in files(root) if file.name != TEST]
    test = [file for file in files(root) if file.name == TEST]
    if not train or not test:
        raise UserError(
            f"{root} has {len(train)} files {TRAIN} and {len(test)} {TEST}, and both "
            "are needed; put the others there"
        )

    def write(store: folder.Store) -> dict[str, Any]:
        counts = {file: _count(file) for file in [*train, *test[:1]]}
        total = sum(counts[file] for file in train)
        held = draw(min(held_out, total // 20), total)
        size = sum(counts.values()) * _IMAGE
        progress = archives.Progress(f"copying {root}", size, sys.stderr)
        seen = 0
        for file, count in counts.items():
            for rows in _rows(file, count):
                images = rows.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
                if file in train:
                    chosen = held[seen : seen + len(images)]
                    store.write("train", images[~chosen])
                    store.write("validation", images[chosen])
                    seen += len(images)
                else:
                    store.write("test", images)
                progress.advance(rows.size)
        progress.finish()
        return {}

    key = [
        [str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns]
        for file in [*train, *test[:1]]
    ]
    parts, _ = folder.cached(data_folder, "imagenet64", [key, held_out], write)
    return [part.reshape(-1, 64, 64, 3) for part in parts], f"{root} (npz batches)"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open the array `data` of a batch: its bytes, and what its header says.

    Not by numpy.load, which takes as much memory as a forged header asks for.
    """
    try:
        with zipfile.ZipFile(path) as batch, batch.open("data.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0
            shape, by_column, dtype = header(file)
            if version != (1, 0) or by_column or dtype != np.uint8:
                raise ValueError(f"its data are {dtype} of version {version}")
            if len(shape) != 2 or shape[1] != _IMAGE:
                raise ValueError(f"its data have the shape {shape}")
            yield file, shape
    # A damaged zip is also a zlib.error or a NotImplementedError.
    except Exception as error:
        raise UserError(
            f"{path} is no batch of uint8 [N, {_IMAGE}] "
            f"({one_line(error)}); download it again"
        ) from error


def _count(path: Path) -> int:
    with _opened(path) as (_, shape):
        return shape[0]


def _rows(path: Path, count: int) -> Iterator[np.ndarray]:
    with _opened(path) as (file, _):
        for first in range(0, count, _ROWS):
            size = min(_ROWS, count - first) * _IMAGE
            content = file.read(size)
            if len(content) < size:
                raise ValueError("it ends too early")
            yield np.frombuffer(content, np.uint8).reshape(-1, _IMAGE)
