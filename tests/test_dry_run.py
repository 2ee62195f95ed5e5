"""What a dry run says of memory holds for real states, and for what it proposes."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sparse_flax import config as config_lib
from sparse_flax import dry_run, memory, optim, state
from sparse_flax.config_checks import finalize
from sparse_flax.devices import Budget
from sparse_flax.sharding import make_mesh

ROOT = Path(__file__).parents[1]


def configuration(**values):
    """A small model whose activations outweigh its state; group__name=value."""
    config = config_lib.defaults()
    small = {"context": 64, "layers": 4, "width": 16, "heads": 2, "remat": "none"}
    config.model.update(small | {"patterns": "Local(8)", "dtype": "float32"})
    config.train.batch_size = 4
    config.eval.sample_bytes = 0
    for name, value in values.items():
        group, _, option = name.partition("__")
        config[group][option] = value
    return finalize(config)[0]


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Remember what was compiled, because these tests ask for the same again."""
    patch = pytest.MonkeyPatch()
    for name in ("compile_step", "attention_bytes"):
        patch.setattr(memory, name, remember(getattr(memory, name)))
    yield
    patch.undo()


def remember(measure):
    known = {}

    def measured(config, where):
        groups = config.model, config.train, config.mesh
        key = "".join(group.to_json() for group in groups)
        known[key] = known[key] if key in known else measure(config, where)
        return known[key]

    return measured


def compiled(config):
    return memory.compile_step(config, jax.devices())


