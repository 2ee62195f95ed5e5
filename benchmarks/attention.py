"""Time every implementation of attention, and dense cuDNN, on this machine's GPU.

    python benchmarks/attention.py                      # everything
    python benchmarks/attention.py --sections growth crossover
    python benchmarks/attention.py --cases enwik8 audio --processes 1 --out /tmp/a.json

Sections: `cases`, the paper's shapes; `growth`, time against T at stride sqrt(T);
`crossover`, where each pattern begins to beat dense cuDNN. A run that is cut off, or
stops at --minutes, goes on when the same command is given again.

Writes {hardware, versions, rows} for the cases, and the same for the other sections
under their names. A row: {case, shape_BTHKV, pattern, implementation, fwd_ms,
fwdbwd_ms, spread, processes, memory_gb, peak_gb, error, cudnn_error, command}, or a
`note` in place of numbers. Milliseconds, for the whole batch, are medians over
processes of the median of several samples; `spread` is the lowest and highest of the
processes. `memory_gb` is XLA's figure for forward and backward: arguments, results,
work space; `peak_gb` what the device had in use, where no row before it had more.
`error` is the worst relative 2-norm among the output and the gradients of q, k and v,
against float32, in the last sequence's last head (heads, where they differ);
`cudnn_error` that of dense cuDNN attention on the same inputs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package, also where it is not installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import attention_programs as programs  # noqa: E402
from benchmarks import processes  # noqa: E402
from benchmarks.attention_cases import CASES, SECTIONS, WAYS, Task, todo  # noqa: E402
from sparse_flax.attention import Dense  # noqa: E402
from sparse_flax.progress import duration  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "attention.json"
ROW_SECONDS, COMPILE_SECONDS = 60, 240


def main() -> None:
    options = parse()
    if options.record:
        # For what executables cannot be handed over as they are.
        jax.config.update("jax_compilation_cache_dir", str(options.cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        status = one_process(options)
        sys.stdout.flush()
        os._exit(status)  # threads may still be compiling what nobody waits for
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        deadline = time.time() + 60 * options.minutes

        def command(number: int, record: Path) -> list[str]:
            line = [sys.executable, __file__, "--sections", *options.sections]
            line += ["--cases", *options.cases, "--number", str(number)]
            line += ["--implementations", *options.implementations]
            line += ["--record", str(record), "--cache", str(cache)]
            return [*line, "--deadline", str(deadline)]

        records, missing = processes.measure_all(
            command, options.out, options.processes, ROW_SECONDS
        )
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result = merge(result, records, processes.command_line())
    processes.finish(options.out, result, missing, options.processes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--implementations", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--processes", type=int, default=processes.PROCESSES)
    parser.add_argument("--minutes", type=float, default=60, help="stop by then")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--cache", type=Path, help="a folder for executables to keep")
    for name, kind in (("--number", int), ("--record", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # of one process
    return parser.parse_args()


def merge(
    result: dict[str, Any], records: list[processes.Record], command: str
) -> dict[str, Any]:
    """Put the rows of the records into a result, in place of what it had of them.

    Other rows of a section stay if they are of the same hardware and versions.
    """
    result = dict(result)
    for section in SECTIONS:
        runs = [
            {key: row for key, row in record.rows.items() if row["section"] == section}
            for record in records
        ]
        rows = processes.combine(runs)
        if not rows:
            continue
        for row in rows:
            del row["section"]
            row["command"] = command
        old = result if section == "cases" else result.get(section, {})
        if all(old.get(name) == value for name, value in records[0].about.items()):
            known = {identity(row) for row in rows}
            kept = [row for row in old["rows"] if identity(row) not in known]
            rows = sorted(kept + rows, key=identity) if kept else rows
        made = {**records[0].about, "rows": rows}
        result |= made if section == "cases" else {section: made}
    return result


def identity(row: dict[str, Any]) -> tuple:
    """Return what tells rows of one section apart, in the order of their tables."""
    case, way = row["case"], row["implementation"]
    number = [*CASES].index(case) if case in CASES else row["shape_BTHKV"][1]
    return number, row["pattern"], WAYS.index(way) if way in WAYS else len(WAYS), way


def one_process(options: argparse.Namespace) -> int:
    """Measure the rows that the record lacks, and return the exit status."""
    record = processes.Record(options.record, about())
    kind = jax.devices()[0].device_kind
    tasks = todo(options.sections, options.cases, kind, options.implementations)
    tasks = [
        task
        for task in tasks
        if task.key not in record.rows
        # The crossover is read off powers of two: one process will do.
        and (options.number == 0 or task.section != "crossover")
    ]
    compiler = programs.Compiler(options.cache)
    # The others are timed before the tuning begins.
    for _, group in itertools.groupby(tasks, key=lambda task: task.tuned):
        if not rows_of(list(group), compiler, record, options):
            return processes.OUT_OF_TIME
    return 0


def about() -> dict[str, Any]:
    """What the numbers depend on."""
    names = ("jax", "jaxlib", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    return {
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": processes.versions(*names),
    }


def rows_of(
    tasks: list[Task],
    compiler: programs.Compiler,
    record: processes.Record,
    options: argparse.Namespace,
) -> bool:
    """Compile what the tasks need, then measure each; whether there was time for all.

    Nothing else runs while a row is timed: all is compiled before.
    """
    with_errors = {
        task.key for task in tasks if options.number == 0 and task.section == "cases"
    }
    began = time.monotonic()
    started = [compiler.start(task, task.key in with_errors) for task in tasks]
    for number, (task, futures) in enumerate(zip(tasks, started, strict=True)):
        until = time.monotonic() + COMPILE_SECONDS
        record.begin(task.key, task.row())
        while concurrent.futures.wait(futures, timeout=5).not_done:
            if time.time() > options.deadline:
                return False
            record.begin(task.key, task.row())  # tells that this process is alive
            if time.monotonic() > until:
                note = f"compiling took over {COMPILE_SECONDS} s"
                record.add(task.key, task.row() | {"note": note})
                break
        line = f"compiled {number + 1}/{len(tasks)} | {task.key}"
        print(f"{line} | {duration(time.monotonic() - began)} so far", flush=True)
    tasks = [task for task in tasks if task.key not in record.rows]
    began, args, known = time.monotonic(), [], {}
    for number, task in enumerate(tasks):
        if time.time() > options.deadline:
            return False
        record.begin(task.key, task.row())
        if [x.shape for x in args] != [x.shape for x in programs.structs(task.shape)]:
            args.clear()  # before the next are made, so that both need not fit
            args += programs.inputs(task.shape)
        row = measure(task, compiler, args)
        if task.key in with_errors and row["fwdbwd_ms"]:
            row |= errors_of(task, compiler, args, known)
        record.add(task.key, row)
        each = (time.monotonic() - began) / (number + 1)
        print(
            f"{number + 1}/{len(tasks)} | {task.key} | {times(row)} | "
            f"error {row.get('error') or 0:.1e} | "
            f"eta {duration(each * (len(tasks) - number - 1))}",
            flush=True,
        )
    return True


def times(row: dict[str, Any]) -> str:
    """Write a row's times, or why it has none."""
    if row["fwdbwd_ms"] is None:
        return row["note"]
    return f"{row['fwd_ms']:.3f} / {row['fwdbwd_ms']:.3f} ms"


