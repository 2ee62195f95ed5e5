"""A first look: four minutes on two CPU cores, no data, no network.

    python -m sparse_flax.main --config=configs/quickstart.py

Trains a small byte-level Sparse Transformer with the fixed pattern on the source of the
Python standard library, and continues a piece of it that was held out.
"""

from ml_collections import ConfigDict

from sparse_flax.config import check_preset, defaults


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset)
    config = defaults()
    config.data.name = "stdlib"

    config.model.context = 2048
    config.model.layers = 2
    config.model.width = 128
    config.model.heads = 4
    config.model.patterns = "Fixed(64, 8, rotate=True)"
    config.model.embedding_std = 0.1
    config.model.remat = "none"
    config.model.dtype = "float32"  # CPUs have no fast bfloat16

    config.optim.learning_rate = 4e-3
    config.optim.embedding_rate = 6.0  # a short run: see sparse_flax/optim.py
    config.optim.warmup_steps = 20
    config.optim.beta2 = 0.95

    config.train.steps = 500
    config.train.batch_size = 2

    config.eval.every_steps = 250
    config.eval.max_windows = 64
    config.checkpoint.every_steps = 125
    config.eval.prompt_bytes = 200
    config.eval.sample_bytes = 200
    return config
