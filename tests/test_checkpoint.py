"""A checkpoint is restored bit for bit or not at all, whatever happens to the disk."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from sparse_flax import integrity
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.errors import UserError
from sparse_flax.integrity import fingerprint

ROOT = Path(__file__).parents[1]
FLIPS = int(os.environ.get("SPARSE_FLAX_FLIPS", "100"))
# A read that tensorstore gives up may still call into an event loop that is gone.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


class Layer(nnx.Module):
    def __init__(self, key):
        self.w_DF = nnx.Param(jax.random.normal(key, (16, 32)))
        self.scale_D = nnx.Param(jnp.ones((16,), jnp.bfloat16))


class Model(nnx.Module):
    def __init__(self, key):
        self.embed_VD = nnx.Param(jax.random.normal(key, (64, 16)))
        self.layers = jax.vmap(Layer)(jax.random.split(key, 4))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    model: Model
    opt_state: object
    ema: Model


def make_state(seed):
    model = Model(jax.random.key(seed))
    opt_state = jax.tree.map(lambda x: x + seed, optax.adam(1e-3).init(model))
    ema = jax.tree.map(lambda x: x * 0.5, model)
    return State(jnp.int32(seed), model, opt_state, ema)


def small_state(seed):
    """All kinds of leaves in about 300 kB, some of it compressible."""
    key = jax.random.key(seed)
    return {
        "step": jnp.int32(seed),
        "w": jax.random.normal(key, (200, 300)),
        "half": jax.random.normal(key, (77,), jnp.bfloat16),
        "zeros": jnp.zeros((100, 100)),
        "mask": jax.random.bernoulli(key, 0.5, (33,)),
        "list": [jnp.arange(5, dtype=jnp.uint8), (jnp.float32(seed),)],
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_all(directory, states, **options):
    checkpointer = Checkpointer(directory, **options)
    for step, state in states.items():
        checkpointer.save(step, state)
    checkpointer.close()


def listing(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def flip_one_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("make", [make_state, small_state])
def test_round_trip_is_exact(tmp_path, make):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    for step in (1, 20, 300):
        checkpointer.save(step, make(step))
    checkpointer.wait()
    assert checkpointer.steps() == [20, 300]
    step, state = checkpointer.restore_latest(abstract(make(0)))
    assert step == 300
    assert_same(state, make(300))
    assert fingerprint(state) == fingerprint(make(300))
    checkpointer.close()


def test_each_step_is_announced_once(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert checkpointer.poll() == []
    checkpointer.save(1, small_state(1))
    checkpointer.save(2, small_state(2))
    announced = checkpointer.poll() + checkpointer.wait()
    assert announced == [1, 2]
    assert checkpointer.wait() == checkpointer.poll() == []
    checkpointer.save(3, small_state(3))
    end = time.monotonic() + 30
    while not (announced := checkpointer.poll()) and time.monotonic() < end:
        time.sleep(0.01)
    assert announced == [3]
    checkpointer.close()


def test_fingerprint_sees_names_shapes_types_and_bits():
    x = jnp.arange(6, dtype=jnp.float32)
    prints = [
        fingerprint(tree)
        for tree in (
            {"a": x},
            {"b": x},
            {"a": x.reshape(2, 3)},
            {"a": x.at[:4].set(x[jnp.array([0, 2, 1, 3])]).reshape(2, 3)},
            {"a": x.astype(jnp.int32)},
            {"a": x.at[3].set(3.0000002)},
            {"a": -x},
            {"a": x, "b": x},
        )
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": np.asarray(x)}) == prints[0]


def test_a_checksum_sees_two_entries_change_places():
    x = jnp.arange(9.0).reshape(3, 3)
    assert integrity.record({"a": x})[0] != integrity.record({"a": x.T})[0]


def test_a_checkpoint_is_of_the_step_that_it_was_saved_as(tmp_path):
    directory = tmp_path / "checkpoints"
    save_all(directory, {step: small_state(step) for step in (1, 2)})
    (directory / "2").rename(directory / "3")
    lines = []
    checkpointer = Checkpointer(directory, say=lines.append)
    assert checkpointer.restore_latest(abstract(small_state(0)))[0] == 1
    assert "checkpoint 3 is damaged" in lines[0]


def test_sharded_save_restores_on_other_shardings(tmp_path):
    mesh = jax.make_mesh(
        (4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )
    other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def sharded(mesh, spec):
        def put(x):
            axes = spec if x.ndim == 3 else jax.P(*spec[1:]) if x.ndim == 2 else jax.P()
            return NamedSharding(mesh, axes)

        return put

    plain = make_state(7)
    first = sharded(mesh, jax.P(None, "data", "tensor"))
    with jax.set_mesh(mesh):
        state = jax.tree.map(lambda x: jax.device_put(x, first(x)), plain)
        assert fingerprint(state) == fingerprint(plain)
        checkpointer = Checkpointer(tmp_path / "checkpoints")
        checkpointer.save(7, state)
        checkpointer.close()
    for place in (first, sharded(other, jax.P(None, None, "data")), lambda x: None):
        target = jax.tree.map(
            lambda x, put=place: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=put(x)
            ),
            plain,
        )
        step, restored = Checkpointer(tmp_path / "checkpoints").restore_latest(target)
        assert step == 7
        assert_same(restored, plain)
        assert fingerprint(restored) == fingerprint(plain)
        wanted = place(plain.model.layers.w_DF)
        got = restored.model.layers.w_DF[...].sharding
        assert got == wanted if wanted else got.num_devices == 1


def test_state_may_be_donated_right_after_save(tmp_path):
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0
    )
    checkpointer = Checkpointer(tmp_path / "checkpoints")

    def big(seed):
        return {"w": jax.random.normal(jax.random.key(seed), (1500, 1500))}

    for step in (1, 2, 3):
        state = big(step)
        checkpointer.save(step, state)
        # On a CPU Orbax may still hold the buffer, and then donating copies instead.
        jax.block_until_ready(overwrite(state))
        if not state["w"].is_deleted():
            state["w"].delete()
    checkpointer.wait()
    step, restored = checkpointer.restore_latest(abstract(big(0)))
    assert step == 3
    assert_same(restored, big(3))
    checkpointer.close()


@pytest.mark.parametrize(
    "trials",
    [
        pytest.param(range(20), id="20"),
        pytest.param(range(20, FLIPS), id=f"{FLIPS}", marks=pytest.mark.slow),
    ],
)
def test_no_wrong_bit_gets_through(tmp_path, trials):
    """Single bit flips over all files of the newest checkpoint.

    SPARSE_FLAX_FLIPS asks for more of them than 100.
    """
    good = tmp_path / "good"
    save_all(good / "checkpoints", {100: small_state(100), 200: small_state(200)})
    files = [p for p in (good / "checkpoints/200").rglob("*") if p.stat().st_size]
    files = sorted(p.relative_to(good) for p in files if p.is_file())
    sizes = [(good / p).stat().st_size for p in files]
    target = abstract(small_state(0))
    detected = 0
    for trial in trials:
        rng = random.Random(trial)
        weights = sizes if trial % 2 else None
        run = tmp_path / "run"
        shutil.copytree(good, run)
        flip_one_bit(run / rng.choices(files, weights)[0], rng)
        lines = []
        checkpointer = Checkpointer(run / "checkpoints", say=lines.append)
        start = time.monotonic()
        step, state = checkpointer.restore_latest(target)
        assert time.monotonic() - start < 30
        assert_same(state, small_state(step))
        if step == 200:
            assert lines == []
        else:
            detected += 1
            assert step == 100
            (line,) = lines
            assert line.startswith("checkpoint 200 is damaged (")
            assert line.endswith(
                f"; it was moved to {run}/damaged/200; going on from checkpoint 100"
            )
            assert checkpointer.steps() == [100]
        shutil.rmtree(run)
    print(f"{detected} of {len(trials)} flips detected, the others harmless")
    assert detected > len(trials) // 3  # or the flips did not hit what matters


RESTORER = """
import pathlib, sys
import jax, jax.numpy as jnp
from sparse_flax.checkpoint import Checkpointer

