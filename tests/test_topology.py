"""Dry runs for TPUs that are not here."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_dry_run import configuration

from benchmarks import topologies
from sparse_flax import dry_run, program, topology
from sparse_flax.errors import UserError

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2", "v5e:axb", "H200"])
def test_what_is_no_topology_is_refused(name):
    with pytest.raises(UserError, match="try --topology=v5e:4x4"):
        topology.describe(name)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]==0\."):
        dry_run.run(configuration(), topology_name="v5e:4x4")


def test_the_mesh_is_as_large_as_the_topology():
    config = configuration(mesh__data=4)
    topology.check_mesh(config, "v5e:2x2", 4)
    with pytest.raises(UserError, match=r"has 16 .* is 4; try --config.mesh.data=16 "):
        topology.check_mesh(config, "v5e:4x4", 16)


PROGRAM = """
HloModule a_step

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = (f32[4]{0}, bf16[8]{0}) all-reduce(%y, %z)
}

%limit (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
}

ENTRY %main (x: f32[2,3]) -> f32[] {
  %splash.3 = f32[8]{0} custom-call(%d), custom_call_target="tpu_custom_call", x={
}}, metadata={}
  %a = f32[2,3]{1,0} all-reduce(%x), channel_id=1
  %w = (s32[], f32[4]) while(%t), condition=%limit, body=%body
  %c = (bf16[2,8]{1,0:T(8,128)}, bf16[16,8]{1,0}) all-gather-start(%p)
  %d = bf16[16,8]{1,0} all-gather-done(%c)
  %e = f32[] add(%f, %all-reduce.3)
}
"""


def test_collectives_and_kernels_are_read_from_a_program():
    assert program.collectives(PROGRAM) == {
        "all-reduce": (1 + 3, 24 + 3 * (16 + 16)),
        "all-gather": (1, 256),
    }
    assert program.kernels(PROGRAM) == {"splash": 1}


@needs_compiler
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("name", "chips"), [("v5e:1x1", 1), ("v5e:4x4", 16)])
def test_a_train_step_is_compiled_for_chips_that_are_not_here(name, chips):
    lines = []
    config = configuration(
        model__context=256,
        model__layers=1,
        model__width=64,
        model__heads=1,
        model__patterns="Local(128)",
        mesh__data=chips,
        train__batch_size=chips,
        eval__batch_size=chips,
    )
    assert dry_run.run(config, say=lines.append, topology_name=name)
    text = "\n".join(lines)
    assert "  runs         tpu: " in text
    assert "splash_mha_fwd" in text and "splash_mha_dkv" in text
    assert ("all-reduce" in text) == (chips > 1)
    assert any(line.startswith("it fits the TPU v5e: ") for line in lines)
    assert "an estimate for" not in text


RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "topologies.json"


COLAB = ["enwik8:colab", "cifar10:colab", "music:colab"]


@pytest.mark.parametrize("name", COLAB)
def test_the_presets_for_one_chip_fit_it_by_the_table(name):
    rows = json.loads(RESULT.read_text())["rows"]
    (row,) = (r for r in rows if (r["config"], r["topology"]) == (name, "v5e:1x1"))
    assert row["fits"] and row["bytes"] < row["usable_bytes"]
    assert {"splash_mha_fwd_residuals", "splash_mha_dq_no_residuals"} <= {
        *row["kernels"]
    }


@needs_compiler
@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("enwik8:colab", "v5e:1x1"),
        ("cifar10:colab", "v5e:1x1"),
        ("music:colab", "v5e:4x4"),
    ],
)
def test_the_table_of_topologies_says_what_the_compiler_says(name, where):
    made = topologies.row(name, where)
    rows = json.loads(RESULT.read_text())["rows"]
    (said,) = (r for r in rows if (r["config"], r["topology"]) == (name, where))
    assert made["fits"] and said["fits"]
    assert any("splash" in kernel for kernel in made["kernels"])
    # Other versions of the compiler place things a little differently.
    assert made["bytes"] == pytest.approx(said["bytes"], rel=0.1)
