"""text8: the enwik8 model on 100 MB of lower-case letters and spaces.

    python -m sparse_flax.main --config=configs/text8.py

Not in the paper. Split 90/5/5 MB as is usual.

Presets:
    shared    all heads use the last slice of each block
    colab     for Colab's free TPU: enwik8.py:colab
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# By its path: a config is a file, which may be read from any folder.
ENWIK8 = runpy.run_path(str(Path(__file__).with_name("enwik8.py")))


def get_config(preset: str = "") -> ConfigDict:
    config = ENWIK8["get_config"](preset)
    config.data.name = "text8"
    return config
