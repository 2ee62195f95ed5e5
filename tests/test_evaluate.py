"""Bits per byte against a loop over windows, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model

from sparse_flax import evaluate
from sparse_flax.attention import Strided
from sparse_flax.data.batches import evaluation_batches
from sparse_flax.model import START, ModelConfig

CONFIG = ModelConfig(
    context=8,
    layers=2,
    width=16,
    heads=2,
    qk_width=16,
    feed_forward=32,
    patterns=(Strided(3),),
    position_shape=(3, 3),
    dtype="float32",
)


def bits_per_byte(data, batch_size=2, stop=False, say=print):
    batches = evaluation_batches(data, batch_size=batch_size, context=8)
    return evaluate.bits_per_byte(
        noisy_model(CONFIG), batches, count=9, stop=stop, say=say
    )


def by_hand(data):
    bits = []
    forward = jax.jit(lambda model, inputs_BT: model(inputs_BT))
    for start in range(0, len(data), 8):
        window = data[start : start + 8].astype(int)
        inputs = jnp.asarray([[START, *window[:-1]]])
        logits_TN = np.asarray(forward(noisy_model(CONFIG), inputs), np.float64)[0]
        total_T = np.log2(np.exp(logits_TN).sum(-1))
        for t, byte in enumerate(window):
            bits.append(total_T[t] - logits_TN[t, byte] / np.log(2))
    assert len(bits) == len(data)
    return sum(bits) / len(bits)


def test_equals_brute_force_for_every_minimum_context():
    """Of 300 bytes, of which the cost in every possible window is known."""
    data = np.random.default_rng(0).integers(0, 256, 300).astype(np.uint8)
    context, model = CONFIG.context, noisy_model(CONFIG)
    padded = np.pad(data, (0, context)).astype(int)
    targets_BT = np.stack([padded[start : start + context] for start in range(300)])
    starts_B1 = np.full((300, 1), START)
    inputs_BT = jnp.asarray(np.concatenate([starts_B1, targets_BT[:, :-1]], axis=1))
    logits_BTN = jax.jit(lambda model, inputs_BT: model(inputs_BT))(model, inputs_BT)
    logits_BTN = np.asarray(logits_BTN, np.float64)
    nats_BT = np.log(np.exp(logits_BTN).sum(-1))
    nats_BT -= np.take_along_axis(logits_BTN, targets_BT[..., None], -1)[..., 0]
    scores = []
    for least in range(context):
        nats, scored, start = 0.0, 0, 0
        while scored < 300:
            end = min(start + context, 300)
            assert start == 0 or scored - start >= least
            nats += nats_BT[start, scored - start : end - start].sum()
            scored, start = end, start + context - least
        batches = evaluation_batches(
            data, batch_size=7, context=context, min_context=least
        )
        score = evaluate.bits_per_byte(model, batches, count=1, stop=False, say=print)
        assert abs(score - nats / 300 / np.log(2)) < 1e-5, least
        scores.append(score)
    assert len(set(scores)) == context


# A last window of 1, of 5 and of all bytes; a last batch that is not full.
@pytest.mark.parametrize("size", [33, 5, 24])
def test_equals_a_loop_over_windows(size):
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    expected = by_hand(data)
    assert abs(expected - 8) > 0.01
    for batch_size in (2, 3):
        score = bits_per_byte(data, batch_size)
        assert abs(score - expected) < 1e-5


def test_one_micro_batch_that_is_not_finite_is_enough():
    model = jax.tree.map(jnp.asarray, noisy_model(CONFIG))
    model.start_D[...] = jnp.full(16, jnp.nan)

    def is_finite(*first, parts=2):
        inputs_BT = np.array([[byte, 2, 3] for byte in first], np.int32)
        batch = {"inputs_BT": inputs_BT, "targets_BT": np.ones_like(inputs_BT)}
        return evaluate.is_finite(model, batch, parts)

    assert is_finite(1, 1)
    assert not is_finite(1, START)
    assert not is_finite(START, 1)
    assert not is_finite(START, 1, parts=1)


def test_an_interrupted_evaluation_has_no_result():
    class StopsAfter:
        def __init__(self, calls):
            self.left = calls

        def __bool__(self):
            self.left -= 1
            return self.left < 0

    data = np.arange(33, dtype=np.uint8)
    assert bits_per_byte(data, stop=StopsAfter(0)) is None
    assert bits_per_byte(data, stop=StopsAfter(2)) is None
    assert bits_per_byte(data, stop=StopsAfter(3)) == bits_per_byte(data)


def test_tells_how_far_it_is(monkeypatch):
    seconds = iter(range(0, 1000, 11))
    monkeypatch.setattr("sparse_flax.evaluate.time.monotonic", lambda: next(seconds))
    lines = []
    bits_per_byte(np.arange(33, dtype=np.uint8), say=lines.append)
    assert lines[0].startswith("evaluating: batch 1 of 9 | eta ")
