"""Exported models: written small, read back, and sampled as text, images and audio."""

import json
import shutil
import wave

import jax
import numpy as np
import pytest
from conftest import noisy_model
from PIL import Image

from sparse_flax import config as config_lib
from sparse_flax import exported, generate
from sparse_flax.config_checks import finalize
from sparse_flax.data import sources
from sparse_flax.errors import UserError
from sparse_flax.sample_images import MARK, UNKNOWN, make_sheet
from sparse_flax.sample_run import SampleRun
from sparse_flax.saved_config import get_config

SIZE, RATE = 4, 16  # pixels, samples a second: 48 bytes are an image and 3 seconds


def tiny(kind):
    config = config_lib.defaults()
    config.data.name = {"text": "bytes", "image": "images", "audio": "audio"}[kind]
    if kind == "image":
        config.data.size = SIZE
    if kind == "audio":
        config.data.rate = RATE
    config.model.update(context=48, layers=1, width=16, heads=2, dtype="float32")
    config.model.patterns = "Local(8)"
    return config


@pytest.fixture(scope="module", params=["text", "image", "audio"])
def exported_model(request, tmp_path_factory):
    """A kind of data, and the folder of a model of it."""
    folder = tmp_path_factory.mktemp("models") / request.param
    config, _ = finalize(tiny(request.param))
    model = noisy_model(config_lib.model_config(config))
    about = {"step": 7, "data": {"fingerprint": "of other data"}}
    exported.save(folder, jax.tree.map(jax.numpy.asarray, model), config, about)
    return request.param, folder


def sampled(folder, out, **options):
    config = get_config(f"model:{folder}")
    for name, value in options.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    SampleRun(config, str(out), model=str(folder), say=(lines := []).append).run()
    return "\n".join(lines).splitlines()


def recording(path, seconds):
    x = np.sin(np.arange(seconds * RATE * 500) / 700)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE * 500)
        file.writeframes((x * 20_000).astype("<i2").tobytes())


def levels(path):
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels()) == (RATE, 1)
        return np.frombuffer(file.readframes(10**6), "<i2")


def test_reads_back_what_it_wrote_in_half_the_bytes(exported_model):
    kind, folder = exported_model
    config, _ = finalize(tiny(kind))
    model, read = noisy_model(config_lib.model_config(config)), exported.load(folder)
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(read), strict=True):
        assert y.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=2**-8)
    np.testing.assert_array_equal(model.norm_scale_D[...], read.norm_scale_D[...])
    four_bytes_each = sum(x.nbytes for x in jax.tree.leaves(model))
    assert (folder / "model.safetensors").stat().st_size < 0.7 * four_bytes_each
    assert json.loads((folder / "config.json").read_text())["step"] == 7
    assert get_config(f"model:{folder}").model.context == 48


def test_an_export_needs_no_more_devices_than_one(tmp_path):
    config = tiny("text")
    config.train.batch_size, config.mesh.data = 8, 4
    config, _ = finalize(config)
    model = noisy_model(config_lib.model_config(config))
    exported.save(tmp_path, model, config, {"step": 7})
    assert get_config(f"model:{tmp_path}").mesh.data == 1


def test_samples_every_kind_alike_from_the_same_seed(exported_model, tmp_path):
    kind, folder = exported_model
    options = {"sample__number": 3, "eval__split": "test"}
    options |= {"sample__count": 20} if kind == "text" else {}
    names = {"text": ["txt"], "image": ["png"], "audio": ["1.wav", "2.wav", "3.wav"]}
    runs = []
    for out in ("a", "b", "c"):
        seed = {"sample__seed": 1} if out == "c" else {}
        lines = sampled(folder, tmp_path / out, **options | seed)
        assert lines[0].endswith(f"{folder} (step 7)")
        files = sorted((tmp_path / out).iterdir())
        assert all(
            file.name.endswith(name)
            for file, name in zip(files, names[kind], strict=True)
        )
        runs.append([file.read_bytes() for file in files])
    assert runs[0] == runs[1] != runs[2]
    if kind == "audio":
        assert runs[0][1] == runs[2][0]  # a sample's seed is the one after the last's
        assert levels(tmp_path / "a" / "generated-1.wav").size == 48


