"""enwik8: the paper's 95M byte-level text model (Child et al. 2019, tables 1 and 2).

    python -m sparse_flax.main --config=configs/enwik8.py
    python -m sparse_flax.main --config=configs/enwik8.py --config.data.path=FILE

Paper: 0.99 bits per byte on the test split, fixed pattern with block 128 and summary
32, merged heads, different slices for different heads; 8 V100s, 80 epochs. Ours: not
yet trained to the end. Not in the paper, chosen here: batch size and learning rate
(that of a dense example by the same authors).

Presets:
    shared    all heads use the last slice of each block
    colab     a quarter of the layers and a third of the context, all heads with the
              last slice, for Colab's free TPU, one v5e: an epoch. Compiled for one,
              never run; at a fifth of its peak it would take seven minutes
"""

from ml_collections import ConfigDict

from sparse_flax.config import check_preset, defaults


def get_config(preset: str = "") -> ConfigDict:
    rotate = check_preset(preset, "shared", "colab") == ""
    config = defaults()
    config.data.name = "enwik8"

    config.model.context = 12288
    config.model.layers = 30
    config.model.width = 512
    config.model.heads = 8
    config.model.patterns = f"Fixed(128, 32, rotate={rotate})"
    config.model.dropout = 0.4

    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 5000
    config.optim.weight_decay = 0.01

    config.train.batch_size = 8
    config.train.steps = 73_242  # 80 epochs of 90 MB
    config.eval.every_steps = 1000
    config.eval.max_windows = 64  # the whole split is 407
    config.checkpoint.every_steps = 500
    if preset == "colab":
        for_colab(config)
    return config


def for_colab(config: ConfigDict) -> None:
    """Make it a model for some minutes of one small TPU."""
    config.model.context = 4096
    config.model.layers = 8
    config.model.embedding_std = 0.1
    config.model.dropout = 0.0  # an epoch: nothing to regularise
    config.model.remat = "attention+mlp"

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 150
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.99

    config.train.batch_size = 16
    config.train.steps = 1373
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 250
