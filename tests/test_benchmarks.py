"""The benchmarks' own code, on problems that a CPU does in seconds."""

import json

import pytest

from benchmarks import attention, sampling, tables
from sparse_flax.attention import Dense, Local


def test_attention_rows_and_table(monkeypatch, tmp_path, capsys):
    tiny = {"enwik8": ((1, 64, 2, 8, 8), [Local(8)])}
    monkeypatch.setattr(attention, "CASES", tiny)
    out = tmp_path / "rows.json"
    attention.one_process(["enwik8"], 1, str(out))
    assert "1/1 | enwik8 Local(window=8) gathered" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())
    assert 0 < row["fwd_ms"] and 0 < row["fwdbwd_ms"] and 1e-4 < row["error"] < 1e-2
    others = [{**row, "fwd_ms": 1.0}, {**row, "fwd_ms": 3.0}, {**row, "fwd_ms": 2.0}]
    rows = attention.combine([[x] for x in others])
    assert rows[0]["fwd_ms"] == 2.0
    result = {"hardware": "1 x it", "versions": {"jax": "9"}, "processes": 3}
    table = tables.attention_table(result | {"rows": rows})
    assert f"| enwik8 | `Local(window=8)` | 2 / {row['fwdbwd_ms']:.3g} |" in table
    assert table.endswith("medians of 3 processes. On 1 x it (jax 9).")


def test_a_gpu_is_asked_for_every_implementation_and_dense_cudnn():
    named = {name for _, _, name in attention.todo(["enwik8"], "NVIDIA H200")}
    assert {"gathered", attention.CUDNN} <= named and "reference" not in named
    assert attention.CUDNN not in {name for *_, name in attention.todo(["long"], "cpu")}
    # cuDNN takes no values wider than its keys.
    half = attention.todo(["cifar10_half"], "NVIDIA H200")
    assert Dense() not in [pattern for _, pattern, _ in half]


def test_train_step_table():
    row = {"model": "enwik8", "pattern": "Strided(128)", "batch_size": 8}
    row |= {"dropout": 0.4, "remat": "none", "tokens_per_s": 123456.7}
    row |= {"step_ms": 98.76, "step_ms_spread": [97.0, 99.04], "unroll": 3}
    row |= {"mfu": 0.5, "memory_gb": 12.34}
    result = {"hardware": "it", "versions": {"jax": "9"}, "rows": [row]}
    assert (
        "| enwik8 | `Strided(128)` | 8 | 0.4 | none | 3 | 123,457 "
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


def test_tables_go_between_their_markers():
    text = "a\n<!-- table one -->\nold\n<!-- end -->\nb\n"
    filled = tables.fill(text, {"one": "new"})
    assert filled == text.replace("old", "new") == tables.fill(filled, {"one": "new"})
    with pytest.raises(SystemExit, match="'one', which is none of two"):
        tables.fill(text, {"two": "new"})
    assert tables.fill("no table", tables.tables()) == "no table"
