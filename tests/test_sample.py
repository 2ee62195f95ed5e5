"""Sampling against a loop that is too slow to be wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model

from sparse_flax import generate
from sparse_flax.attention import Fixed
from sparse_flax.model import START, ModelConfig

CONFIG = ModelConfig(
    context=40,
    layers=2,
    width=64,
    heads=2,
    qk_width=16,
    feed_forward=32,
    patterns=(Fixed(8, 4, rotate=True),),
    position_shape=(5, 8),
    dtype="float32",
)


@functools.cache
def counting_model():
    """Byte b is followed by b + 1, whatever came before."""
    model = jax.tree.map(jnp.zeros_like, noisy_model(CONFIG))
    model.norm_scale_D[...] = jnp.ones(64)
    token_ND = np.random.default_rng(1).normal(size=(256, 64))
    model.token_ND[...] = jnp.asarray(token_ND, jnp.float32)
    model.logits_DN[...] = jnp.asarray(np.roll(token_ND, 1, axis=0).T, jnp.float32)
    return model


def continued(model, prompt=b"hello", count=21, seed=3, **kwargs):
    return generate.generate(model, [prompt], count, seed=seed, **kwargs)[0]


@pytest.mark.parametrize("prompt", [b"hello", b""])
def test_equals_a_forward_pass_for_every_byte(prompt):
    model, key = noisy_model(CONFIG), jax.random.key(3)
    forward = jax.jit(lambda model, inputs_BT: model(inputs_BT))
    text = list(prompt)
    for place in range(len(text), len(text) + 21):
        inputs = [START, *text]
        inputs += [0] * (CONFIG.context - len(inputs))
        logits_N = forward(model, jnp.asarray([inputs]))[0, place] / 0.8
        byte = jax.random.categorical(jax.random.fold_in(key, place), logits_N)
        text.append(int(byte))
    expected = bytes(text[len(prompt) :])
    assert len(set(expected)) > 10
    assert continued(model, prompt, temperature=0.8) == expected


def test_fills_the_context_to_its_last_byte():
    assert len(continued(noisy_model(CONFIG), count=35)) == 35


def test_the_same_seed_gives_the_same_bytes():
    model = noisy_model(CONFIG)
    assert continued(model) == continued(model)
    assert continued(model) != continued(model, seed=4)


def test_fewer_bytes_are_the_beginning_of_more():
    more = continued(noisy_model(CONFIG))
    assert continued(noisy_model(CONFIG), count=7) == more[:7]
    assert continued(noisy_model(CONFIG), count=0) == b""


def test_goes_on_counting():
    prompt = bytes([250, 251])
    expected = bytes([(252 + i) % 256 for i in range(21)])
    assert continued(counting_model(), prompt, temperature=0.1) == expected
    hot = continued(counting_model(), prompt, temperature=1e4)
    assert hot != expected


def test_a_stop_returns_what_there_is(monkeypatch):
    monkeypatch.setattr(generate, "BYTES_PER_CALL", 16)

    class StopsAfter:
        def __init__(self, calls):
            self.left = calls

        def __bool__(self):
            self.left -= 1
            return self.left < 0

    whole = continued(noisy_model(CONFIG))
    assert continued(noisy_model(CONFIG), stop=StopsAfter(0)) == b""
    assert continued(noisy_model(CONFIG), stop=StopsAfter(1)) == whole[:16]
    assert continued(noisy_model(CONFIG), stop=StopsAfter(2)) == whole


def test_says_when_a_sample_does_not_fit():
    expected = (
        "prompt of 30 and a sample of 11 bytes .* context of 40; sample 10 or fewer"
    )
    with pytest.raises(ValueError, match=expected) as error:
        continued(noisy_model(CONFIG), b"x" * 30, 11)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="sample 0 or fewer"):
        continued(noisy_model(CONFIG), b"x" * 50, 1)


def test_tells_how_far_it_is(monkeypatch):
    seconds = iter(range(0, 1000, 11))
    monkeypatch.setattr("sparse_flax.generate.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr(generate, "BYTES_PER_CALL", 10)
    lines = []
    continued(noisy_model(CONFIG), b"hello", 21, seed=0, say=lines.append)
    assert lines == [
        f"sampling: byte {done} of 26 | eta {left}"
        for done, left in ((15, "24s"), (25, "2s"), (26, "0s"))
    ]
