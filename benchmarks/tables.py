"""Write the README's tables from the benchmarks' JSON files and from the code.

    python benchmarks/tables.py            # rewrites README.md between its markers
    python benchmarks/tables.py --check    # changes nothing; exit status 1 if it would

A table named `attention` stands between `<!-- table attention -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package, also where it is not installed

from sparse_flax.attention import support_table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def attention_table(result: dict) -> str:
    """A line a case and pattern: forward / forward and backward of each way."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    calls = list(dict.fromkeys((row["case"], row["pattern"]) for row in rows))
    found = {(r["case"], r["pattern"], r["implementation"]): r for r in rows}
    lines = [["case", "pattern", *names], ["---"] * (2 + len(names))]
    for case, pattern in calls:
        cells = [_times(found.get((case, pattern, name))) for name in names]
        lines.append([case, f"`{pattern}`", *cells])
    processes = result["processes"]
    medians = f"medians of {processes} processes" if processes > 1 else "one process"
    note = f"bfloat16, milliseconds forward / forward and backward, {medians}."
    lines = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*lines, "", f"{note} {_on(result)}"])


def train_step_table(result: dict) -> str:
    """A line a model, pattern and setting."""
    head = "model, pattern, batch, dropout, remat, unroll, tokens/s, ms (5 % to 95 %)"
    head = [*head.split(", "), "MFU", "GB"]
    lines = [head, ["---"] * len(head)]
    for row in result["rows"]:
        line = [row["model"], f"`{row['pattern']}`", str(row["batch_size"])]
        line += [f"{row['dropout']:g}", row["remat"], str(row["unroll"])]
        low, high = row["step_ms_spread"]
        line += [
            f"{row['tokens_per_s']:,.0f}",
            f"{row['step_ms']:.1f} ({low:.1f} to {high:.1f})",
            f"{row['mfu']:.1%}",
            f"{row['memory_gb']:.1f}",
        ]
        lines.append(line)
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", _on(result)])


def sampling_table(result: dict) -> str:
    """A line a model, pattern and number of rows."""
    head = "model, pattern, at once, bytes/s, ms a byte (share of memory bandwidth)"
    head = [*head.split(", "), "seconds in all"]
    lines = [head, ["---"] * len(head)]
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
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", _on(result)])


def _on(result: dict) -> str:
    versions = result["versions"]
    if not isinstance(versions, str):
        versions = ", ".join(f"{name} {number}" for name, number in versions.items())
    command = f": `{result['command']}`" if "command" in result else ""
    return f"On {result['hardware']} ({versions}){command}."


def _times(row: dict | None) -> str:
    if row is None:
        return ""
    if row["fwd_ms"] is None:
        return row["note"]
    return f"{row['fwd_ms']:.3g} / {row['fwdbwd_ms']:.3g}"


def tables() -> dict[str, str]:
    """Every table that there are results for, and that of the code."""
    made = {"support": support_table()}
    for name, table in (
        ("attention", attention_table),
        ("train_step", train_step_table),
        ("sampling", sampling_table),
    ):
        path = RESULTS / f"{name}.json"
        if path.exists():
            made[name] = table(json.loads(path.read_text()))
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """Put each table between its markers."""

    def one(match: re.Match) -> str:
        name = match[1]
        if name not in made:
            sys.exit(
                f"README.md has a table {name!r}, which is none of {', '.join(made)}; "
                "run its benchmark first"
            )
        return f"<!-- table {name} -->\n{made[name]}\n<!-- end -->"

    pattern = r"<!-- table (\w+) -->\n.*?<!-- end -->"
    return re.sub(pattern, one, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = fill(old, tables())
    if options.check:
        sys.exit("README.md is behind; run benchmarks/tables.py" if new != old else 0)
    path.write_text(new)


if __name__ == "__main__":
    main()
