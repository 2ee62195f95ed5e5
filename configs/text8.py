"""text8: the enwik8 model on 100 MB of lower-case letters and spaces.

    python -m sparse_flax.main --config=configs/text8.py

Not in the paper. Split 90/5/5 MB as is usual.

Presets:
    shared    all heads use the last slice of each block
"""

from ml_collections import ConfigDict

from configs import enwik8


def get_config(preset: str = "") -> ConfigDict:
    config = enwik8.get_config(preset)
    config.data.name = "text8"
    return config
