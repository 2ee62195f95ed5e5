"""Folders of pictures or recordings: their splits, and a cache of what was read.

What a folder holds is read once, into DATA_FOLDER/cache/KIND-KEY/, with a file for each
split and about.json, which says what was left out. The key is of the names, sizes and
times of the files, so that a folder that changed is read again. Any of it may be
deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparse_flax.data import archives
from sparse_flax.data import bytes as byte_data
from sparse_flax.data.split import ALIASES, PERCENTS, SPLITS
from sparse_flax.errors import UserError

HELD_OUT = {name for split in SPLITS[1:] for name in ALIASES[split]}
_FORMAT = 2  # of the cache: another number makes all of it again
_SHOWN = 20_000_000  # bytes that take so long to read that progress is shown


class BadFileError(Exception):
    """A file that is not what it seems; the message goes on from its name."""


class Store:
    """A cache that is being written, a file for each split."""

    def __init__(self, root: Path):
        self._files: dict[str, IO[bytes]] = {
            split: (root / split).open("wb") for split in SPLITS
        }

    def write(self, split: str, data: np.ndarray) -> None:
        """Append uint8 data of any shape to a split."""
        self._files[split].write(np.ascontiguousarray(data).data)

    @contextlib.contextmanager
    def undone_if_bad(self):
        """Take back what was written inside if that ends in a BadFileError."""
        ends = {split: file.tell() for split, file in self._files.items()}
        try:
            yield
        except BadFileError:
            for split, file in self._files.items():
                file.seek(ends[split])
                file.truncate()
            raise

    def close(self) -> None:
        """Write what is still in memory."""
        for file in self._files.values():
            file.close()


def find(root: Path, suffixes: Sequence[str], what: str) -> tuple[list[Path], int]:
    """Find the files of a folder that have one of the suffixes, and count the others.

    Args:
      root: a folder; hidden files in it are passed over.
      suffixes: as '.png'; the case does not matter.
      what: the files' plural, for sentences.

    Returns:
      The files, in the order of a hash of their names.

    Raises:
      UserError: there are none.
    """
    every = byte_data.files_under(root)
    found = [file for file in every if file.suffix.lower() in suffixes]
    if not found:
        raise UserError(
            f"{root} holds no {what} ({', '.join(suffixes)}); give another folder with "
            "--config.data.path=FOLDER"
        )
    return sorted(found, key=lambda f: _share(root, f)), len(every) - len(found)


def has_splits(root: Path) -> bool:
    """Whether a folder has a sub-folder train, which makes others splits, too."""
    return any(x.name.lower() == "train" and x.is_dir() for x in root.iterdir())


def files_by_split(root: Path, files: list[Path], what: str) -> dict[str, list[Path]]:
    """Divide what `find` has found.

    The splits are the sub-folders train, validation (or valid, val) and test where
    train is there, in capitals or not. What they lack, and everything where there are
    none, is drawn by the hash of the names, 90/5/5, so that a file stays in its split
    when others come.

    Raises:
      UserError: there are too few for three splits, or held-out ones without train.
    """
    parts = {"train": files}
    top = {file: file.relative_to(root).parts[0].lower() for file in files}
    if has_splits(root):
        parts = {
            split: [file for file in files if top[file] == name]
            for split, names in ALIASES.items()
            for name in names[::-1]
            if name in top.values()
        }
    elif held_out := HELD_OUT.intersection(top.values()):
        raise UserError(
            f"{root} has a sub-folder {min(held_out)} and none that is named train; "
            "name the one to train on train, or give the others other names"
        )
    missing = [split for split in SPLITS[1:] if not parts.get(split)]
    files = parts.get("train", [])
    if len(files) <= len(missing):
        raise UserError(
            f"{root} holds {len(files):,} {what} to train on, and "
            f"{1 + len(missing)} or more are needed; give a folder with more"
        )
    cuts = [percent / 100 for percent in PERCENTS][len(PERCENTS) - len(missing) :]
    last = len(files)
    for place in reversed(range(len(missing))):
        first = sum(_share(root, file) < cuts[place] for file in files)
        # At least one file each, the nearest to the cut.
        first = max(min(first, last - 1), place + 1)
        parts[missing[place]], last = files[first:last], first
    return parts | {"train": files[:last]}


def _share(root: Path, file: Path) -> float:
    """Return a number in [0, 1) that the name of a file decides."""
    name = file.relative_to(root).as_posix().encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


def read(
    root: Path,
    parts: dict[str, list[Path]],
    convert: Callable[[Path, str, Store], Sequence[str]],
    *,
    kind: str,
    options: Any,
    folder: str,
    bad_files: str,
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return what the files of each split hold, from the cache if it is there.

    Args:
      root: the folder that the files are in.
      parts: the files of each split.
      convert: writes one file's data into the store, for its split, and returns remarks
        on it, which are counted; raises BadFileError.
      kind: a name for the cache, also for sentences: 'images'.
      options: whatever else decides what `convert` writes, as JSON.
      folder: data.folder, where the cache is.
      bad_files: 'skip' or 'refuse' those that raise BadFileError.

    Returns:
      uint8 [N] of train, validation and test, mapped from disk, and a record:
      'left_out', pairs of a split and what is wrong with a file of it, 'remarks', how
      many files each is of, and 'file', where all of this is written.

    Raises:
      UserError: a bad file is refused, a split has no good one, or the cache cannot be
        written.
    """

    def write(store: Store) -> dict[str, Any]:
        left_out: list[list[str]] = []
        remarks: dict[str, int] = {}
        every = [(split, file) for split in parts for file in parts[split]]
        size = sum(file.stat().st_size for _, file in every)
        progress = archives.Progress(f"reading {root}", size, sys.stderr)
        shown = size > _SHOWN or len(every) > 5000
        for split, file in every:
            try:
                with store.undone_if_bad():
                    for remark in convert(file, split, store):
                        remarks[remark] = remarks.get(remark, 0) + 1
            except BadFileError as error:
                left_out.append([split, f"{file.relative_to(root)} {error}"])
                _refuse(left_out, bad_files)
            if shown:
                progress.advance(file.stat().st_size)
        if shown:
            progress.finish()
        return {"left_out": left_out, "remarks": remarks}

    listed = [
        [
            split,
            str(file.relative_to(root)),
            file.stat().st_size,
            file.stat().st_mtime_ns,
        ]
        for split in SPLITS
        for file in parts[split]
    ]
    arrays, about = cached(folder, kind, [listed, options], write)
    _refuse(about["left_out"], bad_files)
    for split, array in zip(SPLITS, arrays, strict=True):
        if not array.size:
            of_it = [said for part, said in about["left_out"] if part == split]
            of_all = [said for _, said in about["left_out"]]
            told = "; ".join((of_it or of_all)[:3])
            raise UserError(
                f"{root} has no {kind} for {split} that can be read"
                + (f" ({told}); give better files" if told else "; give more")
            )
    return arrays, about


