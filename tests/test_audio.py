"""Recordings: decoded, resampled, mu-law bytes, split, and trained on."""

import json
import os

import numpy as np
import pytest
import soundfile
from test_config import get_config
from test_tfds import sentence

from sparse_flax.config_checks import finalize
from sparse_flax.data import audio, sources
from sparse_flax.data.audio import mulaw_decode, mulaw_encode
from sparse_flax.eval_run import EvalRun
from sparse_flax.train import Trainer

RATE = 12_000


def tone(hertz, seconds=1.0, rate=RATE, loud=0.5):
    return loud * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def record(path, samples, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


def load(root, tmp_path, rate=RATE, bad_files="skip"):
    return audio.load(str(root), str(tmp_path / "data"), rate, bad_files)


def whole(found):
    return np.concatenate([found.train, found.validation, found.test])


def pitch(samples, rate=RATE):
    """Return the loudest frequency in Hz."""
    return np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples)


# --- mu-law


def test_mulaw_is_the_law_and_its_own_inverse():
    levels = np.arange(256, dtype=np.uint8)
    samples = mulaw_decode(levels)
    assert samples.dtype == np.float32 and (np.diff(samples) > 0).all()
    assert samples[0] == -1 and samples[255] == 1
    np.testing.assert_array_equal(mulaw_encode(samples), levels)
    x = np.linspace(-1, 1, 1001)
    law = np.sign(x) * np.log(1 + 255 * np.abs(x)) / np.log(256)
    encoded = mulaw_encode(x.astype(np.float32))
    assert np.abs(encoded - 127.5 * (law + 1)).max() <= 0.5 + 1e-4
    assert encoded.dtype == np.uint8 and mulaw_encode(np.zeros(1))[0] == 128
    assert list(mulaw_encode(np.array([-9.0, 9.0]))) == [0, 255]


# --- one recording


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("a.wav", 44_100, {"subtype": "PCM_24"}),
        ("a.wav", 8_000, {"subtype": "FLOAT"}),
        ("a.flac", 12_000, {}),
        ("a.mp3", 22_050, {}),
        ("a.ogg", 48_000, {}),
        ("a.opus", 48_000, {"format": "OGG", "subtype": "OPUS"}),
    ],
)
def test_every_format_becomes_the_same_mono_tone(tmp_path, name, rate, options):
    left, right = tone(440, 2, rate), tone(440, 2, rate, loud=0.3)
    path = record(tmp_path / name, np.stack([left, right], 1), rate, **options)
    found = load(path, tmp_path)
    samples = mulaw_decode(whole(found))
    assert len(samples) == pytest.approx(2 * RATE, abs=1)
    assert pitch(samples) == pytest.approx(440, abs=1)
    middle = samples[RATE // 2 : -RATE // 2]
    assert np.abs(middle).max() == pytest.approx(0.4, abs=0.03)
    assert "1 recordings" in found.source and f"{RATE:,} Hz" in found.source


def test_what_the_new_rate_cannot_hold_is_filtered_out(tmp_path):
    both = tone(1000, 2, 48_000, loud=0.3) + tone(9000, 2, 48_000, loud=0.3)
    found = load(record(tmp_path / "a.wav", both, 48_000), tmp_path)
    samples = mulaw_decode(whole(found))
    spectrum = np.abs(np.fft.rfft(samples))
    alias = spectrum[6000 - 20 : 6000 + 20].max()  # 12,000 - 9,000
    assert pitch(samples) == pytest.approx(1000, abs=1)
    assert alias < spectrum.max() / 100


def test_a_long_recording_is_the_same_in_pieces(tmp_path, monkeypatch):
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, 50_000)
    path = record(tmp_path / "a.flac", samples, 44_100)
    once = load(path, tmp_path)
    monkeypatch.setattr(audio, "_BLOCK", 1000)  # the last piece is empty
    pieces = audio.load(str(path), str(tmp_path / "other"), RATE)
    for split in ("train", "validation", "test"):
        one, other = getattr(once, split), getattr(pieces, split)
        assert len(one) == len(other)
        # Filters that run in pieces round differently, by a level now and then.
        assert np.abs(one.astype(int) - other).max() <= 1


