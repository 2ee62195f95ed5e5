"""The loop over caches against the full forward pass, and what it moves."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model

from sparse_flax import decoder, generate
from sparse_flax.attention import Columns, Dense, Fixed, Local, PerHead, Strided
from sparse_flax.model import VOCABULARY, ModelConfig
from sparse_flax.sharding import make_mesh

CONFIG = ModelConfig(
    context=37,
    layers=2,
    width=16,
    heads=4,
    qk_width=8,  # narrower than the values
    feed_forward=24,
    patterns=(Fixed(8, 2, rotate=True),),
    position_shape=(5, 4, 2),
    dtype="float32",
)
CYCLES = [
    (Fixed(8, 2, rotate=True),),
    (Columns(6), Local(6)),
    (PerHead((Local(5), Columns(5))), Dense()),
    (PerHead((Strided(4), Fixed(6, 2, rotate=True))),),
]


def model_of(*patterns, **changes):
    return noisy_model(dataclasses.replace(CONFIG, patterns=patterns, **changes))


def some_inputs(B, T):
    bytes_BT = np.random.default_rng(0).integers(0, 256, (B, T)).astype(np.int32)
    return generate.inputs(bytes_BT)


@jax.jit
def decoded_logits(model, inputs_BT, length):
    """Logits of the positions from `length` on, one after the other; 0 before."""
    B, T = inputs_BT.shape
    caches = decoder.prefill(model, inputs_BT, length, T=T)
    weights = decoder.decoder(model)

    def one(position, carry):
        caches, logits_BTN = carry
        input_B = jax.lax.dynamic_index_in_dim(inputs_BT, position, 1, False)
        row, caches = decoder.step(weights, caches, input_B, position, T)
        return caches, logits_BTN.at[:, position].set(row)

    zeros = jnp.zeros((B, T, VOCABULARY))
    return jax.lax.fori_loop(length, T, one, (caches, zeros))[1]


@pytest.mark.parametrize("patterns", CYCLES, ids=str)
def test_cached_logits_equal_the_forward_pass_at_every_position(patterns):
    model, inputs_BT = model_of(*patterns), some_inputs(2, 37)
    expected = np.asarray(jax.jit(lambda model, x: model(x))(model, inputs_BT))
    scale = np.abs(expected).max()
    for length in (0, 1, 13, 36):
        got = np.asarray(decoded_logits(model, inputs_BT, length))[:, length:]
        np.testing.assert_allclose(got / scale, expected[:, length:] / scale, atol=1e-5)


def test_the_same_bytes_whatever_the_batch():
    model = model_of(Fixed(8, 2, rotate=True))
    prompts = [b"", b"hello", b"hello, world", b"hello"]
    together = generate.generate(model, prompts, 25, seed=7)
    for n, prompt in enumerate(prompts):
        assert generate.generate(model, [prompt], 25, seed=7 + n) == [together[n]]
    assert [len(text) for text in together] == [25] * 4
    assert together[1] != together[3]  # another row, another seed
    rows = model.generate(prompts, 25, seed=7)
    assert rows.dtype == np.uint8 and [row.tobytes() for row in rows] == together
    assert model.generate([], 25).shape == (0, 25)


def test_continues_arrays_as_it_does_bytes():
    model = model_of(Fixed(8, 2, rotate=True))
    given_NP = np.random.default_rng(0).integers(0, 256, (2, 12))
    expected = model.generate([row.astype(np.uint8).tobytes() for row in given_NP], 25)
    np.testing.assert_array_equal(model.generate(given_NP, 25), expected)
    assert model.generate(np.zeros((2, 0), np.uint8), 25).shape == (2, 25)
    for wrong in ([[1, 256]], [[0.5]], np.zeros((1, 2, 3), int), [[-1]]):
        with pytest.raises(ValueError, match=r"give integers \[P\] from 0 to 255"):
            model.generate(wrong, 1)


def test_reads_in_parts_give_the_same_bytes(monkeypatch):
    model = model_of(PerHead((Strided(4), Fixed(6, 2, rotate=True))))
    expected = generate.generate(model, [b"abc"], 34, seed=1)
    monkeypatch.setattr(generate, "SMALLEST_PART", 20)
    monkeypatch.setattr(generate, "BYTES_PER_CALL", 4)
    assert generate.generate(model, [b"abc"], 34, seed=1) == expected


def test_keeps_only_the_likeliest():
    p = np.array([0.1, 0.4, 0.15, 0.3, 0.05])
    logits_BN = jnp.log(jnp.asarray([p, p[::-1]], jnp.float32))

    def kept(top_k, top_p):
        rows = np.isfinite(generate.likeliest(logits_BN, top_k, top_p))
        assert (rows[0] == rows[1][::-1]).all()
        return set(np.flatnonzero(rows[0]))

    assert kept(5, 1.0) == {0, 1, 2, 3, 4}
    assert kept(2, 1.0) == {1, 3}
    assert kept(5, 0.39) == {1}
    assert kept(5, 0.41) == {1, 3}
    assert kept(5, 1e-9) == {1}
    # Of the three likeliest, 0.4 / 0.85 and 0.3 / 0.85 are 0.82 together.
    assert kept(3, 0.81) == {1, 3}
    assert kept(3, 0.83) == {1, 2, 3}
    equal = generate.likeliest(jnp.zeros((1, 4)), 2, 1.0)
    assert np.isfinite(equal).tolist() == [[True, True, False, False]]


def test_the_likeliest_byte_is_sampled_whatever_the_seed_and_temperature():
    model = model_of(Dense())
    (greedy,) = generate.generate(model, [b"ab"], 12, seed=0, top_k=1)
    text = b"ab"
    forward = jax.jit(lambda model, x: model(x))
    for _ in range(12):
        padded = np.frombuffer(text.ljust(37, b"\0"), np.uint8)[None].astype(np.int32)
        logits_N = forward(model, generate.inputs(padded))[0, len(text)]
        text += bytes([int(np.argmax(logits_N))])
    assert greedy == text[2:]
    for options in ({"top_k": 1, "temperature": 9.0}, {"top_p": 1e-6}):
        assert generate.generate(model, [b"ab"], 12, seed=5, **options) == [greedy]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 300}, r"top_k=300 must be from 0 \(all\) to 256; try 256"),
        ({"top_k": -1}, r"top_k=-1 must be .* try 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be above 0 and at most 1; try 1.0"),
        ({"temperature": 0}, r"temperature=0 must be above 0; try 1.0, or top_k=1"),
        ({"temperature": math.nan}, r"temperature=nan must be above 0"),
        ({"count": -1}, r"count=-1 must be a whole number from 0 on; try 100"),
        ({"prompts": ["a"]}, r"of text 'a' is not bytes; give prompt.encode\(\)"),
        ({"prompts": b"abc"}, r"prompts=b'abc' is one prompt; give a list"),
    ],
)
def test_refuses_options_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        model_of(Dense()).generate(**{"prompts": [b""], "count": 1} | options)
    assert "\n" not in str(error.value)


def test_layers_one_by_one_and_a_sample_share_what_is_compiled():
    """Whoever looks first: both lay a batch out alike on a mesh."""
    model = model_of(Strided(4))
    with jax.set_mesh(make_mesh(context=2)):
        inputs = jnp.zeros((2, model.config.context), jnp.int32)
        list(decoder.layer_by_layer(model, inputs))
        sampled = model.generate([b"ab", b"cd"], model.config.context - 2)
    assert sampled.shape == (2, model.config.context - 2)


# ---- The compiled loop -------------------------------------------------------------


# Pattern and the places of its caches that a step takes, 4096 bytes long.
T = 4096
READS = [
    (Dense(), {T}),
    (Strided(64), {64, T // 64}),
    (Fixed(64, 8, rotate=True), {64 + 8 * 63}),
    (PerHead((Local(32), Columns(128))), {32, T // 128}),
]


def compiled_loop(pattern):
    """The optimised program of a call of the loop, as text, and its caches."""
    make = functools.partial(
        model_of, pattern, context=T, position_shape=(64, T // 64), layers=2
    )
    model = jax.eval_shape(make)
    prompt = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    caches = jax.eval_shape(
        functools.partial(decoder.prefill, T=T), model, prompt, scalar
    )
    args = (
        jax.ShapeDtypeStruct((2, T), jnp.int32),
        (scalar, scalar),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0))),
        1.0,
        None,
    )
    weights = jax.eval_shape(decoder.decoder, model)
    lowered = generate._sample.lower(weights, caches, *args, reach=T)
    return lowered.compile().as_text(), caches


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("pattern", "expected"), READS, ids=str)
def test_the_compiled_loop_reads_what_the_pattern_sees_and_copies_no_cache(
    pattern, expected
):
    text, caches = compiled_loop(pattern)
    made = set()
    for cache in caches:
        for kv in cache.kv:
            shape = ",".join(map(str, kv.shape))
            made |= set(re.findall(rf"= f32\[{shape}\]\S* ([a-z-]+)\(", text))
    in_place = {"dynamic-update-slice", "scatter"}
    assert made & in_place
    assert made <= in_place | {"parameter", "get-tuple-element", "bitcast", "fusion"}
    # Such a fusion is one around a write, as nothing else above gives a whole cache.
    sizes = re.findall(r"= f32\[2,\d,([\d,]+),4\]\S* multiply\(", text)
    # Queries times keys, which are 4 wide, for each place that is read.
    taken = {int(np.prod([int(n) for n in size.split(",")])) for size in sizes}
    assert expected <= taken and max(taken) == max(expected)
