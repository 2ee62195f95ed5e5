"""Where the bytes come from: sources that are split 90/5/5 in order, or TFDS'."""

import dataclasses
import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from sparse_flax.data import archives, prepared
from sparse_flax.data.split import carve
from sparse_flax.errors import UserError

NAMES = ("stdlib", *archives.ARCHIVES, "bytes")


@dataclasses.dataclass(frozen=True)
class Splits:
    """What is trained, validated and tested on: three streams of bytes, or of images.

    Attributes:
      name: the data set's name, as data.name has it.
      source: the path or description of where the data were found.
      train: uint8 [N] of a stream, or [N, T] of N images; read-only, mapped from disk
        where possible. Of one stream of bytes it is the first 90%.
      validation: the same; of one stream of bytes the next 5%.
      test: the same; of one stream of bytes the last 5%.
      fingerprint: hex digest of the three splits and their lengths, nothing else: a
        file that was moved keeps it, a file that was changed does not.
      notice: empty, or a sentence that the user must see.
      published: of a benchmark of images, how many its splits have when all are there.
    """

    name: str
    source: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    fingerprint: str
    notice: str = ""
    published: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def amount(self, split: str) -> str:
        """Say how much there is: '5,000 bytes', '9,968 of 10,000 images'."""
        part = getattr(self, split)
        if part.ndim == 1:
            return f"{part.size:,} bytes"
        whole = self.published.get(split, len(part))
        of = f" of {whole:,}" if whole != len(part) else ""
        return f"{len(part):,}{of} images"


_COMPRESSED = {
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\x00": "xz",
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
}

# Neither tests nor generated tables read like the rest of the library.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3")
)
_STDLIB_SKIPPED_FILES = (
    "pydoc_data/topics.py",
    "_sysconfigdata_*.py",
    "encodings/cp*.py",
    "encodings/mac_*.py",
    "encodings/iso8859*.py",
    "encodings/koi8*.py",
    "encodings/hp_*.py",
    "encodings/kz*.py",
    "encodings/palmos.py",
    "encodings/ptcp*.py",
    "encodings/tis_*.py",
)

_CHUNK = 1 << 20
_SHOWN = 2_000_000_000  # bytes that take so long to digest that progress is shown


def load(name: str, path: str = "", folder: str = "data") -> Splits:
    """Load a data set by name.

    Args:
      name: 'stdlib', the Python standard library's own source, which every machine has;
        'enwik8' or 'text8', the benchmarks of 100,000,000 bytes, taken from `path`,
        else from `folder`, else downloaded into `folder`; 'bytes', the file at `path`
        or every file of the folder at `path` that is not hidden, in order of their
        paths, one after the other. A file that is itself compressed is refused; put it
        into a folder to model its bytes all the same; 'tfds:NAME', a set of bytes or
        texts that tensorflow-datasets has prepared, as `prepared.read_bytes` reads it.
      path: a file or folder; 'stdlib' takes none; of 'tfds:NAME' the folder that TFDS
        has its sets in, where it is not TFDS' default.
      folder: where downloads are looked for and put.

    Raises:
      UserError: the name is unknown, or the data cannot be had, or is too small.
    """
    try:
        if name in archives.ARCHIVES:
            return _load_archive(name, path, folder)
        if name == "stdlib":
            return _load_stdlib(path)
        if name == "bytes":
            return _load_bytes(path)
        if name.startswith(prepared.PREFIX):
            pieces = prepared.read_bytes(name.removeprefix(prepared.PREFIX), path)
            three = (pieces.train, pieces.validation, pieces.test)
            return splits(name, pieces.source, three, pieces.notice)
    except OSError as error:
        raise UserError(
            f"{error.filename or path or folder} cannot be read "
            f"({error.strerror or error}); change its permissions or give another "
            "with --config.data.path=PATH"
        ) from error
    raise UserError(
        f"data.name={name!r} is not a data set; use {', '.join(NAMES)}, or tfds:NAME"
    )


def _split(name: str, source: str, data: np.ndarray, notice: str = "") -> Splits:
    """Split uint8 [N] into 90/5/5, as views."""
    if data.size < 40:
        raise UserError(
            f"{source} holds {data.size} bytes, and its splits of 90, 5 and 5 percent "
            "need at least 2 bytes each; give at least 40 bytes"
        )
    # Keep the mapping but drop the memmap subclass, which is slow to slice.
    parts, _ = carve(data.view(np.ndarray))
    return splits(name, source, list(parts.values()), notice)


