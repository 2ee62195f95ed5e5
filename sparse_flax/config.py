"""The configuration: its defaults, and what may change between runs.

A file in configs/ calls `defaults()` and changes what differs; the command line changes
it again (`--config.optim.learning_rate=1e-3`); `config_checks.finalize` then derives
what was left open and checks everything, in sentences.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_flax import attention
from sparse_flax.errors import UserError
from sparse_flax.model import ModelConfig

# What may not change when a run goes on: parameter shapes, what they mean, data order.
# The data themselves are compared by content, so that a moved file is still the same.
FIXED = (
    "seed",
    "train.batch_size",
    "model.context",
    "model.layers",
    "model.width",
    "model.heads",
    "model.qk_width",
    "model.feed_forward",
    "model.patterns",
    "model.position_shape",
    "model.init",
    "model.embedding_std",
)


def defaults() -> ConfigDict:
    """Return every option with its default; configs/ change what differs."""
    return ConfigDict(
        {
            "seed": 0,  # of parameters, data order and dropout
            "data": {
                # stdlib | enwik8 | text8 | bytes | cifar10 | imagenet64 | images |
                # audio | tfds:NAME
                "name": "bytes",
                "path": "",  # a file or folder; '': data.folder, of tfds: TFDS' own
                "folder": "data",  # where downloads and the cache are looked for
                "kind": "",  # text | image | audio; '': as the name says, of tfds: text
                "size": 0,  # of images, height and width; 0: 32 or 64 by their name
                "rate": 12000,  # of audio, samples a second
                "bad_files": "skip",  # skip | refuse images or audio that do not read
            },
            "model": {
                "context": 2048,  # tokens
                "layers": 4,
                "width": 128,
                "heads": 4,
                "qk_width": 0,  # of all heads; 0: width ("half-size": width / 2)
                "feed_forward": 0,  # 0: 4 * width ("half-size": 2 * width)
                "patterns": "Fixed(128, 32, rotate=True)",  # one, or a cycle of layers
                "position_shape": (),  # table sizes; (): rows and columns of a stride
                "dropout": 0.0,  # at the end of each residual branch
                "init": "code",  # code | paper: see model.py
                "embedding_std": 0.0,  # of embeddings at the start; 0: as init says
                "dtype": "bfloat16",  # bfloat16 | float16 | float32, of activations
                "remat": "full",  # or another of model.REMAT, such as attention+mlp
                "unroll": 1,  # cycles a turn of the loop: faster, slow to compile
                "attention": "",  # an implementation by name; '' picks
            },
            "optim": {
                "learning_rate": 5e-4,  # at the end of warm-up
                "embedding_rate": 1.0,  # times learning_rate, of embeddings and logits
                "warmup_steps": 5000,  # linear; then cosine to 0 at train.steps
                "beta1": 0.9,
                "beta2": 0.999,
                "epsilon": 1e-8,
                "weight_decay": 0.01,  # decoupled, on matrices and tables
                "clip_norm": 1.0,  # global norm of the gradient
                "ema_decay": 0.999,  # of averaged weights, after a ramp
                "loss_scale": 65536.0,  # of float16 at step 0; then in the checkpoint
            },
            "train": {
                "steps": 1000,
                "batch_size": 8,  # sequences
                "accumulate": 1,  # micro-batches that a step is split into
            },
            "eval": {
                "every_steps": 1000,  # 0: before the first step and at the end alone
                "batch_size": 0,  # 0: that of a micro-batch of training
                "max_windows": 0,  # of a split, spread evenly; 0: all of it
                "weights": "ema",  # ema | raw
                "split": "test",  # test | validation; --mode=eval alone
                "min_context": 0,  # bytes seen by each byte scored; --mode=eval alone
                "prompt_bytes": 256,  # of validation text, before the sample
                "sample_bytes": 256,  # sampled at the end; 0: none
                "samples": 1,  # different ones, of the same prompt
            },
            "sample": {  # of --mode=sample; the weights are those of eval.weights
                "prompt": "",  # what to continue; '': from the start of a window
                "prompt_file": "",  # or the file that holds it: text, picture or sound
                "count": 256,  # bytes of text
                "rows": 0,  # of images: first rows given, of held-out ones; 0: none
                "given_seconds": 0.0,  # of audio: first ones given, of held-out clips
                "seconds": 0.0,  # of audio, to sample; 0: as many as fit
                "number": 1,  # of samples
                "temperature": 1.0,  # divides the logits; the paper's is 1
                "top_k": 0,  # of so many of the likeliest bytes only; 0: of all
                "top_p": 1.0,  # then of the likeliest that have this share
                "seed": 0,  # of the first sample; the next ones have the next
            },
            "checkpoint": {
                "every_steps": 1000,  # 0: at the end and on a signal alone
                "keep": 3,  # the newest ones
            },
            "log": {
                "every_steps": 10,
                "tensorboard": True,
            },
            "mesh": {  # devices along each axis: see sharding.py
                "data": 1,
                "fsdp": 1,
                "tensor": 1,
                "context": 1,
            },
        }
    )


def completed(saved: dict[str, Any]) -> ConfigDict:
    """Return a configuration that was saved as JSON; what is newer has its default.

    Raises UserError where a value is of another type, as after damage.
    """
    flat, config = flatten(saved), defaults()
    for name, default in flatten(config.to_dict()).items():
        value = flat.get(name, default)
        # JSON has no tuples.
        value = tuple(value) if isinstance(value, list) else value
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError):
            raise UserError(
                f"{name}={value!r} in the saved config.json is no "
                f"{type(default).__name__}; bring back the file as it was written, or "
                f"put {default!r} there if that is what it was"
            ) from None
    return config


def check_preset(preset: str, *presets: str) -> str:
    """Return the preset of `--config=FILE:PRESET` if the file has it.

    Raises UserError, naming those that there are, if not.
    """
    if preset and preset not in presets:
        there = ", ".join(repr(name) for name in presets) or "none"
        raise UserError(f"preset {preset!r} does not exist; this config has: {there}")
    return preset


def model_config(config: ConfigDict) -> ModelConfig:
    """Return the architecture that a finalized configuration describes."""
    m = config.model
    return ModelConfig(
        context=m.context,
        layers=m.layers,
        width=m.width,
        heads=m.heads,
        qk_width=m.qk_width,
        feed_forward=m.feed_forward,
        patterns=attention.parse(m.patterns),
        position_shape=tuple(m.position_shape),
        dropout=m.dropout,
        init=m.init,
        embedding_std=m.embedding_std,
        dtype=m.dtype,
        remat=m.remat,
        unroll=m.unroll,
        implementation=m.attention or None,
    )


def attention_shapes(
    config: ConfigDict,
) -> tuple[list[jax.ShapeDtypeStruct], tuple[int, int, int]]:
    """Return q, k and v of one layer for a whole batch, and how they are cut.

    Into so many pieces of batch, tokens and heads: those of devices, and of
    micro-batches.
    """
    m, mesh, train = config.model, config.mesh, config.train
    K, V = m.qk_width // m.heads, m.width // m.heads
    arrays = [
        jax.ShapeDtypeStruct((train.batch_size, m.context, m.heads, width), m.dtype)
        for width in (K, K, V)
    ]
    shards = mesh.data * mesh.fsdp * train.accumulate, mesh.context, mesh.tensor
    return arrays, shards


def explain_attention(
    config: ConfigDict, device_kind: str | None = None
) -> list[attention.Explanation]:
    """Say what each pattern of a finalized configuration runs, and costs by the batch.

    Args:
      config: finalized.
      device_kind: as for `attention.explain`.

    Raises:
      UserError: `model.attention` names an implementation that cannot run this.
    """
    m, (arrays, shards) = model_config(config), attention_shapes(config)
    explain = functools.partial(
        attention.explain,
        device_kind=device_kind,
        implementation=m.implementation,
        shards=shards,
    )
    try:
        return [explain(pattern, *arrays) for pattern in dict.fromkeys(m.patterns)]
    except ValueError as error:
        raise UserError(f"model.attention: {error}") from None


def differences(old: dict[str, Any], new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Return both values of each option that differs, those of `FIXED` first."""
    before, after = flatten(old), flatten(new.to_dict())
    # What the run is older than was as the default is.
    usual = flatten(defaults().to_dict())
    before = {name: usual[name] for name in FIXED} | before
    names = [*FIXED, *sorted((before.keys() | after.keys()) - set(FIXED))]
    pairs = {
        name: (before.get(name, "unset"), after.get(name, "unset")) for name in names
    }
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def changes(
    old: dict[str, Any],
    new: ConfigDict,
    owner: str = "the run in this working directory",
    another: str = "another --workdir",
) -> list[str]:
    """Compare a run's saved configuration with the one it is to go on with.

    `owner` and `another` are how a sentence calls what `old` is of, and what else to
    try.

    Returns:
      A line for each option that differs, as 'train.steps: 100 -> 200'.

    Raises:
      UserError: an option in `FIXED` differs; names it and both values.
    """
    changed = differences(old, new)
    for name, (a, b) in changed.items():
        if name in FIXED:  # which come first, and the causes before what they derive
            raise UserError(
                f"{name}={b!r}, but {owner} has {name}={a!r}, which cannot change once "
                f"parameters exist; use {a!r}, or {another}"
            )
    # Data are compared by content, and the scale is in the checkpoint.
    return [
        f"{name}: {a} -> {b}"
        for name, (a, b) in changed.items()
        if not name.startswith(("data.", "sample.", "optim.loss_scale"))
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested groups into dotted names; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
