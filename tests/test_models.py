"""The trained models that come along."""

from pathlib import Path

import numpy as np
import pytest

from sparse_flax import trained
from sparse_flax.data.batches import inputs_and_targets
from sparse_flax.evaluate import cross_entropy

MODELS = Path(__file__).parents[1] / "models"
# Not from the books that it was trained on.
TEXT = (
    b"It was late in the evening when the two friends came back to the house. The door "
    b"was open, and there was no light in any of the windows; but they could hear the "
    b"voice of the old woman, who was talking to somebody in the garden."
)
ROW = 96  # bytes of 32 pixels


def bits_per_byte(name, content):
    model, _ = trained.load(MODELS / name, say=lambda line: None)
    batch = inputs_and_targets(np.frombuffer(content, np.uint8)[None])
    nats_BT = cross_entropy(model(batch["inputs_BT"]), batch["targets_BT"])
    return float(nats_BT.mean() / np.log(2))


def test_they_are_small():
    sizes = [path.stat().st_size for path in MODELS.rglob("*.safetensors")]
    assert len(sizes) == 3 and sum(sizes) < 10_000_000


@pytest.mark.parametrize(
    ("name", "content", "most"),
    [
        ("text", TEXT, 1.5),
        ("images", bytes([255]) * (16 * ROW), 0.1),  # white, as at the top
        ("audio", bytes([128]) * 2000, 0.1),  # silence
    ],
)
def test_they_know_what_they_were_trained_on(name, content, most):
    assert bits_per_byte(name, content) < most


def test_they_sample():
    model, _ = trained.load(MODELS / "text", say=lambda line: None)
    (sampled,) = model.generate([TEXT], 12, top_k=1)
    words = sampled.tobytes().decode().split()
    assert len(words) >= 2
