r"""Raw audio: the paper's music models (Child et al. 2019, table 4).

    python -m sparse_flax.main --config=configs/music.py --config.data.path=FOLDER
    python -m sparse_flax.main --config=configs/music.py:laptop \
        --config.data.path=FOLDER

FOLDER has WAV, FLAC, MP3 or Ogg files; they become mono 12 kHz mu-law bytes, once, in
data/cache. How they are split stands in sparse_flax/data/audio.py.

Paper: 1.97 bits per byte at 65,536 bytes (5.5 s) with 152M parameters, 2.17 at 262,144
with 25M, 2.99 at 1,048,576 with 3M, all strided, each the largest that a 16 GB V100
took; its recordings and their split are not published, so no score is comparable. Ours:
not yet trained to the end. Chosen here: sizes that have the paper's numbers of
parameters, the stride (the root of the length), local and strided layers in turn (the
paper's plain interleaving), batch size, learning rate, steps, no dropout.

Presets:
    262144     25M parameters, 20 layers, stride 512
    1048576    3M parameters, 14 layers, stride 1,024
    laptop     2 layers, windows of 4,096, for two CPU cores: some two minutes (3.7 of
               processor time; 5 min 7 s on a machine that others used, too). On eight
               minutes of music and speech, ends at 4.94 bits per byte of 32 validation
               windows, from 8; a bigram table has 5.15 (one run)
    colab      8 layers, windows of 16,384 (1.4 s), for Colab's free TPU, one v5e: 98 MB
               of sound. Compiled for one, never run; at a fifth of its peak it would
               take seven minutes
    short      12 layers of width 256 (10M parameters), the first model's length and
               stride, for three minutes of one H200: 3.315 bits per byte of the test
               parts of eight minutes of sound (one run)
    small      1.3M parameters, windows of 16,384: models/audio, see models/README.md
"""

from ml_collections import ConfigDict

from sparse_flax.config import check_preset, defaults

# context: layers, width, heads, stride, learning rate, batch size
SIZES = {
    65_536: (48, 512, 8, 256, 1.5e-4, 8),
    262_144: (20, 320, 5, 512, 3e-4, 2),
    1_048_576: (14, 128, 2, 1024, 5e-4, 1),
}


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset, "262144", "1048576", "laptop", "short", "small", "colab")
    config = defaults()
    config.data.name = "audio"

    context = int(preset) if preset.isdecimal() else 65_536
    layers, width, heads, stride, rate, batch = SIZES[context]
    config.model.context = context
    config.model.layers = layers
    config.model.width = width
    config.model.heads = heads
    config.model.patterns = f"Local({stride}), Columns({stride})"

    config.optim.learning_rate = rate
    config.optim.warmup_steps = 5000
    config.optim.weight_decay = 0.01

    config.train.batch_size = batch
    config.train.steps = 100_000
    config.eval.sample_bytes = 0
    if preset == "laptop":
        shrink(config)
    if preset in ("short", "small"):
        hurry(config)
    if preset == "small":
        config.model.context = 16_384
        config.model.layers = 6
        config.model.width = 128
        config.model.heads = 2
        config.model.patterns = "Local(128), Columns(128)"
        config.model.dropout = 0.0
        config.model.unroll = 3
        config.optim.learning_rate = 2e-3
        config.optim.warmup_steps = 50
        config.optim.ema_decay = 0.98
        config.train.batch_size = 8
        config.train.steps = 13_980
    if preset == "colab":
        for_colab(config)
    return config


def hurry(config: ConfigDict) -> None:
    """Make it a smaller model that learns fast, for some minutes of one GPU."""
    config.model.layers = 12
    config.model.width = 256
    config.model.heads = 4
    config.model.dropout = 0.1
    config.model.embedding_std = 0.1
    config.model.remat = "none"

    config.optim.learning_rate = 1.5e-3
    config.optim.embedding_rate = 3.0
    config.optim.warmup_steps = 100
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.99

    config.train.batch_size = 4
    config.train.steps = 1150
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 250


def for_colab(config: ConfigDict) -> None:
    """Make it a model for some minutes of one small TPU."""
    config.model.context = 16_384
    config.model.layers = 8
    config.model.patterns = "Local(128), Columns(128)"
    config.model.embedding_std = 0.1
    config.model.remat = "attention+mlp"

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 150
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.99

    config.train.batch_size = 4
    config.train.steps = 1500
    config.eval.every_steps = 250
    config.eval.max_windows = 64
    config.checkpoint.every_steps = 250


def shrink(config: ConfigDict) -> None:
    """Make it a small model, for two CPU cores."""
    config.model.context = 4096
    config.model.layers = 2
    config.model.width = 96
    config.model.heads = 3
    config.model.feed_forward = 256
    config.model.patterns = "Local(64), Columns(64)"
    config.model.embedding_std = 0.1
    config.model.remat = "none"
    config.model.dtype = "float32"  # CPUs have no fast bfloat16

    config.optim.learning_rate = 4e-3
    config.optim.embedding_rate = 6.0  # a short run: see sparse_flax/optim.py
    config.optim.warmup_steps = 20
    config.optim.beta2 = 0.95

    config.train.batch_size = 2
    config.train.steps = 450
    config.eval.every_steps = 150
    config.eval.max_windows = 32
    config.checkpoint.every_steps = 150
