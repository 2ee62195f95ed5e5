"""The best that we made of a 100 MB text in minutes of one H200: books.py, scaled.

    python -m sparse_flax.main --config=configs/books_h200.py --config.data.path=FILE

Not in the paper. Stopped and started again (the same command) it goes on from its last
checkpoint. 40M parameters, 12,700 steps, 18.5 epochs: in 23 minutes of one H200 1.260
bits per byte of the whole test split of 100 MB of books (one run; RESULTS.md has more).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from sparse_flax.config import check_preset

# By its path: a config is a file, which may be read from any folder.
BOOKS = runpy.run_path(str(Path(__file__).with_name("books.py")))


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset)
    config = BOOKS["get_config"]("small")
    config.model.layers = 8
    config.model.width = 640
    config.model.heads = 10
    config.model.feed_forward = 2560
    config.model.dropout = 0.15
    config.model.patterns = "Fixed(128, 32, rotate=True)"
    config.model.unroll = 8  # all: nothing is stacked for the way back
    config.optim.learning_rate = 1.5e-3
    config.optim.warmup_steps = 300
    config.optim.weight_decay = 0.1
    config.train.steps = 12700
    config.eval.every_steps = 1000
    config.eval.sample_bytes = 1000
    config.eval.samples = 2
    config.checkpoint.every_steps = 1000
    return config
