"""ImageNet 64x64: the paper's 152M image model (Child et al. 2019, table 1).

    python -m sparse_flax.main --config=configs/imagenet64.py --mode=dry_run

Paper: 3.44 bits per dim, strided attention with stride 128, 70 epochs, 7 days on 64
V100s. Chosen here, as in the authors' later code: the order of the layers, batch size
128 and the learning rate.

The model builds and --mode=dry_run prints its size. It cannot be trained yet: nothing
here reads images.

Presets:
    302m    96 layers, the model of the paper's samples
"""

from ml_collections import ConfigDict

from sparse_flax.config import check_preset, defaults


def get_config(preset: str = "") -> ConfigDict:
    layers = 96 if check_preset(preset, "302m") else 48
    config = defaults()
    config.data.name = "imagenet64"

    config.model.context = 12288
    config.model.layers = layers
    config.model.width = 512
    config.model.heads = 16
    config.model.patterns = "Local(128), Columns(128), Local(128), Local(128)"
    config.model.position_shape = (64, 64, 3)
    config.model.dropout = 0.01

    config.optim.learning_rate = 1.5e-4
    config.optim.warmup_steps = 5000
    config.optim.weight_decay = 0.01

    config.train.batch_size = 128
    config.train.steps = 673_285  # 70 epochs of 1,231,149 images
    config.eval.sample_bytes = 0
    return config