def make_bad(folder):
    """Write files that lie, each with what is said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 60_000)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.mp3").write_text("not a recording " * 100)
    for name in ("short.wav", "short.flac", "short.mp3", "short.ogg"):
        content = record(folder / name, noise).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 3 // 4])
    record(folder / "none.wav", noise[:0])
    bad = noise.astype(np.float32)
    record(folder / "loud.wav", bad * 20_000, subtype="FLOAT")
    bad[17] = np.nan
    record(folder / "nan.wav", bad, subtype="FLOAT")
    record(folder / "slow.wav", noise, rate=10)
    # A FLAC of few bytes that claims to last for a month.
    content = bytearray(record(folder / "month.flac", noise).read_bytes())
    content[21] = content[21] & 0xF0 | 0x8
    (folder / "month.flac").write_bytes(content)
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    (folder / "piped.flac").write_bytes(content)
    return {
        "empty.wav": "is empty",
        "text.mp3": "is no recording that can be read (",
        "short.wav": "is shorter than its header says",
        "short.flac": "is no recording that can be read (",
        "short.mp3": " of 60,",
        "short.ogg": "it is damaged",
        "none.wav": "holds no samples",
        "loud.wav": "of its samples beyond -1 and 1",
        "nan.wav": "has samples that are no numbers",
        "slow.wav": "says that it has 10 samples a second",
        "month.flac": "says that it lasts 795 hours",
        "piped.flac": "does not say how long it is",
    }


def test_files_that_lie_are_left_out_counted_or_refused(tmp_path):
    bad = make_bad(tmp_path / "all" / "bad")
    samples = tone(300)
    record(tmp_path / "all" / "good.wav", samples)
    (tmp_path / "all" / "notes.txt").write_text("not read")
    for name, said in bad.items():
        path = tmp_path / "all" / "bad" / name
        text = sentence(
            lambda path=path: load(path, tmp_path, bad_files="refuse"), said
        )
        assert text.startswith(name)
    found = load(tmp_path / "all", tmp_path)
    # What was written of a bad file before that showed is gone.
    np.testing.assert_array_equal(whole(found), mulaw_encode(as_stored(samples)))
    assert f"{len(bad)} of {len(bad) + 1} files are left out: " in found.notice
    assert "1 other files" in found.notice
    sentence(lambda: load(tmp_path / "all" / "bad", tmp_path), "no audio for train")
    (tmp_path / "none").mkdir()
    sentence(lambda: load(tmp_path / "none", tmp_path), "holds no recordings (.wav, ")
    sentence(lambda: load("", tmp_path), "data.path='' is empty")


def as_stored(samples):
    """Return samples as a WAV of 16 bits holds them."""
    return (np.rint(samples * 32767) / 32768).astype(np.float32)


def test_what_came_out_of_a_pipe_or_an_old_encoder_is_read(tmp_path):
    samples = tone(300, 3)
    content = bytearray(record(tmp_path / "all" / "a.wav", samples).read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4  # RIFF's size and that of data
    (tmp_path / "all" / "a.wav").write_bytes(content)
    found = load(tmp_path / "all", tmp_path)
    np.testing.assert_array_equal(whole(found), mulaw_encode(as_stored(samples)))
    assert "left out" not in found.notice
    (tmp_path / "all" / "a.wav").unlink()
    # An MP3 of one bit rate without its first frame, which says how many follow.
    mp3 = tmp_path / "all" / "a.mp3"
    record(mp3, samples, 44_100, bitrate_mode="CONSTANT", compression_level=0.5)
    content = mp3.read_bytes()
    second = content.index(content[:2], 4)
    id3 = b"ID3\x04\0\0\0\0\x02\x08" + bytes(2 * 128 + 8)
    mp3.write_bytes(id3 + content[second:])
    found = load(tmp_path / "all", tmp_path, bad_files="refuse")
    assert len(whole(found)) == pytest.approx(len(samples) * RATE / 44_100, rel=0.1)
    assert "1 recordings are MP3s that do not say how long they are" in found.notice
    mp3.write_bytes(id3 + content)
    assert "MP3s" not in load(tmp_path / "all", tmp_path).notice


# --- a folder


def test_few_recordings_are_each_cut(tmp_path):
    for i in range(3):
        record(tmp_path / "few" / f"{i}.wav", np.full(1000, 0.1 + 0.2 * i))
    found = load(tmp_path / "few", tmp_path)
    levels = mulaw_encode(np.float32([0.1, 0.3, 0.5]))
    for split, size in (("train", 900), ("validation", 50), ("test", 50)):
        values, counts = np.unique(getattr(found, split), return_counts=True)
        np.testing.assert_array_equal(values, levels)
        assert list(counts) == [size] * 3
    assert "with fewer than 20 recordings, each is cut" in found.notice


def test_many_recordings_stay_whole_and_in_their_split(tmp_path, monkeypatch):
    levels = np.arange(130, 250, 3, dtype=np.uint8)
    for i, loud in enumerate(mulaw_decode(levels)):
        record(tmp_path / "many" / f"{i}.wav", np.full(100 + i, loud))
    found = load(tmp_path / "many", tmp_path)

    def names(splits):
        return {
            split: {
                int(i)
                for i, level in enumerate(levels)
                if (getattr(splits, split) == level).sum() == 100 + i
            }
            for split in ("train", "validation", "test")
        }

    before = names(found)
    assert sorted(set.union(*before.values())) == list(range(40))
    assert all(before.values()) and found.notice == ""
    (tmp_path / "many" / "3.wav").unlink()
    after = names(load(tmp_path / "many", tmp_path))
    assert all(before[split] - {3} == after[split] for split in before)

    def fail(*_):
        raise AssertionError("not from the cache")

    monkeypatch.setattr(audio, "_resampled", fail)
    load(tmp_path / "many", tmp_path)
    with pytest.raises(AssertionError):  # another rate is another cache
        load(tmp_path / "many", tmp_path, rate=6000)


def test_a_recording_that_changed_is_read_again(tmp_path):
    path = record(tmp_path / "a.wav", np.full(1000, 0.1))
    before = whole(load(path, tmp_path))
    record(path, np.full(1000, 0.5))  # of the same size
    os.utime(path, ns=(1, 1))
    assert (whole(load(path, tmp_path)) != before).all()


def test_one_recording_beside_a_folder_of_others_is_cut(tmp_path):
    record(tmp_path / "all" / "train" / "a.wav", np.full(100, 0.5))
    song = record(tmp_path / "all" / "song.wav", np.full(1000, 0.1))
    assert len(load(song, tmp_path).train) == 900


def test_sub_folders_are_splits(tmp_path):
    for i, split in enumerate(("train", "validation", "test")):
        record(tmp_path / "three" / split / "a.wav", np.full(100, i / 5))
    found = load(tmp_path / "three", tmp_path)
    for i, split in enumerate(("train", "validation", "test")):
        assert set(getattr(found, split)) == {mulaw_encode(np.float32(i / 5)).item()}
    assert found.notice == ""
    for split in ("train", "test"):
        (tmp_path / "three" / split / "b.wav").touch()
    (tmp_path / "three" / "test" / "a.wav").unlink()
    said = "no audio for test that can be read (test/b.wav is empty); give better"
    sentence(lambda: load(tmp_path / "three", tmp_path), said)


# --- training


def test_what_a_config_of_audio_has():
    config, notices = finalize(get_config("music"))
    assert (config.data.kind, config.data.rate, notices) == ("audio", RATE, [])
    config = get_config("music")
    config.eval.min_context = 60_000  # a stream may have one
    assert finalize(config)[0].eval.min_context == 60_000


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
def test_the_laptop_preset_learns_music(tmp_path):
    """What music.py:laptop trains, shrunk to some seconds."""
    rng = np.random.default_rng(0)
    for i in range(4):
        notes = [tone(220 * 2 ** (n / 12), 0.2) for n in rng.integers(0, 12, 30)]
        record(tmp_path / "tunes" / f"{i}.flac", np.concatenate(notes))
    config = get_config("music", "laptop")
    config.update_from_flattened_dict(
        {
            "data.path": str(tmp_path / "tunes"),
            "data.folder": str(tmp_path / "data"),
            "model.context": 512,
            "train.steps": 150,
            "eval.every_steps": 0,
            "checkpoint.every_steps": 0,
        }
    )
    trainer = Trainer(config, str(tmp_path / "run"), say=(lines := []).append)
    trainer.run()
    EvalRun(config, str(tmp_path / "run"), say=lines.append).run()
    text = "\n".join(lines)
    assert "bits/byte" in text and "bits/dim" not in text and "bigram table" in text
    assert not os.path.exists(tmp_path / "run" / "sample.txt")
    (row,) = map(json.loads, (tmp_path / "run" / "eval.jsonl").open())
    assert row["unit"] == "bits per byte" and row["whole"]
    assert row["bytes_scored"] == len(trainer.splits.test)
    assert row["bits_per_byte"] < 8 and trainer.baseline.bits < 8
    metrics = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    scores = [r["bits_per_byte"] for r in metrics if r["split"] == "validation"]
    assert scores[0] == pytest.approx(8, abs=1e-4) and scores[-1] < scores[0] - 2
    assert sources.load(trainer.config.data).fingerprint == trainer.splits.fingerprint
