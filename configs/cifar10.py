r"""CIFAR-10: the paper's 59M image model (Child et al. 2019, tables 1 and 2).

    python -m sparse_flax.main --config=configs/cifar10.py --config.data.path=PATH
    python -m sparse_flax.main --config=configs/cifar10.py:laptop \
        --config.data.path=PATH

PATH is the official archive or its folder, or a folder with train_images.npy and
test_images.npy; without it they are looked for in data/, and then among the sets of
tensorflow-datasets.

Paper: 2.80 bits per dim on the test split, strided attention, 120 epochs on 8 V100s;
2,000 of the training images held out for validation. Ours: not yet trained to the end.
Chosen here, as in the authors' later code: stride 96 (a row of pixels), one layer in
four strided and the others local, batch size 16. No augmentation, as in the paper.

Presets:
    merged    every layer strided and local at once, as the paper may have meant
    laptop    2 layers and 1,200 images, for two CPU cores: some two minutes (3.5 of
              processor time; 4 min 20 s on a machine that others used, too). Ends at
              5.15 bits per dim of 32 validation images, from 8; a table of neighbouring
              pixels has 5.93 (one run)
    colab     16 layers, for Colab's free TPU, one v5e: two epochs. Compiled for one,
              never run; at a fifth of its peak it would take six minutes
    short     the model at full size for four minutes of one H200, half an epoch:
              4.436 bits per dim of 9,968 of the 10,000 test images (one run;
              log and completions in benchmarks/results/cifar10_short)
    half_hour the model at full size for half an hour of four GPUs, batch 64.
              On four H100s 1.1M tokens/s, so 36 minutes (one run, not finished)
"""

from ml_collections import ConfigDict

from sparse_flax.config import check_preset, defaults


def get_config(preset: str = "") -> ConfigDict:
    check_preset(preset, "merged", "laptop", "short", "half_hour", "colab")
    config = defaults()
    config.data.name = "cifar10"

    config.model.context = 3072
    config.model.layers = 128
    config.model.width = 256
    config.model.heads = 2
    config.model.qk_width = 128  # half-size
    config.model.feed_forward = 512  # half-size
    config.model.patterns = "Columns(96), Local(96), Local(96), Local(96)"
    if preset == "merged":
        config.model.patterns = "Strided(96)"
    config.model.position_shape = (32, 32, 3)
    config.model.dropout = 0.25

    config.optim.learning_rate = 3.5e-4
    config.optim.warmup_steps = 5000
    config.optim.weight_decay = 0.01

    config.train.batch_size = 16
    config.train.steps = 360_000  # 120 epochs of 48,000 images
    config.eval.every_steps = 3000  # an epoch
    config.eval.sample_bytes = 0
    if preset == "laptop":
        shrink(config)
    if preset == "short":
        hurry(config)
    if preset == "half_hour":
        for_half_an_hour(config)
    if preset == "colab":
        for_colab(config)
    return config


def hurry(config: ConfigDict) -> None:
    """Learn fast, for some minutes of one GPU: an epoch, so nothing to regularise."""
    config.model.dropout = 0.0
    config.model.embedding_std = 0.1
    config.model.remat = "attention+mlp"

    config.optim.learning_rate = 1e-3
    config.optim.embedding_rate = 3.0
    config.optim.warmup_steps = 100
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.98

    config.train.batch_size = 32
    config.train.steps = 860
    config.eval.every_steps = 250
    config.eval.max_windows = 256
    config.checkpoint.every_steps = 250


def for_half_an_hour(config: ConfigDict) -> None:
    """Learn fast, on four GPUs: 16 epochs, so still nothing to regularise."""
    hurry(config)
    config.model.unroll = 32  # no loop over layers: a third less memory traffic
    config.mesh.data = 4

    config.optim.learning_rate = 8e-4
    config.optim.warmup_steps = 500
    config.optim.ema_decay = 0.99

    config.train.batch_size = 64
    config.train.steps = 12_000
    config.eval.batch_size = 64
    config.eval.every_steps = 1000
    config.eval.max_windows = 512
    config.checkpoint.every_steps = 1000
    config.sample.rows = 16


def for_colab(config: ConfigDict) -> None:
    """Make it a model for some minutes of one small TPU."""
    config.model.layers = 16
    config.model.patterns = "Local(96), Columns(96)"
    config.model.embedding_std = 0.1
    config.model.dropout = 0.0  # two epochs: nothing to regularise
    config.model.remat = "attention+mlp"

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 150
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.99

    config.train.batch_size = 32
    config.train.steps = 3000
    config.eval.every_steps = 500
    config.eval.max_windows = 256
    config.checkpoint.every_steps = 500


def shrink(config: ConfigDict) -> None:
    """Make it a small model, for two CPU cores."""
    config.model.layers = 2
    config.model.width = 96
    config.model.heads = 3
    config.model.qk_width = 96
    config.model.feed_forward = 256
    config.model.patterns = "Local(96), Columns(96)"
    config.model.dropout = 0.0
    config.model.embedding_std = 0.1
    config.model.remat = "none"
    config.model.dtype = "float32"  # CPUs have no fast bfloat16

    config.optim.learning_rate = 4e-3
    config.optim.embedding_rate = 6.0  # a short run: see sparse_flax/optim.py
    config.optim.warmup_steps = 20
    config.optim.beta2 = 0.95

    config.train.batch_size = 2
    config.train.steps = 600
    config.eval.every_steps = 300
    config.eval.max_windows = 32
    config.checkpoint.every_steps = 300
