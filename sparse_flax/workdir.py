"""The working directory of a run: what lies where, and that it is ours.

config.json        the configuration and the identity of the data
metrics.jsonl      one row a line
eval.jsonl         what --mode=eval found, one row a line
loss.png           the curve
checkpoints/       one folder a step
damaged/           checkpoints that were set aside, never deleted
sample.txt         what training sampled at its end, each behind its prompt
generated.txt      the same of --mode=sample; generated.png of images, and
generated-1.wav    and so on of audio
tensorboard/       event files
profile/           what --profile traced
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from sparse_flax import __version__, processes
from sparse_flax import config as config_lib
from sparse_flax.data.bytes import Splits
from sparse_flax.errors import UserError

RUN, MODEL = "sparse_flax run", "sparse_flax model"  # formats of a config.json
NAMED_BY = {RUN: "--workdir", MODEL: "--model in --mode=sample"}
TOKEN = "seen-by-all"  # lies there for a moment at the start of several processes
SEEN_WITHIN = 10  # seconds


class RunFolder:
    """The folder of a run, for a process that does not train in it."""

    def __init__(self, path: Path | str):
        """Find the run.

        Raises:
          UserError: there is none.
        """
        self.path = _local(path)
        if self.saved() is None:
            raise UserError(
                f"--workdir={path} holds no run (no config.json); name the folder of "
                "one, or train first"
            )

    checkpoints = property(lambda self: self.path / "checkpoints")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    evaluations = property(lambda self: self.path / "eval.jsonl")
    curve = property(lambda self: self.path / "loss.png")
    sample = property(lambda self: self.path / "sample.txt")
    tensorboard = property(lambda self: self.path / "tensorboard")
    profile = property(lambda self: self.path / "profile")

    def agree(self, config: ConfigDict, splits: Splits) -> list[str]:
        """Check that this configuration may go on with the run.

        Returns a line for each option that changed.

        Raises:
          UserError: it changes parameter shapes or the order of the data.
        """
        saved = self.saved()
        if saved is None:
            return []
        before = saved["data"]
        lines = config_lib.changes(saved["config"], config)
        if before["fingerprint"] != splits.fingerprint:
            raise UserError(
                f"the data are {splits.source} ({_describe(identity(splits))}), but "
                f"the run in this working directory has read {before['source']} "
                f"({_describe(before)}); give it the same bytes, or another --workdir"
            )
        if before["source"] != splits.source:
            lines.append(f"data: {before['source']} -> {splits.source}, same bytes")
        return lines

    def saved(self) -> Any:
        """Return what `WorkDir.save_config` wrote; None if nothing yet."""
        return read_record(self.path / "config.json", RUN, {"data", "config"})


class WorkDir(RunFolder):
    """A folder that belongs to one run, and to one job at a time.

    Of several processes the first holds the lock and writes; all others see its files.
    """

    def __init__(self, path: Path | str):
        """Make or enter the folder.

        Raises:
          UserError: it cannot be written to, holds something else, is in use, or is
            another folder on another host.
        """
        self.path = _local(path)
        self._lock: IO[str] | None = None
        try:
            with processes.first_before_the_rest():
                if processes.is_first():
                    self._enter(path)
            self._find_on_every_host(path)
        except UserError:
            self.close()
            raise

    def _enter(self, path: Path | str) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            entries = {entry.name for entry in self.path.iterdir()}
            entries -= {
                "lock",
                "config.json.new",
                TOKEN,
            }  # what a start may leave behind
            if entries and "config.json" not in entries:
                raise UserError(
                    f"--workdir={path} holds {len(entries)} entries, such as "
                    f"{min(entries)!r}, and no config.json of a run; name an empty or "
                    "a new folder"
                )
            self.saved()
            self._lock = open(self.path / "lock", "a")  # noqa: SIM115 (held for life)
        except OSError as error:
            raise UserError(
                f"--workdir={path} cannot be written to ({error.strerror}); name a "
                "folder that you may write to"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--workdir={path} is in use by another process; wait for it to end, "
                "or name another folder"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _find_on_every_host(self, path: Path | str) -> None:
        """Raise UserError on all hosts if one does not see what the first writes."""
        if processes.count() == 1:
            return
        file = self.path / TOKEN
        token = secrets.token_hex(16)
        if processes.is_first():
            file.write_text(token)
        host, token = processes.from_first([socket.gethostname(), token])
        there = _shows(file, token)
        answers = processes.gather([socket.gethostname(), there])
        if processes.is_first():
            file.unlink(missing_ok=True)
        if blind := [name for name, there in answers if not there]:
            raise UserError(
                f"--workdir={path} on {blind[0]} is not the folder that {host} writes "
                "to, and each host writes its part of a checkpoint; name a folder on "
                "a file system that all hosts share"
            )

    def close(self) -> None:
        """Let another job in."""
        if self._lock:
            self._lock.close()

    def save_config(self, config: ConfigDict, splits: Splits) -> None:
        """Write down what the next run has to agree with."""
        if not processes.is_first():
            return
        record = {
            "format": RUN,
            "version": __version__,
            "data": identity(splits),
            "config": config.to_dict(),
        }
        write_atomically(
            self.path / "config.json", json.dumps(record, indent=2).encode() + b"\n"
        )


def _shows(file: Path, content: str) -> bool:
    """Whether a file has this content, or soon: network file systems take a while."""
    until = time.monotonic() + SEEN_WITHIN
    while True:
        try:
            if file.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def identity(splits: Splits) -> dict[str, Any]:
    """Return what is kept of the data, to recognise them by."""
    return {
        "source": splits.source,
        "fingerprint": splits.fingerprint,
        "bytes": splits.train.size + splits.validation.size + splits.test.size,
    }


def read_record(path: Path, format: str, keys: set[str]) -> dict[str, Any] | None:
    """Return what a config.json of a format holds; None if there is no such file.

    Raises UserError if it is something else.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        dicts = all(isinstance(record[key], dict) for key in keys & {"config", "data"})
        if record["format"] == format and keys <= record.keys() and dicts:
            return record
        other = NAMED_BY.get(record["format"], "")
    except (ValueError, KeyError, TypeError):
        other = ""
    if other and NAMED_BY[format] != other:
        raise UserError(
            f"{path.parent} holds a {record['format']}, which {other} names, and a "
            f"{format} is wanted here, which {NAMED_BY[format]} names"
        )
    raise UserError(
        f"{path} is not the configuration of a {format}, or damaged; name the folder "
        "of one, or to write to an empty or a new folder"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}; the checkpoints "
            "are untouched; put that right and run the same command again"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file such that a kill at any moment leaves the old or the new one.

    Raises UserError if the system refuses; the old one is left then.
    """
    beside = path.with_name(path.name + ".new")
    with writing(path):
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def _local(path: Path | str) -> Path:
    if "://" in str(path):
        raise UserError(
            f"--workdir={path} is not on a file system; name a local or mounted folder"
        )
    return Path(path).expanduser().absolute()


def _describe(data: dict[str, Any]) -> str:
    return f"{data['bytes']:,} bytes, fingerprint {data['fingerprint'][:12]}"