def measure(task: Task, compiler: programs.Compiler, args: list) -> dict[str, Any]:
    """One row without its error; where memory does not suffice it says so."""
    row = task.row() | dict.fromkeys(processes.TIMES)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    try:
        forward, both = compiler.forward(task).result(), compiler.both(task).result()
        row["memory_gb"] = need(both) / 1e9
        if limit and need(both) > limit:
            return row | {"note": f"needs {need(both) / 1e9:.0f} GB"}
        wait = jax.block_until_ready
        row["fwd_ms"] = processes.milliseconds(lambda: forward(*args[:3]), wait)
        before = in_use()
        row["fwdbwd_ms"] = processes.milliseconds(lambda: both(*args), wait)
        if in_use() > before:  # else an earlier row had more
            row["peak_gb"] = in_use() / 1e9
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise
        row |= dict.fromkeys(processes.TIMES) | {"note": "out of memory"}
    return row


def in_use() -> int:
    """Return the most bytes of the device that this process has had in use."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def need(compiled) -> int:
    """Return the bytes that a program's arguments, results and work space take."""
    sizes = compiled.memory_analysis()
    sizes = (
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.temp_size_in_bytes,
    )
    return sum(sizes)


def errors_of(
    task: Task, compiler: programs.Compiler, args: list, known: dict
) -> dict[str, float | None]:
    """The row's error and cuDNN's own; None where float32 would take too long."""
    row = {"error": None, "cudnn_error": None}
    if not compiler.has_exact(task):
        return row
    heads = task.pattern.head_period
    try:
        exact = compiler.exact(task.pattern, programs.part_shape(task)).result()
        exact = exact(*programs.part_of(args, heads, dtype=jnp.float32))
        got = programs.part_of(compiler.both(task).result()(*args), heads)
        row["error"] = programs.worst_error(got, exact)
        shape = programs.dense_shape(task)
        if shape and task.shape not in known:
            exact = compiler.exact(Dense(), shape).result()
            exact = exact(*programs.part_of(args, 1, shape[-1], jnp.float32))
            got = compiler.cudnn(shape).result()(*programs.part_of(args, 1, shape[-1]))
            known[task.shape] = programs.worst_error(got, exact)
        row["cudnn_error"] = known.get(task.shape)
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise
    return row


if __name__ == "__main__":
    main()
