"""The benchmarks' own code, on problems that a CPU does in seconds."""

import argparse
import json
import shlex
import sys
import time

import numpy as np
import pytest

from benchmarks import (
    attention,
    attention_cases,
    figures,
    processes,
    sampling,
    scaling,
    table2,
    tables,
    train_step,
)
from sparse_flax import attention as public
from sparse_flax.attention import Columns, Dense, Local, Pattern


def test_attention_rows_go_on_and_make_a_table(monkeypatch, tmp_path, capsys):
    tiny = {"enwik8": ((2, 64, 2, 8, 8), [Local(8)])}
    monkeypatch.setattr(attention_cases, "CASES", tiny)
    monkeypatch.setattr(attention_cases, "CROSSOVER_T", (16,))
    monkeypatch.setattr(attention_cases, "CROSSOVER_TOKENS", 32)
    options = argparse.Namespace(sections=["cases"], cases=["enwik8"], cache=tmp_path)
    options.implementations = attention_cases.WAYS
    out = tmp_path / "attention.json"

    def run(number, left=100):
        options.number, options.deadline = number, time.time() + left
        options.record = processes.record_path(out, number)
        status = attention.one_process(options)
        return status, processes.Record(options.record), capsys.readouterr().out

    status, record, text = run(0, left=-1)
    assert status == processes.OUT_OF_TIME and not record.rows
    status, record, text = run(0)
    assert status == 0 and "1/1 | cases enwik8 Local(window=8) gathered" in text
    (row,) = record.rows.values()
    assert 0 < row["fwd_ms"] and 0 < row["fwdbwd_ms"] and 1e-4 < row["error"] < 1e-2
    # What is measured is kept, and the next process takes the executables over.
    assert run(0)[1].rows == record.rows

    def attend(*args):
        raise AssertionError("traced again")

    monkeypatch.setattr(attention.programs, "attend", attend)
    status, second, text = run(1)
    assert status == 0 and second.rows.keys() == record.rows.keys()
    options.sections = ["crossover"]
    assert run(1)[2] == ""  # is measured by the first alone

    options.implementations = ["hopper"]
    assert run(2)[2] == ""

    old = {**row, "implementation": "hopper", "command": "python a", "processes": 2}
    before = {**record.about, "rows": [row, old], "growth": 1}
    result = attention.merge(before, [record, second], "python it")
    kept, merged = result["rows"]
    assert kept == old and merged["command"] == "python it"
    assert tables.attention_table(result).endswith(": `python a; python it`.")
    before["versions"] = "others"
    result = attention.merge(before, [record, second], "python it")
    assert result["rows"] == [merged]
    assert merged["error"] == row["error"] and merged["processes"] == 2
    assert result["growth"] == 1
    table = tables.attention_table(result)
    assert f"| enwik8 | `Local(window=8)` | {merged['fwd_ms']:.3g} / " in table
    assert "Medians of 2 processes." in table


KEYS = ["fine", "dies", "hangs", "late", "last"]
CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from benchmarks.processes import Record, OUT_OF_TIME
record = Record(Path(sys.argv[1]), {"versions": 1})
for key in sys.argv[4:]:
    if key not in record.rows:
        record.begin(key, {"case": key})
        if key == "dies": sys.exit(3)
        if key == "hangs": time.sleep(60)
        if key == "late" and not Path(sys.argv[2]).exists():
            Path(sys.argv[2]).touch()
            sys.exit(OUT_OF_TIME)
        record.add(key, {"case": key, "fwd_ms": 1.0, "fwdbwd_ms": 2.0})
