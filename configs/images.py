r"""Pictures of your own: the paper's image model, on a folder of any pictures.

    python -m sparse_flax.main --config=configs/images.py --config.data.size=64 \
        --config.data.path=FOLDER
    python -m sparse_flax.main --config=configs/images.py:laptop \
        --config.data.path=FOLDER

The middle square of each picture is scaled to data.size x data.size pixels. Sub-folders
train, validation and test are the splits, where they are there; else 90/5/5 by a hash
of the names. FOLDER may also hold train.npy and so on, uint8 [N, size, size, 3]; and
--config.data.name=tfds:NAME reads a set of tensorflow-datasets instead.

Not in the paper. Chosen here: half the layers of the paper's model of CIFAR-10, with
its stride, a row of pixels; little dropout.

Presets:
    laptop    a small model of 32 x 32 pixels, for CPUs: that of cifar10.py:laptop
    small     1.4M parameters, 32 x 32 pixels: models/images, see models/README.md
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from sparse_flax.config import check_preset

# By its path: a config is a file, which may be read from any folder.
CIFAR10 = runpy.run_path(str(Path(__file__).with_name("cifar10.py")))


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset, "laptop", "small")
    config = CIFAR10["get_config"]("laptop" if preset == "laptop" else "")
    config.data.name = "images"
    config.data.kind = "image"  # also of a set of tensorflow-datasets, tfds:NAME
    config.data.size = 32

    # All that follows from the size does so after the command line has changed it.
    size = config.data.get_ref("size")
    row = (size * 3).to_str()
    config.model.context = size * size * 3
    config.model.position_shape = ()  # rows, columns and colours
    if preset == "laptop":
        config.model.patterns = "Local(" + row + "), Columns(" + row + ")"
        return config
    local = ", Local(" + row + ")"
    config.model.patterns = "Columns(" + row + ")" + local + local + local
    config.model.layers = 64
    config.model.dropout = 0.1
    config.train.steps = 100_000
    if preset == "small":
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Make it a small model, for some minutes of one GPU."""
    config.model.layers = 8
    config.model.width = 128
    config.model.heads = 2
    config.model.qk_width = 128
    config.model.feed_forward = 384
    config.model.embedding_std = 0.1
    config.model.remat = "none"
    config.model.unroll = 2

    config.optim.learning_rate = 2e-3
    config.optim.embedding_rate = 3.0
    config.optim.warmup_steps = 100
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.99

    config.train.batch_size = 32
    config.train.steps = 9850
    config.eval.every_steps = 500
    config.checkpoint.every_steps = 500
