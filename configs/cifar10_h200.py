r"""The best that we made of CIFAR-10 in minutes of one GPU: cifar10.py, scaled.

    python -m sparse_flax.main --config=configs/cifar10_h200.py \
        --config.data.path=PATH

Not in the paper. Stopped and started again (the same command) it goes on from its last
checkpoint. 14.4M parameters, 35,000 steps, 23.4 epochs: in 23 minutes of one
H100, 3.054 bits per dim of 9,968 of the 10,000 test images (one run; RESULTS.md has
more).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from sparse_flax.config import check_preset

# By its path: a config is a file, which may be read from any folder.
CIFAR10 = runpy.run_path(str(Path(__file__).with_name("cifar10.py")))


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset)
    config = CIFAR10["get_config"]("short")
    config.model.layers = 8
    config.model.width = 384
    config.model.heads = 6
    config.model.qk_width = 384
    config.model.feed_forward = 1536
    config.model.patterns = "Strided(96)"
    config.model.remat = "none"
    config.model.unroll = 8  # all: nothing is stacked for the way back

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 200
    config.optim.ema_decay = 0.99

    config.train.steps = 35_000
    config.eval.every_steps = 2000
    config.checkpoint.every_steps = 2000
    return config
