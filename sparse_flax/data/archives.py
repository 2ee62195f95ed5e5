"""Benchmark files that live in a zip on the web: found, downloaded, checked."""

import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from sparse_flax.errors import UserError


@dataclass(frozen=True)
class Archive:
    """One file inside one zip."""

    urls: tuple[str, ...]  # tried in order
    zip_sha256: str
    size: int  # of the file inside, in bytes
    algorithm: str  # of `digest`: whichever the file's publisher gives
    digest: str  # of the file inside


# Plain http is safe as a second try because the checksum decides.
ARCHIVES = {
    "enwik8": Archive(
        urls=(
            "https://mattmahoney.net/dc/enwik8.zip",
            "http://mattmahoney.net/dc/enwik8.zip",
        ),
        zip_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        size=100_000_000,
        algorithm="sha256",
        digest="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    ),
    "text8": Archive(
        urls=(
            "https://mattmahoney.net/dc/text8.zip",
            "http://mattmahoney.net/dc/text8.zip",
        ),
        zip_sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        size=100_000_000,
        algorithm="md5",
        digest="3bea1919949baf155f99411df5fada7e",
    ),
}

_CHUNK = 1 << 20
_TIMEOUT = 20.0  # seconds without a byte from the server


def find(name: str, folder: Path) -> Path | None:
    """Return where the file lies in a folder, itself or as a zip, or None."""
    for candidate in (name, f"{name}.zip", f"{name}/{name}"):
        if os.path.isfile(folder / candidate):
            return folder / candidate
    return None


def difference(name: str, data: np.ndarray) -> str:
    """Say how uint8 [N] differs from the genuine file; '' if it does not."""
    archive = ARCHIVES[name]
    if data.size != archive.size:
        return f"{data.size:,} bytes instead of {archive.size:,}"
    digest = hashlib.new(archive.algorithm, usedforsecurity=False)
    for start in range(0, data.size, _CHUNK):
        digest.update(data[start : start + _CHUNK])
    if digest.hexdigest() != archive.digest:
        return f"{archive.algorithm} {digest.hexdigest()} instead of {archive.digest}"
    return ""


def read_zip(name: str, path: Path) -> np.ndarray:
    """Return the file inside a zip as uint8 [N], in memory.

    Raises:
      UserError: the zip is damaged, or the file is not in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if PurePosixPath(member).name == name:
                    return np.frombuffer(archive.read(member), np.uint8)
            members = archive.namelist()
    # A member with a password is a RuntimeError, one with a bad stream a zlib.error.
    except Exception as error:
        raise UserError(
            f"{path} is a zip that cannot be unpacked ({error}); download it again "
            f"from {ARCHIVES[name].urls[0]}"
        ) from error
    raise UserError(
        f"{path} is a zip without a member called {name} (it has "
        f"{', '.join(members[:3]) or 'none'}); give the one from "
        f"{ARCHIVES[name].urls[0]}"
    )


def download(name: str, folder: Path) -> Path:
    """Download, check and unpack into folder/name, which appears whole or not at all.

    Raises:
      UserError: no server answers, the checksum is wrong, or folder is not writable.
    """
    archive = ARCHIVES[name]
    by_hand = (
        f"download {archive.urls[0]} on another machine, unzip it and pass "
        "--config.data.path=FILE"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In `folder`, so that the move at the end is within one file system; with a
        # name of its own, so that two processes do not write into the same file.
        scratch = tempfile.TemporaryDirectory(
            dir=folder, prefix=f".{name}-", suffix=".part", ignore_cleanup_errors=True
        )
    except OSError as error:
        raise UserError(
            f"data.folder={folder} cannot be written to ({error.strerror or error}); "
            f"pass --config.data.folder=DIR with one that can, or {by_hand}"
        ) from error
    with scratch as temporary:
        zip_path = Path(temporary, f"{name}.zip")
        failures = []
        for url in archive.urls:
            try:
                digest = _fetch(url, zip_path)
                break
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                failures.append(f"{url}: {reason}")
        else:
            raise UserError(
                f"{name} is not in {folder} and cannot be downloaded "
                f"({', '.join(failures)}); {by_hand}"
            )
        if digest != archive.zip_sha256:
            raise UserError(
                f"{url} gave a file with sha256 {digest} instead of "
                f"{archive.zip_sha256}, which was thrown away; try again or {by_hand}"
            )
        data = read_zip(name, zip_path)
        wrong = difference(name, data)
        if wrong:
            raise UserError(f"{name} from {url} has {wrong}; try again or {by_hand}")
        try:
            data.tofile(Path(temporary, name))
            os.replace(Path(temporary, name), folder / name)
        except OSError as error:
            raise UserError(
                f"{folder / name} of {data.size:,} bytes cannot be written "
                f"({error.strerror or error}); free some space or pass "
                "--config.data.folder=DIR with another folder"
            ) from error
    return folder / name


def _fetch(url: str, path: Path) -> str:
    """Write what url gives to path, and return its sha256 in hex."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        total = int(response.headers.get("Content-Length") or 0)
        progress = Progress(url, total, sys.stderr)
        with path.open("wb") as file:
            while chunk := response.read(_CHUNK // 8):
                file.write(chunk)
                digest.update(chunk)
                progress.advance(len(chunk))
            progress.finish()
    if progress.done < total:
        raise OSError(f"the connection ended at byte {progress.done} of {total}")
    return digest.hexdigest()


class Progress:
    """One line on a terminal, redrawn; elsewhere one line for every tenth."""

    def __init__(self, label: str, total: int, stream: IO[str]):
        self.done = 0.0  # bytes
        self._label, self._total, self._stream = label, total, stream
        self._redraws = stream.isatty()
        self._start = self._last_time = time.monotonic()
        self._last_done = 0.0

    def advance(self, count: float) -> None:
        """Add bytes that are done, and draw the line when it is due."""
        self.done += count
        now = time.monotonic()
        if self._redraws:
            due = now - self._last_time > 0.2
        else:
            due = self.done - self._last_done >= (self._total or 100_000_000) / 10
        if due:
            self._last_time, self._last_done = now, self.done
            self._draw("\r" if self._redraws else "\n")

    def finish(self) -> None:
        """Draw the last line, unless it is there."""
        if self._redraws or self.done != self._last_done:
            self._draw("\n")

    def _draw(self, end: str) -> None:
        rate = self.done / max(time.monotonic() - self._start, 1e-6)
        line = f"{self._label} {self.done / 1e6:.1f} MB"
        if self._total:
            seconds = max(self._total - self.done, 0) / max(rate, 1.0)
            line += f" of {self._total / 1e6:.1f}, {self.done / self._total:.0%}"
            line += f", {rate / 1e6:.1f} MB/s, {seconds:.0f} s left"
        else:
            line += f", {rate / 1e6:.1f} MB/s"
        if self._redraws:  # A shorter line has to cover the longer one before it.
            line = line.ljust(79)
        print(line, end=end, file=self._stream, flush=True)