def splits(
    name: str,
    source: str,
    parts: Sequence[np.ndarray],
    notice: str = "",
    published: Mapping[str, int] | None = None,
) -> Splits:
    """Make train, validation and test, in this order, read-only, and digest them.

    Each is uint8 [N], or [N, T] of images; the rest is as `Splits` has it.

    Raises UserError if one of them is shorter than 2 bytes.
    """
    if min(part.size for part in parts) < 2:
        sizes = ", ".join(f"{part.size:,}" for part in parts)
        raise UserError(
            f"{source} has {sizes} bytes to train, validate and test on, and 2 of each "
            "are needed; give more data"
        )
    digest = hashlib.blake2b(digest_size=16)
    size = sum(part.size for part in parts)
    progress = archives.Progress(f"checking {source}", size, sys.stderr)
    for part in parts:
        part.flags.writeable = False
        digest.update(part.size.to_bytes(8, "little"))
        flat = part.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            digest.update(flat[start : start + _CHUNK])
            if size > _SHOWN:
                progress.advance(min(_CHUNK, flat.size - start))
    if size > _SHOWN:
        progress.finish()
    train, validation, test = parts
    known = digest.hexdigest()
    return Splits(name, source, train, validation, test, known, notice, published or {})


def _compression(path: Path) -> str:
    """Name what a file is compressed with, by its first bytes; '' if nothing."""
    with path.open("rb") as file:
        head = file.read(16)
    kinds = (kind for magic, kind in _COMPRESSED.items() if head.startswith(magic))
    return next(kinds, "")


def _read(path: Path) -> np.ndarray:
    """Map a file as uint8 [N], refusing a compressed one."""
    if kind := _compression(path):
        raise UserError(
            f"{path} is compressed ({kind}); unpack it and give the unpacked file "
            "with --config.data.path=FILE"
        )
    if path.stat().st_size == 0:  # An empty file cannot be mapped.
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def existing(path: str) -> Path:
    """Return a data.path, or raise the UserError that there is nothing there."""
    found = Path(os.path.expanduser(path))
    if found.is_file() or found.is_dir():
        return found
    what = "is neither a file nor a folder" if found.exists() else "does not exist"
    raise UserError(
        f"data.path={path} {what} (looked from {Path.cwd()}); give the path of an "
        "existing file or folder"
    )


def _load_bytes(path: str) -> Splits:
    if not path:
        raise UserError(
            "data.path='' is empty but data.name='bytes' needs to know what to read; "
            "pass --config.data.path=FILE_OR_FOLDER"
        )
    root = existing(path)
    if root.is_file():
        return _split("bytes", str(root), _read(root))
    files = files_under(root)
    return _split("bytes", f"{root} ({len(files)} files)", _concatenate(files))


def _load_stdlib(path: str) -> Splits:
    if path:
        raise UserError(
            f"data.path={path} is set but data.name='stdlib' reads Python's own "
            "source; use data.name='bytes' to read that path"
        )
    root = Path(sysconfig.get_path("stdlib"))
    named = {
        file.relative_to(root).as_posix(): file
        for file in (
            files_under(root, _STDLIB_SKIPPED_FOLDERS) if root.is_dir() else ()
        )
    }
    chosen = [
        name
        for name in named
        if name.endswith(".py")
        and not any(fnmatch(name, skipped) for skipped in _STDLIB_SKIPPED_FILES)
    ]
    if not chosen:
        raise UserError(
            f"{root} holds no source of the standard library (some Pythons ship it as "
            "a zip); use --config.data.name=bytes --config.data.path=FILE_OR_FOLDER"
        )
    # Shuffled, so that the held-out files are of the same kind as the others, but by
    # name, so that the order is the same on every machine.
    chosen.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    data = _concatenate(named[name] for name in chosen)
    version = platform.python_version()
    source = f"standard library of Python {version}, {root} ({len(chosen)} files)"
    return _split("stdlib", source, data)


def files_under(root: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    """Return every file under root that is not hidden, by relative path."""

    def fail(error: OSError) -> None:
        raise error

    files, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        # Links are followed, but each real folder is read once: links may be circular.
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name for name in folders if name[0] != "." and name not in skipped
        )
        files += [Path(folder, name) for name in names if name[0] != "."]
    # A dangling link, a pipe or a socket is no file.
    return sorted(
        (file for file in files if file.is_file()),
        key=lambda file: file.relative_to(root).as_posix(),
    )


def _concatenate(files: Iterable[Path]) -> np.ndarray:
    joined = bytearray()
    for file in files:
        joined += file.read_bytes()
    return np.frombuffer(joined, np.uint8)


def _load_archive(name: str, path: str, folder: str) -> Splits:
    if path:
        root = existing(path)
        file = root if root.is_file() else archives.find(name, root)
        if file is None:
            warning = (
                f"WARNING: {root} is a folder without {name} or {name}.zip in it, so "
                "all its files are read, and scores are not comparable with published "
                "ones"
            )
            return dataclasses.replace(_load_bytes(path), notice=warning)
    else:
        root = Path(os.path.expanduser(folder))
        file = archives.find(name, root) or archives.download(name, root)
    zipped = _compression(file) == "zip"
    data = archives.read_zip(name, file) if zipped else _read(file)
    wrong = archives.difference(name, data)
    notice = wrong and (
        f"WARNING: {file} is NOT {name}: it has {wrong}, is split 90/5/5 by size, and "
        "its scores are not comparable with published ones"
    )
    return _split(name, str(file), data, notice)