@pytest.mark.parametrize("exported_model", ["text"], indirect=True)
def test_stopped_before_the_first_byte_it_writes_nothing(exported_model, tmp_path):
    _, folder = exported_model
    config = get_config(f"model:{folder}")
    config.sample.count = 9
    run = SampleRun(config, str(tmp_path), model=str(folder), say=(lines := []).append)
    run.stop.signal = "SIGTERM"
    run.run()
    assert lines[-1] == "stopped by SIGTERM" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("exported_model", ["text"], indirect=True)
def test_stopped_later_it_writes_what_there_is_and_says_how_much(
    exported_model, tmp_path, monkeypatch
):
    _, folder = exported_model
    config = get_config(f"model:{folder}")
    config.sample.count = 9
    monkeypatch.setattr("sparse_flax.generate.BYTES_PER_CALL", 4)
    run = SampleRun(config, str(tmp_path), model=str(folder), say=(lines := []).append)
    sample = generate._sample

    def stopped_meanwhile(*args, **options):
        run.stop.signal = "SIGINT"
        return sample(*args, **options)

    stopped_meanwhile.lower = sample.lower
    monkeypatch.setattr("sparse_flax.generate._sample", stopped_meanwhile)
    run.run()
    assert "stopped by SIGINT after 4 of 9 bytes" in lines
    assert len((tmp_path / "generated.txt").read_bytes()) == 4


def test_what_belongs_to_another_kind_is_a_sentence(exported_model, tmp_path):
    kind, folder = exported_model
    for of, name, value in (
        ("image", "rows", 2),
        ("audio", "given_seconds", 1.0),
        ("text", "prompt", "x"),
        ("text", "count", 9),
    ):
        if of != kind:
            sentence = rf"sample\.{name}={value} is for .*{of}"
            with pytest.raises(UserError, match=sentence):
                sampled(folder, tmp_path, **{f"sample__{name}": value})


@pytest.mark.parametrize("exported_model", ["image"], indirect=True)
def test_images_are_completed_and_the_given_rows_are_marked(exported_model, tmp_path):
    _, folder = exported_model
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    pixels = rng.integers(0, 256, (30, SIZE, SIZE, 3)).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "data" / f"{number}.png")
    data = {"data__path": str(tmp_path / "data"), "data__folder": str(tmp_path)}
    lines = sampled(folder, tmp_path / "out", sample__rows=2, sample__number=1, **data)
    assert "the first 2 of 4 rows" in lines[-2]
    sheet = np.asarray(Image.open(tmp_path / "out" / "generated.png"))
    # 4 pixels are shown 24 times as large, in three tiles, with gaps of 4.
    start, ours, original = (sheet[16::24, x + 16 :: 24][:4, :4] for x in (0, 100, 200))
    assert any((original == image).all() for image in pixels)
    np.testing.assert_array_equal(ours[:2], original[:2])
    np.testing.assert_array_equal(start[:2], original[:2])
    assert (start[2:] == UNKNOWN).all() and not (ours[2:] == original[2:]).all()
    orange = (sheet == MARK).all(axis=-1)
    assert set(np.flatnonzero(orange.any(axis=1))) == set(range(4, 4 + 2 * 24))
    # Of a file, several different ways.
    file = {"sample__prompt_file": str(tmp_path / "data" / "3.png")}
    sampled(folder, tmp_path / "out", sample__rows=3, sample__number=2, **file)
    for wrong, sentence in (
        ({"sample__rows": 4}, r"sample\.rows=4 leaves nothing .* try sample\.rows=2"),
        (file, r"sample\.rows=0 rows of it; try sample\.rows=2"),
        (data | {"sample__rows": 1, "sample__number": 99}, "number=99 is more than"),
        ({"sample__rows": 1, "sample__prompt_file": __file__}, "is not a picture"),
        ({"sample__rows": 1, "sample__prompt_file": "none"}, "none cannot be read"),
    ):
        with pytest.raises(UserError, match=sentence):
            sampled(folder, tmp_path / "out", **wrong)


def test_sheets_are_about_square_and_hold_every_image():
    images = [np.full((32, 32, 3), 3 * n, np.uint8) for n in range(5)]
    sheet = make_sheet(images)
    assert sheet.shape == (3 * 100 + 4, 2 * 100 + 4, 3)
    assert {3 * n for n in range(5)} <= set(sheet[..., 0].ravel())
    assert not (sheet == MARK).all(axis=-1).any()