def real_bytes(tree):
    """What the first device really holds of a tree of arrays."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_state_takes_what_a_real_one_takes(sizes):
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    config = configuration(**axes)
    optimizer = optim.make_optimizer(config.optim)
    args = config_lib.model_config(config), optimizer, jax.random.key(0)
    with jax.set_mesh(make_mesh(*sizes)):
        real = state.create(*args)
    found = memory.state_bytes(config)
    assert found == {
        "parameters": real_bytes(real.model),
        "gradients": real_bytes(real.model),
        "optimizer": real_bytes(real.opt_state),
        "averaged weights": real_bytes(real.ema),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(real.model))
    if sizes == (1, 1, 1):
        assert found["parameters"] == 4 * count
        assert found["optimizer"] == 2 * 4 * count + 4  # two moments and a count
    else:
        # Matrices are on four devices each; vectors over D on every one.
        assert count < found["parameters"] < 2 * count


def test_a_step_needs_more_for_more_rows_and_less_on_more_devices():
    one, many = compiled(configuration()), compiled(configuration(train__batch_size=32))
    assert many.temporary > 2 * one.temporary
    assert many.total - many.temporary < 1.1 * (one.total - one.temporary)
    spread = compiled(configuration(train__batch_size=32, mesh__data=8))
    assert spread.temporary < many.temporary / 3
    held = memory.state_bytes(configuration())
    state_bytes = sum(held.values()) - held["gradients"]
    batch = 2 * 4 * 4 * 64  # inputs and targets
    # The dropout key, the metrics and padding are all that there is besides.
    assert 0 <= one.total - one.temporary - state_bytes - batch < 4096


def test_attention_needs_what_its_logits_take():
    dense = configuration(model__patterns="Dense()", model__attention="reference")
    logits = 4 * 4 * 2 * 64 * 64
    assert logits <= memory.attention_bytes(dense, jax.devices()[0]) < 8 * logits
    halves = configuration(
        model__patterns="Dense()", model__attention="reference", mesh__tensor=2
    )
    spread = memory.attention_bytes(halves, jax.devices()[0])
    assert logits / 2 <= spread < 4 * logits


def test_the_least_that_a_step_moves():
    config = configuration()
    held = sum(memory.state_bytes(config).values())
    qkvo = 4 * 4 * 4 * 64 * 16  # four of them in float32, B T D
    least = {"state": 2 * held, "attention": 3 * 4 * qkvo}
    assert memory.least_bytes_moved(config) == least
    assert memory.least_bytes_moved(configuration(train__accumulate=2)) == least


def test_what_one_device_has_of_a_layer():
    config = configuration(
        mesh__data=2, mesh__context=2, mesh__tensor=2, train__accumulate=2
    )
    assert [x.shape for x in memory.layer_shapes(config)] == [(1, 32, 1, 8)] * 3


def show(config, usable, highest=None):
    """The lines, and whether it fits a device of that many bytes."""
    lines = []
    budget = Budget("Toy", int(2 * (highest or usable)), usable, highest or usable)
    fits = dry_run.show_memory(config, jax.devices(), budget, lines.append)
    return lines, fits


def test_the_table_adds_up_and_says_what_it_was_compiled_for():
    lines, fits = show(configuration(), 2**30)
    rows = [re.match(r"  (\D+?) +([\d.]+) MiB", line) for line in lines]
    table = {row[1]: float(row[2]) for row in rows if row}
    assert list(table) == [
        "parameters",
        "gradients",
        "optimizer",
        "averaged weights",
        "activations",
        "attention",
        "total",
    ]
    assert math.isclose(sum(table.values()), 2 * table["total"], abs_tol=0.1)
    assert fits and lines[-1].startswith("it fits the Toy: ")
    assert any(
        "as compiled for cpu; an estimate for the Toy," in line for line in lines
    )


def proposed(line):
    """The configuration with the flags that a line proposes."""
    flags = dict(re.findall(r"--config\.([\w.]+)=(\S+)", line))
    kinds = {"model.remat": str}
    values = {name: kinds.get(name, int)(value) for name, value in flags.items()}
    changed = {name.replace(".", "__"): value for name, value in values.items()}
    return changed, configuration(**changed)


def assert_proposes(limit, **expected):
    lines, fits = show(configuration(), int(limit))
    assert not fits and "it does not fit the Toy" in lines
    assert lines[-1].startswith("what fits: --config.model.remat=full")
    flags, config = proposed(lines[-1])
    assert flags == {"model__remat": "full"} | expected
    assert compiled(config).total <= limit


def test_what_it_proposes_fits():
    start, full, parts = (
        compiled(configuration(**values)).total
        for values in (
            {},
            {"model__remat": "full"},
            {"model__remat": "full", "train__accumulate": 4},
        )
    )
    assert parts < full < start
    assert_proposes((full + start) / 2)
    assert_proposes(parts + 1, train__accumulate=4)


@pytest.mark.slow
def test_a_smaller_batch_is_proposed_last():
    parts = compiled(configuration(model__remat="full", train__accumulate=4)).total
    # Which needs no sum of gradients beside those of a micro-batch.
    one = compiled(configuration(model__remat="full", train__batch_size=1)).total
    assert one < parts
    assert_proposes((one + parts) / 2, train__batch_size=1)


def test_the_memory_that_jax_leaves_is_proposed_first():
    start = int(compiled(configuration()).total)
    lines, fits = show(configuration(), int(0.9 * start), highest=int(1.1 * start))
    assert not fits
    assert lines[-1].startswith("what fits: XLA_CLIENT_MEM_FRACTION=0.5 (then ")


def test_where_nothing_fits_it_says_what_is_left_to_do():
    config = configuration(model__remat="full", train__batch_size=1, model__width=64)
    needs, held = compiled(config).total, sum(memory.state_bytes(config).values())
    lines, _ = show(config, int(needs - held / 3))
    assert "even the smallest batch needs" in lines[-1]
    assert "--config.mesh.fsdp=2 divides" in lines[-1]
    lines, _ = show(config, int((needs - held) / 2))
    assert "a smaller model.context or model.width or a larger device" in lines[-1]


def test_of_a_mesh_too_large_for_this_process_it_says_what_it_knows():
    lines = []
    config = configuration(mesh__data=16, train__batch_size=16)
    assert dry_run.run(config, "T4", say=lines.append)
    assert any(line.startswith("  optimizer") for line in lines)
    assert not any(line.startswith(("  activations", "  total")) for line in lines)
    assert "are not known: the mesh has more devices than are here" in lines[-1]


def test_a_new_process_compiles_for_any_mesh_and_its_status_says_that_it_is_too_much():
    options = [
        "--config.model.patterns=Local(8)",
        "--config.model.layers=1",
        "--config.model.context=64",
        "--config.train.batch_size=16",
        "--config.mesh.data=4",
        "--config.mesh.fsdp=4",
    ]
    result = subprocess.run(
        [
            *[sys.executable, "-m", "sparse_flax.main", "--mode=dry_run"],
            *["--config=configs/quickstart.py", "--device=T4", *options],
        ],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "XLA_CLIENT_MEM_FRACTION": "1e-5"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (1, "")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("what fits: XLA_CLIENT_MEM_FRACTION=0.92 (then ")
