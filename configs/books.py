"""The enwik8 model on a text of your own, split 90/5/5 (written for 100 MB of books).

    python -m sparse_flax.main --config=configs/books.py --config.data.path=FILE

Not in the paper. FILE may be any file, or a folder of files.

Presets:
    shared    all heads use the last slice of each block
"""

from ml_collections import ConfigDict

from configs import enwik8


def get_config(preset: str = "") -> ConfigDict:
    config = enwik8.get_config(preset)
    config.data.name = "bytes"
    config.data.path = "data/books100.txt"
    return config