names = [f"w{i}" for i in range(9)]
target = {name: jax.ShapeDtypeStruct((300, 300), jnp.float32) for name in names}
assert Checkpointer(pathlib.Path(sys.argv[1])).restore_latest(target)[0] == 1
"""


@pytest.mark.parametrize("where", ["state/d/*", "state/**/d/*", "state/manifest.ocdbt"])
def test_damage_is_one_line_on_the_console(tmp_path, where):
    directory = tmp_path / "checkpoints"
    key = jax.random.key(0)
    state = {f"w{i}": jax.random.normal(key, (300, 300)) for i in range(9)}
    save_all(directory, {1: state, 2: state})
    for path in (directory / "2").glob(where):
        flip_one_bit(path, random.Random(0))
    done = subprocess.run(
        [sys.executable, "-c", RESTORER, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("checkpoint 2 is damaged")
    assert done.stdout.count("\n") == 1
    # One of tensorstore's threads may still come late to an event loop that is gone.
    assert "orbax" not in done.stderr, done.stderr
    assert done.stderr.count("Traceback") <= 1, done.stderr


def test_saving_goes_on_after_falling_back(tmp_path):
    directory = tmp_path / "checkpoints"
    lines = []
    checkpointer = Checkpointer(directory, say=lines.append)
    for step in (1, 2, 3):
        checkpointer.save(step, small_state(step))
    checkpointer.wait()
    for round in (1, 2):  # the second time `damaged/2` and `damaged/3` are taken
        for step in (2, 3):
            shutil.rmtree(directory / str(step) / "state")
        step, state = checkpointer.restore_latest(abstract(small_state(0)))
        assert step == 1
        assert len(lines) == 2 * round
        assert checkpointer.steps() == [1]
        for step in (2, 3):
            checkpointer.save(step, small_state(step))
        assert checkpointer.wait() == [2, 3]
        step, state = checkpointer.restore_latest(abstract(small_state(0)))
        assert step == 3
        assert_same(state, small_state(3))
    aside = sorted(path.name for path in (tmp_path / "damaged").iterdir())
    assert aside == ["2", "2-2", "3", "3-2"]
    checkpointer.close()


def test_half_deleted_old_step_does_no_harm(tmp_path):
    directory = tmp_path / "checkpoints"
    save_all(directory, {step: small_state(step) for step in (1, 2, 3)})
    shutil.rmtree(directory / "1/integrity")
    (directory / "1/_CHECKPOINT_METADATA").write_bytes(b"{")
    checkpointer = Checkpointer(directory)
    assert checkpointer.restore_latest(abstract(small_state(0)))[0] == 3
    checkpointer.save(4, small_state(4))
    assert checkpointer.wait() == [4]
    assert checkpointer.steps() == [2, 3, 4]
    assert not (tmp_path / "damaged").exists()
    checkpointer.close()


def test_all_damaged_touches_nothing(tmp_path):
    directory = tmp_path / "checkpoints"
    save_all(directory, {1: small_state(1), 2: small_state(2)})
    for step, victim in ((1, "state/manifest.ocdbt"), (2, "integrity/metadata")):
        flip_one_bit(directory / str(step) / victim, random.Random(0))
    before = listing(tmp_path)
    checkpointer = Checkpointer(directory, say=pytest.fail)
    with pytest.raises(UserError, match=r"no checkpoint in .* 2 \(.*\), 1 \(.*\); not"):
        checkpointer.restore_latest(abstract(small_state(0)))
    assert listing(tmp_path) == before


def test_no_checkpoint_is_none_and_reading_makes_nothing(tmp_path):
    directory = tmp_path / "run/checkpoints"
    checkpointer = Checkpointer(directory)
    assert checkpointer.restore_latest(abstract(small_state(0))) is None
    assert checkpointer.steps() == []
    checkpointer.close()
    assert list(tmp_path.iterdir()) == []
    # What another process is writing is not this one's to tidy.
    (directory / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert checkpointer.restore_latest(abstract(small_state(0))) is None
    assert [path.name for path in directory.iterdir()] == ["5.orbax-checkpoint-tmp"]


def test_another_model_is_refused_without_moving_anything(tmp_path):
    directory = tmp_path / "checkpoints"
    save_all(directory, {1: make_state(1), 2: make_state(2)})
    before = listing(tmp_path)
    checkpointer = Checkpointer(directory, say=pytest.fail)
    target = abstract(make_state(0))

    def refused(state):
        with pytest.raises(UserError) as caught:
            checkpointer.restore_latest(state)
        assert listing(tmp_path) == before
        return str(caught.value)

    wide = abstract(make_state(0))
    wide.model.embed_VD = nnx.Param(jax.ShapeDtypeStruct((64, 24), jnp.float32))
    assert refused(wide) == (
        "checkpoint 2 holds float32[64, 16] for model.embed_VD where this model has "
        "float32[64, 24]; use the config that it was trained with, or a new directory"
    )
    half = abstract(make_state(0))
    half.ema = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), half.ema
    )
    assert "bfloat16" in refused(half)
    more = {"extra": target.step, **vars(target)}
    assert "holds nothing for extra where this model has int32[]" in refused(more)
    less = {name: x for name, x in vars(target).items() if name != "ema"}
    assert "for ema.embed_VD where this model has nothing" in refused(less)


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_non_finite_state_is_refused(tmp_path, bad):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(1, make_state(1))
    state = make_state(2)
    state.model.layers.w_DF[...] = state.model.layers.w_DF[...].at[3, 2, 1].set(bad)
    state.ema.layers.scale_D[...] = state.ema.layers.scale_D[...] * bad
    with pytest.raises(
        UserError, match=r"checkpoint 2 .*model\.layers\.w_DF holds NaN"
    ):
        checkpointer.save(2, state)
    assert checkpointer.wait() == [1]
    checkpointer.save(2, make_state(2))
    assert checkpointer.wait() == [2]
    checkpointer.close()


def test_existing_step_is_refused(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(5, small_state(5))
    for step in (4, 5):
        with pytest.raises(UserError, match=rf"checkpoint {step} .* already holds 5;"):
            checkpointer.save(step, small_state(step))
    assert checkpointer.wait() == [5]
    checkpointer.close()


def test_unwritable_directory_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpointer = Checkpointer(tmp_path / "file/checkpoints")
    with pytest.raises(
        UserError, match=r"checkpoint 1 could not be written: .*Not a d"
    ):
        checkpointer.save(1, small_state(1))
    checkpointer.close()


DISK_FULL = """
import pathlib, resource, sys, time
import jax
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.errors import UserError

