"""A trace holds the steps that were asked for, and training goes on after it."""

import contextlib
import gzip
import json
import random

import jax
import jax.numpy as jnp
import pytest

from sparse_flax import config as config_lib
from sparse_flax.profiling import WARM_UP, Profile
from sparse_flax.train import Trainer


def traced_steps(folder):
    """The numbers of the steps in the trace that perfetto opens."""
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    return sorted(map(int, found))


def run(profile, steps):
    """Square a number so many times, as a loop of training would."""
    square, x = jax.jit(lambda x: x * x), jnp.float32(1)
    for step in range(steps):
        with profile.step(step, x):
            x = square(x)
    profile.end(x)


def test_traces_steps_after_a_few(tmp_path):
    said = []
    run(Profile(2, tmp_path, contextlib.nullcontext, said.append), 9)
    assert traced_steps(tmp_path) == [WARM_UP, WARM_UP + 1]
    (line,) = said
    assert line.startswith(f"traced 2 steps into {tmp_path}: open its perfetto_trace")


@pytest.mark.parametrize("steps", [WARM_UP, WARM_UP + 1])
def test_a_run_that_is_too_short_says_so(tmp_path, steps):
    said = []
    run(Profile(5, tmp_path, contextlib.nullcontext, said.append), steps)
    (line,) = said
    if steps == WARM_UP:
        assert line.startswith("no trace: it begins after 3 steps, and this run made 3")
        assert not list(tmp_path.iterdir())
    else:
        assert line.startswith("traced 1 steps")
        assert traced_steps(tmp_path) == [WARM_UP]


def test_none_is_taken_unless_asked_for(tmp_path):
    said = []
    run(Profile(0, tmp_path, contextlib.nullcontext, said.append), 6)
    assert not said and not list(tmp_path.iterdir())


def test_after_an_error_the_next_run_can_trace(tmp_path):
    broken = Profile(5, tmp_path / "broken", contextlib.nullcontext, print)
    for step in range(WARM_UP + 1):
        with broken.step(step, None):
            pass
    broken.abandon()
    broken.abandon()
    run(Profile(1, tmp_path / "next", contextlib.nullcontext, print), 9)
    assert traced_steps(tmp_path / "next") == [WARM_UP]


def test_training_is_traced_and_goes_on(tmp_path):
    text = "".join(random.Random(0).choices("abcde ", k=20_000))
    (tmp_path / "text.txt").write_text(text)
    config = config_lib.defaults()
    config.data.update(name="bytes", path=str(tmp_path / "text.txt"))
    config.model.update(context=64, layers=1, width=16, heads=2, dtype="float32")
    config.model.patterns = "Local(8)"
    config.train.update(steps=8, batch_size=2)
    config.eval.update(max_windows=2, sample_bytes=0)
    said = []
    Trainer(config, str(tmp_path / "run"), say=said.append, profile=2).run()
    assert traced_steps(tmp_path / "run" / "profile") == [3, 4]
    assert sum(line.startswith("traced 2 steps into ") for line in said) == 1
    assert any(line.startswith("finished at step 8") for line in said)
