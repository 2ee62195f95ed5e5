"""Rows measured by several processes, one after the other, that outlive a cut.

A process writes its record, a file beside the result, before and after every row. The
same command run again with the same versions on the same hardware goes on from the
records; they are removed once the result is whole. A row that takes too long, or at
which the process dies, is noted as such, and a fresh process goes on after it.
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROCESSES = 3
OUT_OF_TIME = 75  # the exit status that says: run the same command again
TOO_SLOW = "too slow"  # what stands for one of a process that was stopped
FAILURES = 3  # of one process, after which it is given up

TIMES = ("fwd_ms", "fwdbwd_ms")
SAMPLES = 5
SECONDS = 0.04  # a sample takes about so long, and makes at most CALLS calls
CALLS = 40
SLOW = 0.5  # a call of more seconds is timed once


class Record:
    """What one process has measured: rows by key, and the row that it is at."""

    def __init__(self, path: Path, about: dict[str, Any] | None = None) -> None:
        """Read the record at `path`; start anew if it is about something else."""
        self.path, self.about, self.rows, self.doing = path, about, {}, None
        if path.exists():
            old = json.loads(path.read_text())
            if about in (None, old["about"]):
                self.about, self.rows, self.doing = (
                    old[key] for key in ("about", "rows", "doing")
                )

    def begin(self, key: str, row: dict[str, Any]) -> None:
        """Say which row comes now, and what is known of it before it is measured."""
        self.doing = (key, row)
        self._write()

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[key], self.doing = row, None
        self._write()

    def _write(self) -> None:
        kept = {"about": self.about, "doing": self.doing, "rows": self.rows}
        write(self.path, kept)


def record_path(out: Path, number: int) -> Path:
    """Where the record of one process lies."""
    return out.with_name(f"{out.stem}.process{number}.json")


def measure_all(
    command: Callable[[int, Path], Sequence[str]],
    out: Path,
    processes: int,
    row_seconds: float,
) -> tuple[list[Record], str]:
    """Run the processes, each alone with the device.

    Args:
      command: (number of the process, path of its record) -> its command line. It
        exits with OUT_OF_TIME if it stopped between two rows for want of time.
      out: the result's path; records lie beside it.
      row_seconds: a process that writes nothing for so long is stopped.

    Returns:
      the records, and why they are not whole ('' if they are).
    """
    records = []
    for number in range(processes):
        print(f"process {number + 1} of {processes}", flush=True)
        path = record_path(out, number)
        line = command(number, path)
        failures = 0
        while status := _watch(line, path, row_seconds):
            record = Record(path)
            if status == OUT_OF_TIME:
                return [*records, record], "out of time"
            failures += 1
            if record.doing is None or failures == FAILURES:
                why = f"process {number + 1} ended with status {status}"
                return [*records, record], why
            key, row = record.doing
            note = status if status == TOO_SLOW else "failed"
            print(f"  {key}: {note}; going on after it", flush=True)
            record.add(key, {**row, "note": note})
        records.append(Record(path))
    return records, ""


def _watch(command: Sequence[str], path: Path, seconds: float) -> int | str:
    """Run until it ends, or has not touched `path` for so many seconds."""
    child = subprocess.Popen(command)
    seen, since = None, time.monotonic()
    try:
        while child.poll() is None:
            time.sleep(0.2)
            now = path.stat().st_mtime_ns if path.exists() else None
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > seconds:
                child.kill()
                child.wait()
                return TOO_SLOW
    finally:
        if child.poll() is None:
            child.terminate()
    return child.returncode


def combine(runs: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows in the first process's order, each time the median over processes.

    `spread` is the lowest and the highest of the processes' medians, `processes` how
    many measured the row. What only some processes look at is the first one's.
    """
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run):
        same = [run[key] for run in runs if key in run]
        row: dict[str, Any] = {}
        for other in same:
            row = {**other, **row}
        timed = [other for other in same if other.get("fwdbwd_ms") is not None]
        row |= {"processes": len(timed), "spread": {}}
        for name in TIMES:
            values = sorted(other[name] for other in timed)
            row[name] = rounded(statistics.median(values)) if values else None
            row["spread"][name] = [rounded(x) for x in (values[:1] + values[-1:])]
        if timed:
            row.pop("note", None)
        rows.append(row)
    return rows


def rounded(value: float) -> float:
    """Keep four digits."""
    return float(f"{value:.4g}")


def versions(*packages: str) -> dict[str, str]:
    """Python's version, and those of what is installed of the packages."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def jax_device() -> dict[str, Any]:
    """Return {hardware, versions} of the first device that JAX sees."""
    import jax  # late: the peers run where there is none

    device = jax.devices()[0]
    platform = device.client.platform_version.splitlines()[0]
    python = sys.version.split()[0]
    return {
        "hardware": device.device_kind,
        "versions": {"jax": jax.__version__, "platform": platform, "python": python},
    }


def command_line() -> str:
    """Return how this script was called, less where it writes and for how long."""
    words = list(sys.argv)
    for name in ("--out", "--cache", "--minutes"):
        while name in words:
            del words[words.index(name) : words.index(name) + 2]
    return f"python {shlex.join(words)}"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write what was measured as JSON; a cut leaves the old file whole."""
    # workdir.write_atomically imports JAX; the peers run where there is none.
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


def finish(out: Path, result: dict[str, Any], missing: str, processes: int) -> None:
    """Write the result; remove the records if nothing is missing, else exit."""
    write(out, result)
    print(f"wrote {out}")
    if missing:
        print(f"{missing}: the same command goes on from here")
        sys.exit(OUT_OF_TIME)
    for number in range(processes):
        record_path(out, number).unlink(missing_ok=True)


def milliseconds(
    call: Callable[[], Any], wait: Callable[[Any], Any], samples: int = SAMPLES
) -> float:
    """Return the median over samples of a call's time.

    A sample is many calls dispatched one after the other and waited for once, so that
    the cost of a launch stays out.
    """
    wait(call())
    began = time.perf_counter()
    wait(call())
    once = time.perf_counter() - began
    if once > SLOW:
        return once * 1e3
    calls = max(1, min(CALLS, round(SECONDS / once)))
    taken = []
    for _ in range(samples):
        began = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        taken.append((time.perf_counter() - began) / calls * 1e3)
    return statistics.median(taken)