mode, directory = sys.argv[1], pathlib.Path(sys.argv[2])
ballast = directory / "ballast"

def fill(full):
    if mode == "limit":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000 if full else hard, hard))
    elif full:
        try:
            ballast.write_bytes(bytes(32 << 20))
        except OSError:
            pass
        with ballast.open("r+b") as file:
            file.truncate(ballast.stat().st_size - 500_000)
    else:
        ballast.unlink()

def state(step):
    return {"w": jax.random.normal(jax.random.key(step), (1000, 1000))}

def told(call):
    try:
        call()
    except UserError as error:
        assert str(error).startswith("checkpoint 2 could not be written: "), error
        print(str(error).split(": ")[1].split(";")[0])
    else:
        print("no error")

checkpointer = Checkpointer(directory / "checkpoints")
checkpointer.save(1, state(1))
assert checkpointer.wait() == [1]
fill(True)

def poll():
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert checkpointer.poll() == []

for call in (poll, checkpointer.wait, checkpointer.close):
    checkpointer.save(2, state(2))
    told(call)
    told(checkpointer.close)
    assert checkpointer.steps() == [1]
checkpointer.save(2, state(2))
told(lambda: checkpointer.save(3, state(3)))
fill(False)
checkpointer.save(2, state(2))
assert checkpointer.wait() == [2]
step, restored = checkpointer.restore_latest(state(0))
assert step == 2 and (restored["w"] == state(2)["w"]).all()
checkpointer.close()
assert not list((directory / "checkpoints").glob("*tmp*"))
"""


@pytest.mark.parametrize("mode", ["limit", "tmpfs"])
def test_full_disk_is_a_sentence(tmp_path, mode):
    if mode == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)]
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", DISK_FULL, mode, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        if mode == "tmpfs":
            subprocess.run(["umount", str(tmp_path)], check=True)
    # No traceback of Orbax's beside the sentence. (tensorstore may complain that an
    # event loop is gone, from a thread that nobody can catch it in.)
    assert "orbax" not in done.stderr, done.stderr
    reason = "File too large" if mode == "limit" else "No space left on device"
    assert done.stdout.splitlines() == [reason, "no error"] * 3 + [reason]
    assert done.returncode == 0


SAVER = """
import pathlib, sys
import jax, jax.numpy as jnp
from sparse_flax.checkpoint import Checkpointer

