"""The enwik8 model on a text of your own, split 90/5/5.

    python -m sparse_flax.main --config=configs/books.py --config.data.path=FILE
    python -m sparse_flax.main --config=configs/books.py:short --config.data.path=FILE
    python -m sparse_flax.main --config=configs/books.py:small --config.data.path=FILE

Not in the paper. FILE may be any file, or a folder of files.

Presets:
    shared    all heads use the last slice of each block
    short     nine minutes on one H100: 1,350 steps of 98,304 bytes, 1.5 epochs, end at
              2.320 bits per byte of the test split (one run; curve in the README)
    small     2.1M parameters, 4,096 bytes of context: models/text, see models/README.md
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from sparse_flax.config import check_preset

# By its path: a config is a file, which may be read from any folder.
ENWIK8 = runpy.run_path(str(Path(__file__).with_name("enwik8.py")))


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset, "shared", "short", "small")
    config = ENWIK8["get_config"]("shared" if preset == "shared" else "")
    config.data.name = "bytes"
    if preset == "short":
        # Little more than an epoch: nothing to regularise, and no time to warm up.
        config.model.dropout = 0.0
        config.model.remat = "attention+mlp"
        config.model.embedding_std = 0.1
        config.optim.learning_rate = 1e-3
        config.optim.warmup_steps = 150
        config.optim.beta2 = 0.95
        config.optim.ema_decay = 0.99
        config.train.steps = 1350
        config.eval.every_steps = 250
        config.eval.sample_bytes = 500
        config.eval.samples = 2
        config.checkpoint.every_steps = 250
    if preset == "small":
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Make it a small model, for some minutes of one GPU."""
    config.model.context = 4096
    config.model.layers = 5
    config.model.width = 192
    config.model.heads = 3
    config.model.feed_forward = 640
    config.model.patterns = "Fixed(64, 16, rotate=True)"
    config.model.dropout = 0.0
    config.model.embedding_std = 0.1
    config.model.remat = "none"
    config.model.unroll = 5

    config.optim.learning_rate = 2e-3
    config.optim.embedding_rate = 3.0
    config.optim.warmup_steps = 100
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.99

    config.train.batch_size = 32
    config.train.steps = 9300
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 500