def _refuse(left_out: list[list[str]], bad_files: str) -> None:
    if left_out and bad_files == "refuse":
        raise UserError(
            f"{left_out[0][1]}; put it right or take it away, or leave such files out "
            "with --config.data.bad_files=skip"
        )


def notice(about: dict[str, Any], kind: str, total: int, others: int) -> str:
    """Say what the record of `read` says, in a sentence; '' if all is well."""
    said = []
    if left := about["left_out"]:
        more = f"; all are named in {about['file']}" if len(left) > 5 else ""
        said.append(
            f"{len(left):,} of {total:,} files are left out: "
            + "; ".join(sentence for _, sentence in left[:5])
            + more
        )
    said += [f"{count:,} {kind} {remark}" for remark, count in about["remarks"].items()]
    if others:
        said.append(f"{others:,} other files in the folder are not read")
    return "; ".join(said)


def cached(
    folder: str, kind: str, key: Any, write: Callable[[Store], dict[str, Any]]
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Map three splits from the cache, after writing them if they are not there.

    Args:
      folder: data.folder.
      kind: begins the name of the cache.
      key: as JSON, all that decides what is written.
      write: writes it, and returns a record to keep.

    Returns:
      uint8 [N] of train, validation and test, and the record.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key]).encode("utf-8", "replace"))
    root = Path(folder).expanduser() / "cache" / f"{kind}-{digest.hexdigest()[:16]}"
    found = _open(root)
    if found:
        return found
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=root.parent, prefix=f".{kind}-", ignore_cleanup_errors=True
        ) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            store = Store(made)
            try:
                about = write(store)
            finally:
                store.close()
            sizes = {split: (made / split).stat().st_size for split in SPLITS}
            (made / "about.json").write_text(json.dumps(about | {"sizes": sizes}))
            # Another process may have been as fast, or left a damaged one there.
            if root.exists():
                os.replace(root, Path(scratch, "old"))
            os.replace(made, root)
    except OSError as error:
        raise UserError(
            f"data.folder={folder} cannot take the cache of {kind} in "
            f"{root} ({error.strerror or error}); free some space or pass "
            "--config.data.folder=DIR with a folder that can be written to"
        ) from error
    made_or_found = _open(root)
    assert made_or_found is not None
    return made_or_found


def _open(root: Path) -> tuple[list[np.ndarray], dict[str, Any]] | None:
    """Map a cache, or return None if it is not there or not whole."""
    try:
        about = json.loads((root / "about.json").read_text())
        sizes = [about["sizes"][split] for split in SPLITS]
        if sizes != [(root / split).stat().st_size for split in SPLITS]:
            return None
        arrays = [
            # An empty file cannot be mapped.
            np.memmap(root / split, np.uint8, mode="r").view(np.ndarray)
            if size
            else np.empty(0, np.uint8)
            for split, size in zip(SPLITS, sizes, strict=True)
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return arrays, about | {"file": str(root / "about.json")}
