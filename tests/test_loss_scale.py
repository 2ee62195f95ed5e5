"""Float16: an overflow costs one step and half of the scale, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import last_state, print_of, rows, run, tiny, write_text

from sparse_flax import loss_scale
from sparse_flax.loss_scale import LossScale


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def after(scale, goods):
    for good in goods:
        scale = scale.after(jnp.bool(good))
    return float(scale.scale), int(scale.good_steps)


def test_halves_at_once_and_doubles_in_time(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 3)
    start = LossScale.start(8.0)
    assert after(start, [True, True]) == (8, 2)
    assert after(start, [True, True, True]) == (16, 0)
    assert after(start, [True, True, False]) == (4, 0)
    assert after(start, [False, True, True, True]) == (8, 0)
    assert after(start, [False] * 9) == (loss_scale.SMALLEST, 0)
    assert bool(start.can_fall())
    assert not bool(LossScale.start(loss_scale.SMALLEST).can_fall())


def run_float16(workdir, text, scale, **changes):
    changes |= {"model__dtype": "float16", "optim__loss_scale": scale}
    config = tiny(text, log__every_steps=1, **changes)
    return run(workdir, config), config


def test_an_overflow_skips_the_step_halves_the_scale_and_is_in_the_checkpoint(
    tmp_path, text
):
    """From 2**24 on, what float16 cannot hold is a matter of course."""
    lines, config = run_float16(tmp_path / "run", text, 2.0**24)
    skipped = [line for line in lines if "skipped, because the gradient" in line]
    assert skipped[0].startswith("step 1: skipped") and "8,388,608 now" in skipped[0]
    train = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 13))
    scales = [row["loss_scale"] for row in train]
    for row, before, now in zip(train, [2.0**24, *scales], scales, strict=False):
        assert now == (before / 2 if row["grad_norm"] is None else before)
    assert 0 < len(skipped) < 12 and scales[-1] == 2.0 ** (24 - len(skipped))
    # A skipped step changes no weight: zero logits go on costing 8 bits.
    assert [round(row["bits_per_byte"], 4) for row in train[:2]] == [8, 8]
    step, state = last_state(tmp_path / "run", config)
    assert (step, int(state.step)) == (12, 12)
    assert float(state.loss_scale.scale) == scales[-1]
    assert int(state.loss_scale.good_steps) == 12 - len(skipped)


def test_an_interrupted_run_goes_on_with_its_scale(tmp_path, text):
    straight, config = run_float16(tmp_path / "a", text, 2.0**24)
    stopped = run(tmp_path / "b", config, stop_at=12)
    assert any("stopped by SIGTERM" in line for line in stopped)
    resumed = run(tmp_path / "b", config)
    assert print_of(resumed) == print_of(straight)
    (_, a), (_, b) = (last_state(tmp_path / name, config) for name in "ab")
    for x, y in zip(
        jax.tree.leaves(a.loss_scale), jax.tree.leaves(b.loss_scale), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_float16_learns_what_bfloat16_does(tmp_path, text):
    """The quickstart itself is compared on a GPU: see tests/test_gpu.py."""
    ends = {}
    for dtype in ("float16", "bfloat16"):
        config = tiny(text, model__dtype=dtype, train__steps=40)
        run(tmp_path / dtype, config)
        ends[dtype] = rows(tmp_path / dtype)[-1]
    assert ends["bfloat16"]["split"] == "test"
    assert ends["bfloat16"]["bits_per_byte"] < 6
    difference = ends["float16"]["bits_per_byte"] - ends["bfloat16"]["bits_per_byte"]
    assert abs(difference) < 0.05
