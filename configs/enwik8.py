"""enwik8: the paper's 95M byte-level text model (Child et al. 2019, tables 1 and 2).

    python -m sparse_flax.main --config=configs/enwik8.py
    python -m sparse_flax.main --config=configs/enwik8.py --config.data.path=FILE

Paper: 0.99 bits per byte on the test split, fixed pattern with block 128 and summary
32, merged heads, different slices for different heads; 8 V100s, 80 epochs. Ours: not
yet trained to the end. Not in the paper, chosen here: batch size and learning rate
(that of a dense example by the same authors).

Presets:
    shared    all heads use the last slice of each block
"""

from ml_collections import ConfigDict

from sparse_flax.config import check_preset, defaults


def get_config(preset: str = "") -> ConfigDict:
    rotate = check_preset(preset, "shared") != "shared"
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
    return config
