"""Float16: an overflow costs one step and half of the scale, and nothing else."""

import jax.numpy as jnp
import pytest
from test_train import last_state, rows, run, tiny, write_text

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


def test_an_overflow_skips_the_step_and_halves_the_scale_across_a_restart(
    tmp_path, text
):
    """From 2**24 on, what float16 cannot hold is a matter of course."""
    changes = {"model__dtype": "float16", "optim__loss_scale": 2.0**24}
    config = tiny(text, log__every_steps=1, **changes)
    lines = run(tmp_path / "run", config, stop_at=12)
    assert any("stopped by SIGTERM" in line for line in lines)
    lines += run(tmp_path / "run", config)
    skipped = [line for line in lines if "skipped, because the gradient" in line]
    assert skipped[0].startswith("step 1: skipped") and "8,388,608 now" in skipped[0]
    train = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 13))
    scales = [row["loss_scale"] for row in train]
    good = [row["grad_norm"] is not None for row in train]
    assert 1 < good.count(False) < 12
    for this, before, now in zip(good, [2.0**24, *scales], scales, strict=False):
        assert now == (before if this else before / 2)
    # A skipped step changes no weight: zero logits go on costing 8 bits.
    assert [round(row["bits_per_byte"], 4) for row in train[:2]] == [8, 8]
    step, state = last_state(tmp_path / "run", config)
    assert (step, int(state.step)) == (12, 12)
    assert float(state.loss_scale.scale) == scales[-1]
    assert int(state.loss_scale.good_steps) == [*good[::-1], False].index(False)


def test_the_scale_is_taken_out_of_the_gradient(tmp_path, text):
    norms = {}
    for dtype in ("float16", "float32"):
        changes = {"model__dtype": dtype, "optim__loss_scale": 2.0**10}
        config = tiny(text, train__steps=3, log__every_steps=1, **changes)
        run(tmp_path / dtype, config)
        train = [row for row in rows(tmp_path / dtype) if row["split"] == "train"]
        norms[dtype] = [row["grad_norm"] for row in train]
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)


@pytest.mark.slow
def test_float16_learns_what_bfloat16_does(tmp_path, text):
    """On a tiny model; the README has the quickstart's figures."""
    ends = {}
    for dtype in ("float16", "bfloat16"):
        config = tiny(text, model__dtype=dtype, train__steps=30, eval__every_steps=0)
        run(tmp_path / dtype, config)
        ends[dtype] = rows(tmp_path / dtype)[-1]
    assert ends["bfloat16"]["split"] == "test"
    assert ends["bfloat16"]["bits_per_byte"] < 7
    difference = ends["float16"]["bits_per_byte"] - ends["bfloat16"]["bits_per_byte"]
    assert abs(difference) < 0.05
