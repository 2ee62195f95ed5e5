"""CIFAR-10: the paper's 59M image model (Child et al. 2019, tables 1 and 2).

    python -m sparse_flax.main --config=configs/cifar10.py --mode=dry_run

Paper: 2.80 bits per dim on the test split, strided attention, 120 epochs on 8 V100s.
Chosen here, as in the authors' later code: stride 96 (a row of pixels), one layer in
four strided and the others local, batch size 16.

The model builds and --mode=dry_run prints its size. It cannot be trained yet: nothing
here reads images.
"""

from ml_collections import ConfigDict

from sparse_flax.config import check_preset, defaults


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset)
    config = defaults()
    config.data.name = "cifar10"

    config.model.context = 3072
    config.model.layers = 128
    config.model.width = 256
    config.model.heads = 2
    config.model.qk_width = 128  # half-size
    config.model.feed_forward = 512  # half-size
    config.model.patterns = "Columns(96), Local(96), Local(96), Local(96)"
    config.model.position_shape = (32, 32, 3)
    config.model.dropout = 0.25

    config.optim.learning_rate = 3.5e-4
    config.optim.warmup_steps = 5000
    config.optim.weight_decay = 0.01

    config.train.batch_size = 16
    config.train.steps = 360_000  # 120 epochs of 48,000 images
    config.eval.sample_bytes = 0
    return config
