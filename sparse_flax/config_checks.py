"""Every check of a configuration, each with its sentence."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from sparse_flax import attention
from sparse_flax.attention import parallel
from sparse_flax.config import defaults, flatten
from sparse_flax.data.bytes import NAMES
from sparse_flax.data.prepared import PREFIX
from sparse_flax.errors import UserError
from sparse_flax.evaluate import UNITS
from sparse_flax.model import INITS, REMAT, VOCABULARY
from sparse_flax.state import WEIGHTS

DTYPES = ("bfloat16", "float16", "float32")
EVAL_SPLITS = ("test", "validation")
KINDS = {"cifar10": "image", "imagenet64": "image", "images": "image", "audio": "audio"}
SIZES = {"cifar10": 32, "imagenet64": 64}  # of images, where it is given
BAD_FILES = ("skip", "refuse")
OF_ONE_KIND = {"size": "image", "rate": "audio"}  # options of data


def finalize(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Derive what was left open and check everything.

    Returns:
      The complete configuration, and sentences about what was changed in it.

    Raises:
      UserError: the first value that breaks a rule, the rule, the nearest valid value.
    """
    config, notices = ConfigDict(config.to_dict()), []
    _check_data(config)
    _check_numbers(config)
    _check_choices(config)
    _check_model(config.model)
    _check_mesh(config)
    if config.eval.min_context >= config.model.context:
        raise UserError(
            f"eval.min_context={config.eval.min_context} must be below model.context="
            f"{config.model.context}, which is what a window holds; try "
            f"{config.model.context - 1}"
        )
    if config.eval.min_context and config.data.kind == "image":
        raise UserError(
            f"eval.min_context={config.eval.min_context} is for streams of text or "
            "audio, and each image is scored as a whole; use 0"
        )
    if config.eval.sample_bytes and config.data.kind != "text":
        notices.append(
            f"eval.sample_bytes={config.eval.sample_bytes} is for text, and "
            f"data.kind={config.data.kind!r}: nothing is sampled at the end of training"
        )
        config.eval.sample_bytes = 0
    notices += _see_everything(config.model)
    # As many rows as fit while training.
    rows = config.train.batch_size // config.train.accumulate
    config.eval.batch_size = config.eval.batch_size or rows
    sampled = config.eval.prompt_bytes + config.eval.sample_bytes
    if config.eval.sample_bytes and sampled > config.model.context:
        room = config.model.context // 2
        notices.append(
            f"eval.prompt_bytes={config.eval.prompt_bytes} and eval.sample_bytes="
            f"{config.eval.sample_bytes} do not fit model.context="
            f"{config.model.context}: using at most {room} each"
        )
        config.eval.prompt_bytes = min(config.eval.prompt_bytes, room)
        config.eval.sample_bytes = min(config.eval.sample_bytes, room)
    if config.optim.warmup_steps > config.train.steps:
        shorter = max(config.train.steps // 10, 1)
        notices.append(
            f"optim.warmup_steps={config.optim.warmup_steps:,} is longer than "
            f"train.steps={config.train.steps:,}: warming up for {shorter:,} instead"
        )
        config.optim.warmup_steps = shorter
    return config.lock(), notices


AT_LEAST_1 = [
    "model.context",
    "model.layers",
    "model.width",
    "model.heads",
    "model.unroll",
    "train.steps",
    "train.batch_size",
    "train.accumulate",
    "data.rate",
    "eval.samples",
    "sample.count",
    "sample.number",
    "checkpoint.keep",
    "log.every_steps",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.context",
]
AT_LEAST_0 = [
    "seed",
    "data.size",
    "model.qk_width",
    "model.feed_forward",
    "optim.warmup_steps",
    "optim.weight_decay",
    "model.embedding_std",
    "eval.every_steps",
    "eval.batch_size",
    "eval.max_windows",
    "eval.min_context",
    "eval.prompt_bytes",
    "eval.sample_bytes",
    "checkpoint.every_steps",
    "sample.top_k",
    "sample.rows",
    "sample.given_seconds",
    "sample.seconds",
    "sample.seed",
]
ABOVE_0 = [
    "optim.learning_rate",
    "optim.embedding_rate",
    "optim.epsilon",
    "optim.clip_norm",
    "optim.loss_scale",
    "sample.temperature",
    "sample.top_p",
]
FRACTIONS = ["model.dropout", "optim.beta1", "optim.beta2", "optim.ema_decay"]


def _check_numbers(config: ConfigDict) -> None:
    values = flatten(config.to_dict())
    for name in ("seed", "sample.seed"):  # what a JAX key takes in without loss
        if values[name] >= 2**32:
            raise UserError(
                f"{name}={values[name]} must be below 2**32; try {2**32 - 1}"
            )
    for names, low in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
        for name in names:
            if not low <= values[name] < math.inf:
                raise UserError(
                    f"{name}={values[name]} must be at least {low}; try {low}"
                )
    for name in ABOVE_0:
        if not 0 < values[name] < math.inf:
            default = flatten(defaults().to_dict())[name]
            raise UserError(f"{name}={values[name]} must be above 0; try {default}")
    most = VOCABULARY
    if values["sample.top_k"] > most:
        raise UserError(
            f"sample.top_k={values['sample.top_k']} must be at most {most}, all bytes "
            f"that there are; try {most}"
        )
    if values["sample.top_p"] > 1:
        raise UserError(
            f"sample.top_p={values['sample.top_p']} must be at most 1; try 1"
        )
    for name in FRACTIONS:
        if not 0 <= values[name] < 1:
            nearest = 0.0 if values[name] < 0 else 0.999
            raise UserError(
                f"{name}={values[name]} must be from 0 to less than 1; try {nearest}"
            )


def _check_choices(config: ConfigDict) -> None:
    for name, value, choices in (
        ("model.init", config.model.init, INITS),
        ("model.dtype", config.model.dtype, DTYPES),
        ("model.remat", config.model.remat, tuple(REMAT)),
        ("model.attention", config.model.attention, ("", *attention.IMPLEMENTATIONS)),
        ("eval.weights", config.eval.weights, tuple(WEIGHTS)),
        ("eval.split", config.eval.split, EVAL_SPLITS),
        ("data.kind", config.data.kind, ("", *UNITS)),
        ("data.bad_files", config.data.bad_files, BAD_FILES),
    ):
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise UserError(f"{name}={value!r} must be one of {listed}")


def _check_data(config: ConfigDict) -> None:
    """Derive what kind the data are of, and for images how many bytes make one."""
    data, m = config.data, config.model
    kind = KINDS.get(data.name, "text")
    if data.name not in (*NAMES, *KINDS) and not data.name.startswith(PREFIX):
        raise UserError(
            f"data.name={data.name!r} is not a data set; use "
            f"{', '.join([*NAMES, *KINDS])}, or {PREFIX}NAME"
        )
    if data.name.startswith(PREFIX) and data.kind != "audio":
        kind = data.kind or kind
    elif data.kind not in ("", kind):
        raise UserError(
            f"data.kind={data.kind!r} contradicts data.name={data.name!r}, which is "
            f"{kind!r}; use ''"
        )
    data.kind = kind
    for name, only in OF_ONE_KIND.items():
        default = defaults().data[name]
        if kind != only and data[name] != default:
            raise UserError(
                f"data.{name}={data[name]} is for data.kind={only!r}, and "
                f"data.name={data.name!r} is {kind!r}; try {default}"
            )
    if kind != "image":
        return
    fixed = SIZES.get(data.name, 0)
    data.size = data.size or fixed
    if data.size < 1 or (fixed and data.size != fixed):
        raise UserError(
            f"data.size={data.size} is no height of data.name={data.name!r}; use "
            f"{fixed or 32}"
        )
    bytes_each = 3 * data.size**2
    if m.context != bytes_each:
        raise UserError(
            f"model.context={m.context} must be the {bytes_each} bytes of an image, 3 "
            f"colours of data.size={data.size} x {data.size} pixels; use {bytes_each}"
        )
    m.position_shape = m.position_shape or (data.size, data.size, 3)


def _check_model(m: ConfigDict) -> None:
    """Check the architecture and fill in its derived widths and tables."""
    m.qk_width = m.qk_width or m.width
    m.feed_forward = m.feed_forward or 4 * m.width
    for name in ("width", "qk_width"):
        if m[name] % m.heads:
            low, high = m[name] // m.heads * m.heads, -(-m[name] // m.heads) * m.heads
            raise UserError(
                f"model.{name}={m[name]} does not divide into model.heads={m.heads}; "
                f"try {f'{low} or ' if low else ''}{high}"
            )
    try:
        patterns = attention.parse(m.patterns)
    except ValueError as error:
        raise UserError(f"model.patterns: {error}") from None
    if m.layers % len(patterns):
        n = len(patterns)
        low, high = m.layers // n * n, -(-m.layers // n) * n
        raise UserError(
            f"model.layers={m.layers} is no multiple of the {n} patterns in "
            f"model.patterns; try {f'{low} or ' if low else ''}{high}"
        )
    m.patterns = ", ".join(map(repr, patterns))
    if not m.position_shape:
        stride = min(_stride(patterns[0], m.context), m.context)
        m.position_shape = (-(-m.context // stride), stride)
    if not all(isinstance(n, int) for n in m.position_shape):
        raise UserError(
            f"model.position_shape={tuple(m.position_shape)} must be whole numbers; "
            "try () to derive them"
        )
    places = math.prod(m.position_shape)
    if min(m.position_shape) < 1 or places < m.context:
        raise UserError(
            f"model.position_shape={tuple(m.position_shape)} has {places} places for "
            f"model.context={m.context} tokens; try () to derive it"
        )


def _see_everything(m: ConfigDict) -> list[str]:
    """Return a sentence for each pattern that is dense within the context."""
    T = m.context
    return [
        f"{pattern!r} sees all of model.context={T}, as Dense() does"
        for pattern in dict.fromkeys(attention.parse(m.patterns))
        if not isinstance(pattern, attention.Dense)
        and all(
            2 * pattern.pairs(T, h) == T * (T + 1) for h in range(pattern.head_period)
        )
    ]


def _stride(pattern: attention.Pattern, context: int) -> int:
    """Return the width of the matrix that a text is laid out in (section 5.3)."""
    for name in ("block", "stride", "window"):
        if hasattr(pattern, name):
            return getattr(pattern, name)
    if isinstance(pattern, attention.PerHead):
        return _stride(pattern.patterns[0], context)
    return math.isqrt(context - 1) + 1


def _check_mesh(config: ConfigDict) -> None:
    # Last in each row: whose next multiple to try. Heads divide the width, too.
    data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    spread = config.mesh.context
    copies, width_unit = data * fsdp, math.lcm(fsdp, config.model.heads)
    for name, value, by, devices, unit in (
        (
            "train.batch_size",
            config.train.batch_size,
            "data * mesh.fsdp",
            copies,
            copies,
        ),
        ("eval.batch_size", config.eval.batch_size, "data * mesh.fsdp", copies, copies),
        ("model.width", config.model.width, "fsdp", fsdp, width_unit),
        ("model.heads", config.model.heads, "tensor", tensor, tensor),
        ("model.feed_forward", config.model.feed_forward, "tensor", tensor, tensor),
        ("model.context", config.model.context, "context", spread, spread),
    ):
        if value % devices:
            raise UserError(
                f"{name}={value} does not divide over mesh.{by}={devices}; try "
                f"{-(-value // unit) * unit}"
            )
    rows, parts = config.train.batch_size, config.train.accumulate
    if rows % (parts * copies):
        fewer = [n for n in range(1, parts) if rows % (n * copies) == 0]
        raise UserError(
            f"train.accumulate={parts} does not split train.batch_size={rows} into "
            f"equal micro-batches over mesh.data * mesh.fsdp={copies}; "
            f"try {max(fewer)}"
        )
    period = math.lcm(*(p.head_period for p in attention.parse(config.model.patterns)))
    heads, each = config.model.heads, config.model.heads // tensor
    if tensor > 1 and each % period:
        fewer = [n for n in range(1, tensor) if heads % (n * period) == 0]
        raise UserError(
            f"mesh.tensor={tensor} gives each device {each} heads, but "
            f"model.patterns repeats after {period}; try "
            f"mesh.tensor={max(fewer, default=1)}"
        )
    for pattern in attention.parse(config.model.patterns):
        if why := parallel.refusal(pattern, config.model.context, spread):
            raise UserError(f"model.patterns: {why}, or mesh.context=1")