def state(step):  # 32 MB that do not compress
    bits = jax.random.bits(jax.random.key(step), (8, 1000, 1000), jnp.uint32)
    return {"step": jnp.int32(step), "w": [bits[i] for i in range(8)]}

if __name__ == "__main__":
    checkpointer = Checkpointer(pathlib.Path(sys.argv[1]))
    found = checkpointer.restore_latest(state(0))
    step = found[0] if found else 0
    print("start", step, flush=True)
    while True:
        step += 1
        checkpointer.save(step, state(step))
        for saved in checkpointer.poll():
            print("saved", saved, flush=True)
"""


@pytest.mark.parametrize(
    "kills",
    [pytest.param(5, id="5"), pytest.param(12, id="12", marks=pytest.mark.slow)],
)
def test_kill_in_the_middle_of_saving(tmp_path, kills):
    directory = tmp_path / "checkpoints"
    saver = tmp_path / "saver.py"
    saver.write_text(SAVER)
    namespace = {"__name__": "saver"}
    exec(SAVER, namespace)
    state = namespace["state"]
    rng = random.Random(kills)
    announced = torn = 0
    longest = 2.0
    for number in range(10 * kills):
        if number >= kills and torn:  # chance may miss every save for a while
            break
        child = subprocess.Popen(
            [sys.executable, str(saver), str(directory)],
            env=os.environ
            # Or it is killed in the middle of writing a program that others read.
            | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert child.stdout.readline() == f"start {announced}\n"
            time.sleep(rng.uniform(0.2, longest))
        finally:
            child.send_signal(signal.SIGKILL)
            out, err = child.communicate()
        assert err == ""
        lines = out.splitlines(keepends=True)
        saved = [int(line.split()[1]) for line in lines if line.endswith("\n")]
        torn += any(directory.glob("*tmp*"))
        lines = []
        checkpointer = Checkpointer(directory, say=lines.append)
        found = checkpointer.restore_latest(abstract(state(0)))
        assert lines == []
        if found is None:
            assert not saved
            if not torn:  # a busy machine, that begins to save later than this
                longest = min(2 * longest, 30.0)
            continue
        assert found[0] >= max(saved, default=announced)
        assert_same(found[1], state(found[0]))
        announced = found[0]
    print(f"{number} kills, {torn} in the middle of a save, {announced} steps saved")
    assert torn
