"""ImageNet 64x64: the paper's 152M image model (Child et al. 2019, table 1).

    python -m sparse_flax.main --config=configs/imagenet64.py --config.data.path=PATH

PATH is where tensorflow-datasets has downsampled_imagenet/64x64, a folder with the npz
batches of image-net.org (other images than the paper's, which score lower), or a folder
of pictures; without it they are looked for in data/imagenet64, and then in
tensorflow-datasets' own folder.

Paper: 3.44 bits per dim, strided attention with stride 128, 70 epochs, 7 days on 64
V100s. Ours: not yet trained. As in the authors' later code, where the paper is silent:
the order of the layers, batch size 128, the learning rate, 50,000 of the training
images held out for validation, and the public validation images to test on.

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
    config.eval.every_steps = 5000
    config.eval.max_windows = 2000  # of validation's 50,000; 0 for what is reported
    config.eval.sample_bytes = 0
    return config