"""


def test_processes_survive_a_row_that_dies_hangs_or_is_cut(tmp_path, capsys):
    out, mark = tmp_path / "it.json", tmp_path / "mark"

    def command(number, record):
        root = str(attention.ROOT)
        return [sys.executable, "-c", CHILD, str(record), str(mark), root, *KEYS]

    records, missing = processes.measure_all(command, out, 2, 2.0)
    assert missing == "out of time" and len(records) == 1
    with pytest.raises(SystemExit):
        processes.finish(out, {}, missing, 2)
    assert processes.record_path(out, 0).exists()
    records, missing = processes.measure_all(command, out, 1, 2.0)
    (record,) = records
    assert not missing and list(record.rows) == KEYS
    assert record.rows["dies"] == {"case": "dies", "note": "failed"}
    assert record.rows["hangs"] == {"case": "hangs", "note": "too slow"}
    processes.finish(out, {"rows": 1}, missing, 2)
    assert json.loads(out.read_text()) == {"rows": 1}
    assert not processes.record_path(out, 0).exists()


def test_records_of_other_versions_are_left(tmp_path):
    processes.Record(tmp_path / "it", {"versions": 1}).add("a", {"fwd_ms": 1.0})
    assert list(processes.Record(tmp_path / "it", {"versions": 1}).rows) == ["a"]
    assert not processes.Record(tmp_path / "it", {"versions": 2}).rows


def test_a_result_names_no_place_of_its_machine(monkeypatch):
    words = "benchmarks/it.py --out /tmp/it.json --cases 'a b' --minutes 9"
    monkeypatch.setattr(sys, "argv", shlex.split(words))
    assert processes.command_line() == "python benchmarks/it.py --cases 'a b'"


def test_medians_over_processes():
    rows = [{"case": "a", "fwd_ms": x, "fwdbwd_ms": 2 * x} for x in (3.0, 1.0, 2.0)]
    rows[0]["error"] = 0.5  # the first alone looks
    failed = {"case": "a", "note": "failed"}
    (row,) = processes.combine([{"k": row} for row in [*rows, failed]])
    assert row == {
        "case": "a",
        "fwd_ms": 2.0,
        "fwdbwd_ms": 4.0,
        "error": 0.5,
        "processes": 3,
        "spread": {"fwd_ms": [1.0, 3.0], "fwdbwd_ms": [2.0, 6.0]},
    }
    (row,) = processes.combine([{"k": failed}])
    assert row["note"] == "failed" and row["fwd_ms"] is None


def test_what_a_gpu_is_asked_for():
    def todo(*sections, cases=("enwik8",)):
        return attention_cases.todo(sections, cases, "NVIDIA H200")

    names = [task.implementation for task in todo("cases")]
    assert {"gathered", attention_cases.CUDNN} <= set(names)
    assert "reference" not in names
    first = names.index("gathered")
    assert set(names[first:]) == {"gathered"}  # last, since XLA tunes it for long
    # cuDNN takes no values wider than its keys, and a million tokens take seconds.
    for case in ("cifar10_half", "long"):
        assert Dense() not in [t.pattern for t in todo("cases", cases=[case])]
    for section in ("growth", "crossover"):
        tasks = todo(section)
        assert len({task.key for task in tasks}) == len(tasks)
        assert all(task.section == section for task in tasks)
    sides = {t.shape[1]: t.pattern.stride for t in todo("growth") if "S" in t.key}
    assert sides[4096] == 64 and sides[2**20] == 1024


def rows_of(pattern, T, fwd_ms, fwdbwd_ms, batch=1):
    return {
        "case": f"T={T}",
        "shape_BTHKV": [batch, T, 8, 64, 64],
        "pattern": pattern,
        "implementation": "hopper",
        "fwd_ms": fwd_ms,
        "fwdbwd_ms": fwdbwd_ms,
        "memory_gb": 1.25,
        "processes": 3,
    }


def test_growth_table_and_figure():
    rows = [
        rows_of("Strided(stride=64)", 4096, 8.0, 16.0, batch=4),
        rows_of("Dense()", 4096, 3.0, 9.0),
        rows_of("Strided(stride=128)", 16384, 16.0, 16.0),
    ]
    result = {"hardware": "it", "versions": {"jax": "9"}, "rows": rows}
    table = tables.growth_table(result)
    assert "| 4,096 | `Strided(stride=64)` | hopper | 4 | 2 / 4 |  | 1.2 | 3 / 9 |" in (
        table
    )
    assert "| hopper | 1 | 16 / 16 | 1.50 / 1.00 | 1.2 |  |" in table
    assert "over all 1.50 / 1.00. Medians of 3" in table
    (axes,) = figures.growth(result).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [
        [4.0, 16.0],
        [2.0, 16.0],
        [9.0],
        [3.0],
    ]


def test_the_figure_of_patterns_has_all_of_them():
    named = [getattr(public, name) for name in public.__all__]
    kinds = {x for x in named if isinstance(x, type) and issubclass(x, Pattern)}
    assert {type(p) for p in figures.PATTERNS.values()} == kinds - {Pattern}
    panels = dict(zip(figures.PATTERNS, figures.patterns(16).axes, strict=True))
    assert panels["Local(8)"].get_xlabel() == "74%, in two 99%"
    shown = np.asarray(panels["Columns(8)"].images[0].get_array())
    np.testing.assert_array_equal(shown == 3, Columns(8).mask(16))
    assert not (shown == 2).any()


def test_crossover_is_the_first_t_from_which_on_it_is_faster():
    rows = []
    for T, ours in ((256, 0.5), (512, 2.0), (1024, 0.5), (2048, 0.4)):
        rows += [rows_of("Dense()", T, 1.0, 1.0)]
        rows += [rows_of(f"Local(window={T})", T, ours, 2.0)]
    result = {"hardware": "it", "versions": "jax 9", "rows": rows}
    table = tables.crossover_table(result)
    assert "| `Local` | 2 / 0.5 | 0.5 / 0.5 | 2 / 0.5 | 2.5 / 0.5 | 1024 / none |" in (
        table
    )


def test_peers_stand_beside_ours():
    ours = rows_of("Strided(stride=128)", 1, 0.3, 1.0) | {"case": "enwik8"}
    dense = rows_of("Dense()", 1, 3.0, 10.0) | {"implementation": "dense cuDNN"}
    ours |= {"error": 2.5e-3, "cudnn_error": 2.6e-3}
    flex = {**ours, "implementation": "torch B", "fwd_ms": 0.8, "fwdbwd_ms": 2.5}
    slow = {**flex, "implementation": "torch A", "fwdbwd_ms": 3.0}
    about = {"hardware": "it", "versions": {"jax": "9"}}
    result = about | {"rows": [ours, dense | {"case": "enwik8"}]}
    table = tables.attention_table(result, about | {"rows": [slow, flex]})
    assert (
        "| `Strided(stride=128)` | 0.3 / 1 | 3 / 10 | 0.8 / 2.5 | 2.5e-03 (2.6e-03) |"
    ) in table
    assert "PyTorch is the fastest of A, B. Medians of 3 processes." in table


def test_train_step_table():
    row = {"model": "enwik8", "pattern": "Strided(128)", "batch_size": 8}
    row |= {"context": 12288, "dropout": 0.4, "remat": "none", "tokens_per_s": 123456.7}
    row |= {"step_ms": 98.76, "step_ms_spread": [97.0, 99.04], "unroll": 3}
    row |= {"mfu": 0.5, "memory_gb": 12.34}
    result = {"hardware": "it", "versions": {"jax": "9"}, "rows": [row]}
    assert (
        "| enwik8 | `Strided(128)` | 8 x 12,288 | 0.4 | none | 3 | 123,457 "
        "| 98.8 (97.0 to 99.0) | 50.0% | 12.3 |"
    ) in tables.train_step_table(result)


def test_sampling_rows_and_table(monkeypatch):
    config = sampling.model_config("enwik8", "Fixed(128, 32)", quick=True)
    # The byte at 300 sees 45 of its block and 32 of each block before; keys and values
    # of one layer are 16 wide each.
    assert sampling.cache_bytes(config, 300) == (45 + 2 * 32) * 32 * 2
    monkeypatch.setattr(sampling, "BYTES", 2)
    row = sampling.window("enwik8", config, 1, "NVIDIA H200")
    assert row["asked"] == [42, 1000] and {"42", "1000"} <= row["ms_at"].keys()
    assert row["bytes_per_s"] > 0 and 0 < row["bandwidth_at"]["42"] < 1
    row |= {"ms_at": {"42": 0.5, "1000": 0.6}, "bandwidth_at": {"42": 0.1, "1000": 0}}
    whole = {"model": "cifar10", "pattern": "Local(96)", "batch_size": 64}
    whole |= {"context": 3072, "bytes_per_s": 19660.8, "seconds": 10.0}
    result = {"hardware": "it", "versions": {"jax": "9"}, "command": "c"}
    table = tables.sampling_table(result | {"rows": [row, whole]})
    assert "| 0.50 (10%) at 42, 0.60 (0%) at 1,000 |" in table
    assert "| cifar10 | `Local(96)` | 64 | 19,661 |  | 10.0 |" in table


def test_cases_of_train_step_and_rows_beside_earlier_ones(tmp_path):
    args = argparse.Namespace(models=["enwik8", "cifar10"], patterns=[])
    assert {case[0] for case in train_step.cases_of(args)} == {"enwik8", "cifar10"}
    args.patterns = ["Strided(96)", "Local(64)"]
    first, *others = train_step.cases_of(args)
    assert first == ("cifar10", 32, "Strided(96)", 1)
    # With batch and unroll of their models' first.
    assert set(others) == {
        ("cifar10", 32, "Local(64)", 1),
        ("enwik8", 8, "Local(64)", 30),
    }
    out, about = tmp_path / "it.json", {"hardware": "H200", "versions": {"jax": "9"}}
    row = dict.fromkeys(train_step.KEY, 0)
    for values in ({"dropout": 0.4}, {}, {"tokens_per_s": 2.0}):
        train_step.add({**about, **row, **values}, out)
    assert json.loads(out.read_text()) == {
        **about,
        "rows": [{**row, "dropout": 0.4}, {**row, "tokens_per_s": 2.0}],
    }
    train_step.add({**about, "hardware": "H100", **row}, out)
    assert json.loads(out.read_text())["rows"] == [row]


def test_scaling_over_all_devices_half_of_them_and_so_on():
    assert scaling.halves(8) == [8, 4, 2] and scaling.halves(2) == [2]
    assert scaling.halves(6) == [6, 3]


@pytest.mark.slow
def test_table2_trains_every_cell_once(monkeypatch, tmp_path, capsys):
    text = np.random.default_rng(0).integers(97, 101, 40_000).astype(np.uint8)
    (tmp_path / "text").write_bytes(text.tobytes())
    out, workdir = tmp_path / "table2.json", tmp_path / "runs"
    monkeypatch.setattr(table2, "TRIAL_STEPS", 2)
    fewer = {name: table2.PATTERNS["books"][name] for name in ("dense", "fixed")}
    monkeypatch.setitem(table2.PATTERNS, "books", fewer)
    call = ["table2.py", "--books", str(tmp_path / "text"), "--out", str(out)]
    call += ["--workdir", str(workdir), "--sizes", "scaled", "--seeds", "1"]
    call += ["--seconds", "1", "--minutes", "9"]
    call += ["--try", "model.layers=1", "model.width=16", "model.feed_forward=32"]
    call += ["model.context=512", "train.batch_size=2", "eval.max_windows=2"]
    call += ["model.dtype=float32", "optim.warmup_steps=1"]
    monkeypatch.setattr(sys, "argv", call)
    table2.main()
    result = json.loads(out.read_text())
    dense, *sparse = result["rows"]
    kinds = [(row["pattern"], row["budget"]) for row in result["rows"]]
    assert kinds == [
        ("dense", "both"),
        ("fixed", "steps"),
        ("fixed", "time"),
    ]
    assert sparse[0]["steps"] == dense["steps"]
    assert (workdir / "books-scaled-dense-0-0.0005-1-both.log").exists()
    assert all(0 < row["test"] <= 8.1 for row in result["rows"])
    assert "| books, scaled | 1 | 0.0005 | fixed |" in tables.table2_table(result)
    # Finished cells are skipped, and what does not fit is not begun.
    capsys.readouterr()
    table2.main()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", [*call, "--seeds", "2", "--minutes", "0.1"])
    with pytest.raises(SystemExit) as ended:
        table2.main()
    assert ended.value.code == processes.OUT_OF_TIME
    assert json.loads(out.read_text()) == result
    # Cells of other hardware are not mixed with these.
    elsewhere = {**result, "hardware": "NVIDIA H200"}
    out.write_text(json.dumps(elsewhere))
    monkeypatch.setattr(sys, "argv", [*call, "--seeds", "2"])
    with pytest.raises(SystemExit, match="has cells with hardware NVIDIA H200, and"):
        table2.main()
    assert json.loads(out.read_text()) == elsewhere


def test_table2_of_several_seeds():
    row = {"data": "cifar10", "size": "full", "limit_s": 420, "pattern": "dense"}
    row |= {"budget": "both", "learning_rate": 1e-3}
    rows = [
        row | {"seed": i, "test": test, "steps": steps}
        for i, (test, steps) in enumerate([(3.1, 1300), (3.3, 1234), (3.2, 1000)])
    ]
    table = tables.table2_table({"hardware": "it", "versions": {}, "rows": rows})
    scores = "3.200 (3.100 to 3.300, 3 seeds)"
    line = (
        f"| cifar10, full | 420 | 0.001 | dense | 2.82 | {scores} | {scores} | 1,234 |"
    )
    assert line in table


def test_tables_go_between_their_markers():
    text = "a\n<!-- table one -->\nold\n<!-- end -->\nb\n"
    filled = tables.fill(text, {"one": "new"})
    assert filled == text.replace("old", "new") == tables.fill(filled, {"one": "new"})
    with pytest.raises(SystemExit, match="'one', which is none of two"):
        tables.fill(text, {"two": "new"})
    assert tables.fill("no table", tables.tables()) == "no table"
