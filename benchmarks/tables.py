"""Write tables from the benchmarks' JSON files and from the code.

    python benchmarks/tables.py            # README.md, RESULTS.md, between the markers
    python benchmarks/tables.py --check    # changes nothing; exit status 1 if it would

A table named `attention` stands between `<!-- table attention -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Sequence

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package, also where it is not installed

from sparse_flax.attention import hopper, support_table  # noqa: E402
from sparse_flax.devices import GIB  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FILES = ("README.md", "RESULTS.md")
DENSE, CUDNN, TORCH = "Dense()", "dense cuDNN", "PyTorch"


def attention_table(result: dict, peer: dict | None = None) -> str:
    """A line a case and pattern: forward / forward and backward of each way.

    Args:
      result: of attention.py.
      peer: of peers/torch_attention.py.
    """
    rows = [*result["rows"], *_fastest(peer["rows"] if peer else [])]
    found = {(r["case"], r["pattern"], r["implementation"]): r for r in rows}
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    names.sort(key=lambda name: (name in (CUDNN, TORCH), name == TORCH))
    lines = [["case", "pattern", *names, "error (cuDNN's)"]]
    for case, pattern in dict.fromkeys((r["case"], r["pattern"]) for r in rows):
        line = [case, f"`{pattern}`"]
        for name in names:  # dense cuDNN is the same whatever the pattern
            at = DENSE if name == CUDNN else pattern
            line.append(_times(found.get((case, at, name))))
        ours = [found[case, pattern, n] for n in names if (case, pattern, n) in found]
        lines.append([*line, _error(ours[0])])
    notes = [
        "bfloat16, milliseconds forward / forward and backward; errors are relative "
        "2-norms against float32, of the leftmost way. "
        f"{_measured(result)}"
    ]
    if peer:
        notes.append(
            f"{TORCH} is the fastest of {', '.join(_names(peer['rows']))}. "
            f"{_measured(peer)}"
        )
    return "\n".join([_markdown(lines), *(f"\n{note}" for note in notes)])


def growth_table(result: dict) -> str:
    """A line a T: time of a sequence, how it grew, memory; dense cuDNN beside it."""
    head = "T, pattern, runs, batch, ms a sequence, slope, GB, dense cuDNN"
    lines = [head.split(", ")]
    rows = [row for row in result["rows"] if row["pattern"] != DENSE]
    dense = {row["case"]: row for row in result["rows"] if row["pattern"] == DENSE}
    steps = [None, *rows]
    for before, row in zip(steps, rows, strict=False):
        B, T, *_ = row["shape_BTHKV"]
        line = [f"{T:,}", f"`{row['pattern']}`", row["implementation"], str(B)]
        line += [_times(row, B), slope(before, row) if before else ""]
        line.append(f"{row['memory_gb']:.1f}" if row.get("memory_gb") else "")
        other = dense.get(row["case"])
        line.append(_times(other, other["shape_BTHKV"][0]) if other else "")
        lines.append(line)
    note = (
        "Forward / forward and backward, 8 heads of 64, bfloat16, batches of as many "
        "tokens (dense: fewer), so that no row waits for launches. Slope: of "
        "log(ms a sequence) against log(T) since the line above"
    )
    if len(rows) > 1:
        note += f"; over all {slope(rows[0], rows[-1])}"
    return f"{_markdown(lines)}\n\n{note}. {_measured(result)}"


def slope(first: dict, last: dict) -> str:
    """Return both slopes of log(time of a sequence) against log(T), as text."""
    (B1, T1, *_), (B2, T2, *_) = first["shape_BTHKV"], last["shape_BTHKV"]
    slopes = []
    for name in ("fwd_ms", "fwdbwd_ms"):
        if not (first[name] and last[name]):
            return ""
        ratio = (last[name] / B2) / (first[name] / B1)
        slopes.append(f"{math.log(ratio) / math.log(T2 / T1):.2f}")
    return " / ".join(slopes)


def crossover_table(result: dict) -> str:
    """A line a pattern: how many times as fast as dense cuDNN at each T."""
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    dense = {row["case"]: row for row in result["rows"] if row["pattern"] == DENSE}
    kinds: dict[str, dict] = {}
    for row in result["rows"]:
        if row["pattern"] != DENSE:
            kinds.setdefault(row["pattern"].split("(")[0], {})[row["case"]] = row
    lines = [["pattern", *cases, "faster from T ="]]
    for kind, rows in kinds.items():
        line, first = [f"`{kind}`"], []
        for case in cases:
            ratios = _ratios(dense.get(case), rows.get(case))
            line.append(" / ".join(f"{ratio:.2g}" for ratio in ratios))
        for way in (0, 1):
            first.append(_faster_from(cases, dense, rows, way))
        lines.append([*line, " / ".join(first)])
    note = (
        "How many times as fast as dense cuDNN attention, forward / forward and "
        "backward: stride, window or block the power of two at or above sqrt(T), "
        "blocks at least 64, summaries a quarter of the block, 8 heads of 64, batches "
        "of as many tokens"
    )
    return f"{_markdown(lines)}\n\n{note}. {_measured(result)}"


def _ratios(dense: dict | None, row: dict | None) -> list[float]:
    if not (dense and row and dense["fwdbwd_ms"] and row["fwdbwd_ms"]):
        return []
    return [dense[name] / row[name] for name in ("fwd_ms", "fwdbwd_ms")]


def _faster_from(cases: list[str], dense: dict, rows: dict, way: int) -> str:
    """The first T from which on it is faster at every T that was measured."""
    found = "none"
    for case in reversed(cases):
        ratios = _ratios(dense.get(case), rows.get(case))
        if not ratios or ratios[way] <= 1:
            break
        found = case.removeprefix("T=")
    return found


def _fastest(rows: list[dict]) -> list[dict]:
    """The fastest peer of each case and pattern, forward and backward."""
    best: dict[tuple, dict] = {}
    for row in rows:
        if row["fwdbwd_ms"]:
            old = best.setdefault((row["case"], row["pattern"]), row)
            if row["fwdbwd_ms"] < old["fwdbwd_ms"]:
                best[row["case"], row["pattern"]] = row
    return [{**row, "implementation": TORCH} for row in best.values()]


def _names(rows: list[dict]) -> list[str]:
    return sorted({row["implementation"].removeprefix("torch ") for row in rows})


def _measured(result: dict) -> str:
    """Of how many processes the numbers are medians, on what, by which commands."""
    return f"{_medians(result['rows'])}. {_on(result, result['rows'])}"


def _medians(rows: list[dict]) -> str:
    """Of how many processes the numbers are medians."""
    counts = sorted({row["processes"] for row in rows if row["fwdbwd_ms"]})
    if counts in ([], [1]):
        return "One process"
    return f"Medians of {' to '.join(str(n) for n in counts)} processes"


def _error(row: dict) -> str:
    if not row.get("error"):
        return ""
    own = row.get("cudnn_error")
    return f"{row['error']:.1e}" + (f" ({own:.1e})" if own else "")


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def train_step_table(result: dict) -> str:
    """A line a model, pattern and setting."""
    head = "model, pattern, batch x tokens, dropout, remat, unroll, tokens/s"
    lines = [[*head.split(", "), "ms (5 % to 95 %)", "MFU", "GB"]]
    for row in result["rows"]:
        line = [row["model"], f"`{row['pattern']}`"]
        line += [f"{row['batch_size']} x {row['context']:,}"]
        line += [f"{row['dropout']:g}", row["remat"], str(row["unroll"])]
        low, high = row["step_ms_spread"]
        line += [
            f"{row['tokens_per_s']:,.0f}",
            f"{row['step_ms']:.1f} ({low:.1f} to {high:.1f})",
            f"{row['mfu']:.1%}",
            f"{row['memory_gb']:.1f}",
        ]
        lines.append(line)
    note = "Each row's command is in benchmarks/results/train_step.json."
    return f"{_markdown(lines)}\n\n{_on(result)} {note}"


def topologies_table(result: dict) -> str:
    """A line a config and topology that its train step was compiled for."""
    head = "config, TPU, batch x tokens, GiB a chip (state), of, TFLOPs a step and chip"
    lines = [[*head.split(", "), "collectives, GiB a step", "splash kernels"]]
    for row in result["rows"]:
        line = [f"`{row['config']}`", row["topology"]]
        line += [f"{row['batch_size']} x {row['context']:,}"]
        used = "does not fit"
        if row["bytes"] is not None:
            used = f"{row['bytes'] / GIB:.2f}" + ("" if row["fits"] else ", too much")
        line += [f"{used} ({row['state_bytes'] / GIB:.2f})"]
        line += [f"{row['usable_bytes'] / GIB:.1f}", f"{row['flops'] / 1e12:.2f}"]
        sent = [
            f"{calls:,} {name}, {size / GIB:.2f}"
            for name, (calls, size) in row["collectives"].items()
        ]
        splash = sum(n for name, n in row["kernels"].items() if "splash" in name)
        lines.append([*line, "; ".join(sent), str(splash)])
    versions = ", ".join(f"{name} {n}" for name, n in result["versions"].items())
    note = (
        "What the TPU's compiler says, without a TPU: none of these has run on one. "
        "Batches over all chips (mesh.data), with a row a chip where the config's own "
        "batch has fewer"
    )
    return f"{_markdown(lines)}\n\n{note} ({versions})."


def sampling_table(result: dict) -> str:
    """A line a model, pattern and number of rows."""
    head = "model, pattern, at once, bytes/s, ms a byte (share of memory bandwidth)"
    head = [*head.split(", "), "seconds in all"]
    lines = [head]
    for row in result["rows"]:
        at = [
            f"{row['ms_at'][str(p)]:.2f}"
            + (f" ({row['bandwidth_at'][str(p)]:.0%})" if row["bandwidth_at"] else "")
            + f" at {p:,}"
            for p in row.get("asked", [])
        ]
        seconds = row["batch_size"] * row["context"] / row["bytes_per_s"]
        line = [row["model"], f"`{row['pattern']}`", str(row["batch_size"])]
        lines.append(
            [*line, f"{row['bytes_per_s']:,.0f}", ", ".join(at), f"{seconds:.1f}"]
        )
    return f"{_markdown(lines)}\n\n{_on(result)}"


def context_bytes_table(result: dict) -> str:
    """A line a pattern: what a device receives, beside ring attention."""
    lines = [["pattern", "collectives", "MB", "ring attention / this"]]
    for row in result["rows"]:
        kinds = ", ".join(f"{n} {kind}" for kind, (n, _) in row["sent"].items())
        less = result["ring_bytes"] / row["bytes"] if row["bytes"] else 0
        lines.append(
            [
                f"`{row['pattern']}`",
                kinds or "none",
                f"{row['bytes'] / 1e6:,.1f}",
                f"{less:,.1f}" if less else "",
            ]
        )
    (B, T, H, K), n = result["shape_BTHK"], result["devices"]
    note = (
        f"One layer's attention, forward and backward, {B} x {T:,} tokens, {H} heads "
        f"of {K}, bfloat16, over {n} devices; MB a device. Ring attention moves "
        f"{result['ring_bytes'] / 1e6:,.0f} MB, by arithmetic, whatever the pattern."
    )
    return f"{_markdown(lines)}\n\n{note} {_on(result)}"


def scaling_table(result: dict) -> str:
    """A line a mesh, beside one device."""
    head = "model, batch x tokens, mesh, tokens/s, times one device, loss differs by"
    lines = [head.split(", ")]
    for row in result["rows"]:
        lines.append(
            [
                f"{row['model']}, `{row['pattern']}`",
                f"{row['batch_size']} x {row['context']:,}",
                row["mesh"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['times']:.2f}" if row["times"] else "",
                f"{row['loss_error']:.1e}" if row["times"] else "",
            ]
        )
    note = (
        "Medians of ten steps; the loss is that of the fourth step from one start on "
        "one batch (data, fsdp: each device has a copy of it, so there are more rows)."
    )
    return f"{_markdown(lines)}\n\n{note} {_on(result)}"


PAPER_TABLE2 = {
    ("books", "dense"): "1.00 (enwik8)",
    ("books", "fixed"): "0.99 (enwik8)",
    ("books", "strided"): "1.13 (enwik8)",
    ("cifar10", "dense"): "2.82",
    ("cifar10", "fixed"): "2.85",
    ("cifar10", "strided"): "2.80",
}


def table2_table(result: dict) -> str:
    """A line a model and pattern: test scores, the median over seeds."""
    names = "size", "data", "limit_s", "learning_rate", "pattern"
    cells: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        cells.setdefault(tuple(row[name] for name in names), []).append(row)
    head = "model, seconds, learning rate, pattern, paper, equal steps, equal time"
    lines = [[*head.split(", "), "steps in that time"]]
    for (size, data, limit, rate, pattern), rows in cells.items():
        steps, time = (
            [row for row in rows if row["budget"] in (budget, "both")]
            for budget in ("steps", "time")
        )
        reached = f"{statistics.median(r['steps'] for r in time):,.0f}" if time else ""
        lines.append(
            [
                f"{data}, {size}",
                f"{limit}",
                f"{rate:g}",
                pattern,
                PAPER_TABLE2[data, pattern],
                _over_seeds([row["test"] for row in steps]),
                _over_seeds([row["test"] for row in time]),
                reached,
            ]
        )
    return f"{_markdown(lines)}\n\n{_on(result)}"


def _over_seeds(scores: list[float]) -> str:
    if len(scores) < 2:
        return "".join(f"{score:.3f}" for score in scores)
    middle = statistics.median(scores)
    return f"{middle:.3f} ({min(scores):.3f} to {max(scores):.3f}, {len(scores)} seeds)"


def _on(result: dict, rows: Sequence[dict] = ()) -> str:
    """Where a result is from, and by which command, its own or those of the rows."""
    versions = result["versions"]
    if not isinstance(versions, str):
        versions = ", ".join(f"{name} {number}" for name, number in versions.items())
    commands = [each["command"] for each in (result, *rows) if "command" in each]
    command = f": `{'; '.join(dict.fromkeys(commands))}`" if commands else ""
    return f"On {result['hardware']} ({versions}){command}."


def _times(row: dict | None, batch: int = 1) -> str:
    if row is None:
        return ""
    if row["fwdbwd_ms"] is None:
        return row["note"]
    return f"{row['fwd_ms'] / batch:.3g} / {row['fwdbwd_ms'] / batch:.3g}"


def tables() -> dict[str, str]:
    """Every table that there are results for, and that of the code."""
    made = {"support": support_table()}
    if result := _result("attention"):
        if "rows" in result:
            made["attention"] = attention_table(result, _result("torch_attention"))
        if "growth" in result:
            made["growth"] = growth_table(result["growth"])
        if "crossover" in result:
            made["crossover"] = crossover_table(result["crossover"])
    if result := _result("train_step"):
        made["train_step"] = train_step_table(result)
    if result := _result("sampling"):
        made["sampling"] = sampling_table(result)
    if result := _result("topologies"):
        made["topologies"] = topologies_table(result)
    if result := _result("context_bytes"):
        made["context_bytes"] = context_bytes_table(result)
    if result := _result("scaling"):
        made["scaling"] = scaling_table(result)
    for name in ("table2", "table2_h100"):
        if result := _result(name):
            made[name] = table2_table(result)
    return made


def _result(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def fill(text: str, made: dict[str, str], file: str = FILES[0]) -> str:
    """Put each table between its markers."""

    def one(match: re.Match) -> str:
        name = match[1]
        if name not in made:
            sys.exit(
                f"{file} has a table {name!r}, which is none of {', '.join(made)}; "
                "run its benchmark first"
            )
        return f"<!-- table {name} -->\n{made[name]}\n<!-- end -->"

    pattern = r"<!-- table (\w+) -->\n.*?<!-- end -->"
    return re.sub(pattern, one, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite or check the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    if jax.__version_info__ < hopper.OLDEST_JAX:
        sys.exit("error: before jax 0.11 hopper supports nothing; the tables say more")
    made = tables()
    for name in FILES:
        old = (ROOT / name).read_text()
        new = fill(old, made, name)
        if not options.check:
            (ROOT / name).write_text(new)
        elif new != old:
            sys.exit(f"{name} is behind; run benchmarks/tables.py")


if __name__ == "__main__":
    main()