@pytest.mark.parametrize("exported_model", ["audio"], indirect=True)
def test_audio_goes_on_from_what_is_given(exported_model, tmp_path):
    _, folder = exported_model
    recording(tmp_path / "long.wav", 100)
    data = {"data__path": str(tmp_path / "long.wav"), "data__folder": str(tmp_path)}
    two = {"sample__number": 1, "sample__given_seconds": 1.0, "sample__seconds": 1.5}
    lines = sampled(folder, tmp_path / "out", **data | two)
    assert "1.00 s given, sampled to 2.50 s" in lines[-2] and "test" in lines[-1]
    assert levels(tmp_path / "out" / "generated-1.wav").size == 40
    # Held out of other data may have been trained on.
    note = "long.wav (1 recordings, 1.7 minutes at 16 Hz): test is not of the bytes"
    assert note in "\n".join(lines)
    same = shutil.copytree(folder, tmp_path / "same")
    config = config_lib.defaults().data
    config.update(name="audio", kind="audio", rate=RATE)
    config.update(path=data["data__path"], folder=data["data__folder"])
    digest = sources.load(config).fingerprint
    text = (same / "config.json").read_text()
    (same / "config.json").write_text(text.replace("of other data", digest))
    lines = sampled(same, tmp_path / "out", **data | two)
    assert "NOTE" not in "\n".join(lines) and "(step 7)" in lines[0]
    # What is too short to be one sample is not taken for 0, all that fits.
    sampled(folder, tmp_path / "tiny", sample__seconds=1e-4)
    assert levels(tmp_path / "tiny" / "generated-1.wav").size == 1
    recording(tmp_path / "brief.wav", 12)
    brief = data | two | {"data__path": str(tmp_path / "brief.wav")}
    with pytest.raises(UserError, match="fewer than the 48 bytes of one piece"):
        sampled(folder, tmp_path / "out", **brief)
    file = {"sample__prompt_file": str(tmp_path / "long.wav")}
    sampled(folder, tmp_path / "out", **file | two | {"sample__number": 2})
    first, second = (
        levels(tmp_path / "out" / f"generated-{number}.wav") for number in (1, 2)
    )
    np.testing.assert_array_equal(first[:16], second[:16])
    # mu-law keeps about one part in 50.
    wave_16 = 20_000 * np.sin(np.arange(16) * 500 / 700)
    np.testing.assert_allclose(first[4:12], wave_16[4:12], atol=4000)
    assert (first[16:] != second[16:]).any()
    recording(tmp_path / "short.wav", 2)
    short = {"sample__prompt_file": str(tmp_path / "short.wav")}
    for wrong, sentence in (
        ({"sample__seconds": 4.0}, r"3\.00 seconds .* try sample\.seconds=3 "),
        ({"sample__given_seconds": 3.0}, r"do not fit.*; try .*given_seconds=1\.5 and"),
        ({"data__rate": 2 * RATE}, r"rate=32, but .* with data\.rate=16; use 16"),
        (file, r"given_seconds=0 of it; try sample\.given_seconds=1\.5"),
        (short | {"sample__given_seconds": 2.5}, r"more than the 2\.00 seconds"),
        ({"sample__given_seconds": 1.0, "sample__prompt_file": __file__}, "give anot"),
    ):
        with pytest.raises(UserError, match=sentence):
            sampled(folder, tmp_path / "out", **wrong)


@pytest.mark.parametrize("exported_model", ["text"], indirect=True)
def test_what_is_damaged_or_another_models_is_a_sentence(exported_model, tmp_path):
    _, folder = exported_model
    with pytest.raises(UserError, match=r"width=32, but the model .*width=16"):
        sampled(folder, tmp_path, model__width=32, model__qk_width=32)
    with pytest.raises(UserError, match=r"holds no exported model .*--mode=export"):
        sampled(tmp_path / "none", tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((folder / name).read_bytes())
    record = json.loads((broken / "config.json").read_text())
    for damage, sentence in (
        ({"config": record["config"] | {"seed": "x"}}, "seed='x' .* is no int"),
        ({"config": []}, "is not the configuration of a sparse_flax model"),
        ({"step": None}, "is not the configuration of a sparse_flax model"),
        ({"format": "sparse_flax run"}, "a sparse_flax run, which --workdir names"),
    ):
        damaged = {k: v for k, v in (record | damage).items() if v is not None}
        (broken / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=sentence):
            sampled(broken, tmp_path, sample__count=9)
    (broken / "config.json").write_text(json.dumps(record))
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not what was exported"):
        sampled(broken, tmp_path, sample__count=9)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        sampled(broken, tmp_path, sample__count=9)
