"""CIFAR-10 in the files that its authors publish, and in arrays; code in none is run.

Read are cifar-10-python.tar.gz and cifar-10-binary.tar.gz, packed or unpacked, and
train_images.npy and test_images.npy with, where images are missing, train_index.npy and
test_index.npy: the official number of each.
"""

from __future__ import annotations

import functools
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np

from sparse_flax.data import arrays
from sparse_flax.errors import UserError, one_line

PUBLISHED = {"train": 50_000, "test": 10_000}
SITE = "https://www.cs.toronto.edu/~kriz/cifar.html"

_ENDS = ("", ".bin")  # of the Python version, of the binary one
_PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_NAMES = [f"{stem}{end}" for part in _PARTS.values() for stem in part for end in _ENDS]
_ROWS = 10_000  # of each part
_BYTES = 3072
_LARGEST = 64_000_000  # bytes; the largest part has half as many

# For each split uint8 [N, 32, 32, 3], and the official numbers int [N].
Found = dict[str, tuple[np.ndarray, np.ndarray]]


def find(root: Path) -> Path | None:
    """Return what `read` takes: the folder or archive that lies in a folder, or is it.

    None if there is none.
    """
    names = (
        "",
        "cifar10",
        "cifar-10-batches-py",
        "cifar-10-batches-bin",
        "cifar-10-python.tar.gz",
        "cifar-10-binary.tar.gz",
    )
    for place in (root / name for name in names):
        if place.is_file() and place.name.endswith((".tar.gz", ".tgz", ".tar")):
            return place
        if any(
            (place / name).is_file()
            for name in ("test_batch", "test_batch.bin", "test_images.npy")
        ):
            return place
    return None


def read(place: Path) -> Found:
    """Read both splits from what `find` has found.

    Raises:
      UserError: a file is missing, damaged, or holds something else.
    """
    if place.is_file():
        return _batches(place, _members(place))
    if (place / "test_images.npy").is_file():
        return {split: _arrays(place, split) for split in PUBLISHED}
    files = {
        name: (place / name).read_bytes
        for name in _NAMES
        if (place / name).is_file() and (place / name).stat().st_size < _LARGEST
    }
    return _batches(place, files)


def _arrays(place: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images_NHWC = arrays.array(place / f"{split}_images.npy", np.uint8, 4)
    index_N = np.arange(len(images_NHWC))
    if (place / f"{split}_index.npy").is_file():
        index_N = arrays.array(place / f"{split}_index.npy", np.integer, 1)
    if images_NHWC.shape[1:] != (32, 32, 3):
        raise UserError(
            f"{place / split}_images.npy holds images of shape "
            f"{images_NHWC.shape[1:]}, and those of CIFAR-10 are (32, 32, 3); give "
            "those, or use data.name=images"
        )
    if (
        len(index_N) != len(images_NHWC)
        or len(np.unique(index_N)) != len(index_N)
        or not ((index_N >= 0) & (index_N < PUBLISHED[split])).all()
    ):
        raise UserError(
            f"{place / split}_index.npy does not give each of {len(images_NHWC):,} "
            f"images a number of its own below {PUBLISHED[split]:,}; give such numbers"
        )
    return images_NHWC, index_N


def _members(path: Path) -> dict[str, Callable[[], bytes]]:
    """Read the parts in an archive, by name; nothing is unpacked to disk."""
    found: dict[str, Callable[[], bytes]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in _NAMES and member.isreg() and member.size < _LARGEST:
                    content = cast(IO[bytes], archive.extractfile(member)).read()
                    found[name] = functools.partial(bytes, content)
    # A damaged one may raise whatever the decompressor does.
    except Exception as error:
        raise UserError(
            f"{path} cannot be unpacked ({error}); download it again from {SITE}"
        ) from error
    return found


def _batches(place: Path, files: dict[str, Callable[[], bytes]]) -> Found:
    found = {}
    for split, stems in _PARTS.items():
        parts = []
        for stem in stems:
            if stem in files:
                rows = _pickled(files[stem](), f"{place}: {stem}")
            elif f"{stem}.bin" in files:
                rows = _binary(files[f"{stem}.bin"](), f"{place}: {stem}.bin")
            else:
                raise UserError(
                    f"{place} holds no {stem} or {stem}.bin of CIFAR-10; download it "
                    f"again from {SITE}"
                )
            # Stored are first all red bytes, then all green ones, then all blue ones.
            parts.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        images_NHWC = np.concatenate(parts)
        found[split] = images_NHWC, np.arange(len(images_NHWC))
    return found


def _binary(content: bytes, what: str) -> np.ndarray:
    if len(content) != _ROWS * (1 + _BYTES):
        raise UserError(
            f"{what} has {len(content):,} bytes instead of {_ROWS * (1 + _BYTES):,}; "
            f"download it again from {SITE}"
        )
    rows = np.frombuffer(content, np.uint8).reshape(_ROWS, 1 + _BYTES)
    return rows[:, 1:]  # the first is a label


def _pickled(content: bytes, what: str) -> np.ndarray:
    try:
        batch = _Inert(io.BytesIO(content), encoding="bytes").load()
        data = batch.get(b"data", batch.get("data"))
        rows = np.frombuffer(_raw(data.content), np.uint8)
        rows = rows.reshape(_ROWS, _BYTES)
        if data.shape != rows.shape:
            raise ValueError(f"its shape is {data.shape}")
        if data.column_first:
            rows = rows.reshape(_BYTES, _ROWS).T
    # Whatever a damaged or forged pickle leads to.
    except Exception as error:
        raise UserError(
            f"{what} is no batch of CIFAR-10 ({one_line(error)}); "
            f"download it again from {SITE}"
        ) from error
    return rows


def _raw(content: Any) -> bytes:
    # As a str where a Python 3 has pickled by an old protocol.
    return content.encode("latin1") if isinstance(content, str) else content


class _Array:
    """What stands for a numpy array while a pickle is read."""

    shape: Any = None
    content: Any = b""
    column_first = False

    def __setstate__(self, state: Any) -> None:
        _, self.shape, _, self.column_first, self.content = state


class _Type:
    """What stands for numpy's dtype, of which only uint8 would do."""

    def __init__(self, *args: Any):
        if _raw(args[0]) not in (b"u1", b"uint8"):
            raise ValueError(f"its numbers are {args[0]}")

    def __setstate__(self, state: Any) -> None:
        pass


class _Inert(pickle.Unpickler):
    """Build arrays, which a pickle does by calls, out of stand-ins; refuse the rest."""

    _KNOWN = {  # noqa: RUF012
        "_reconstruct": lambda *args: _Array(),
        "ndarray": _Array,
        "dtype": _Type,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self._KNOWN:
            return self._KNOWN[name]
        raise ValueError(f"it asks to run {module}.{name}")
