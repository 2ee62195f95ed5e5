"""The enwik8 model on a text of your own, split 90/5/5.

    python -m sparse_flax.main --config=configs/books.py --config.data.path=FILE

Not in the paper. FILE may be any file, or a folder of files.

Presets:
    shared    all heads use the last slice of each block
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# By its path: a config is a file, which may be read from any folder.
ENWIK8 = runpy.run_path(str(Path(__file__).with_name("enwik8.py")))


def get_config(preset: str = "") -> ConfigDict:
    config = ENWIK8["get_config"](preset)
    config.data.name = "bytes"
    return config
