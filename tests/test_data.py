"""Bytes are found, checked and split; batches depend on (seed, step) alone."""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import http.server
import itertools
import lzma
import math
import os
import socket
import sysconfig
import threading
import zipfile
from collections import Counter

import numpy as np
import pytest

from sparse_flax.data import archives, batches, bigram, bytes
from sparse_flax.errors import UserError


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def numbered(size):
    """Bytes whose every four in a row, aligned, hold their own number."""
    return np.arange(size // 4, dtype=">u4").view(np.uint8)


def sentence(call, *needed):
    """Check that a call ends in one sentence that holds all that is needed."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and ". " not in text and not text.endswith(".")
    for part in needed:
        assert str(part) in text
    return text


def joined(splits):
    return np.concatenate([splits.train, splits.validation, splits.test])


# --- train batches


def source(data, *, batch_size=3, context=8, seed=0, steps=100):
    return batches.RandomWindows(
        data, batch_size=batch_size, context=context, seed=seed, steps=steps
    )


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_epoch_visits_every_window_once(batch_size):
    context, windows, epochs = 16, 11, 4
    data = numbered(context * (windows + 1) + 12)
    steps = -(-epochs * windows // batch_size)  # Most batches straddle epochs.
    records = source(data, batch_size=batch_size, context=context, steps=steps)
    assert len(records) == steps
    stream = np.concatenate([records[i] for i in range(steps)])
    where = {data[i : i + context].tobytes(): i for i in range(data.size - context + 1)}
    starts = [where[window.tobytes()] for window in stream]
    offsets, orders = set(), set()
    for epoch in range(epochs):
        visited = starts[epoch * windows : (epoch + 1) * windows]
        offset = min(visited)
        assert sorted(visited) == [offset + i * context for i in range(windows)]
        assert 0 <= offset <= data.size - windows * context
        offsets.add(offset)
        orders.add(tuple(start - offset for start in visited))
    assert len(offsets) > 1 and len(orders) == epochs


def test_random_offsets_reach_both_ends():
    data = numbered(40)
    firsts = set()
    for step in range(400):  # One window of 16 per epoch, so 25 offsets.
        firsts.add(source(data, batch_size=1, context=16, steps=400)[step].tobytes())
    assert firsts == {data[i : i + 16].tobytes() for i in range(25)}


def test_a_batch_is_a_function_of_seed_and_step():
    data = noise(1000)
    one, other = source(data), source(data)
    in_order = [one[i] for i in range(100)]
    for step in reversed(range(100)):
        np.testing.assert_array_equal(other[step], in_order[step])
    another = [source(data, seed=1)[i] for i in range(100)]
    assert not any(np.array_equal(a, b) for a, b in zip(in_order, another, strict=True))


def test_batches_never_change_between_versions():
    records = source(np.arange(100, dtype=np.uint8), seed=7)
    assert records[0][:, 0].tolist() == [56, 24, 0]
    assert records[9][:, 0].tolist() == [4, 36, 76]


@pytest.mark.parametrize("start", [0, 1, 17, 39])
def test_resuming_anywhere_gives_the_same_batches(start):
    kwargs = {"batch_size": 3, "context": 8, "seed": 5, "steps": 40}
    data = noise(333)
    records = source(data, **kwargs)
    resumed = list(batches.train_batches(data, start=start, **kwargs))
    assert len(resumed) == 40 - start
    for step, batch in enumerate(resumed, start):
        expected = batches.inputs_and_targets(records[step])
        assert batch.keys() == expected.keys()
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])


@pytest.mark.parametrize("start", [40, 41])
def test_nothing_left_to_train(start):
    kwargs = {"batch_size": 3, "context": 8, "seed": 5, "steps": 40}
    assert not list(batches.train_batches(noise(333), start=start, **kwargs))


def test_inputs_are_the_bytes_before_the_targets():
    batch = batches.inputs_and_targets(np.array([[9, 255, 0], [1, 2, 3]], np.uint8))
    assert batch["inputs_BT"].tolist() == [[256, 9, 255], [256, 1, 2]]
    assert batch["targets_BT"].tolist() == [[9, 255, 0], [1, 2, 3]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_exactly_one_window_of_data():
    data = noise(8)
    np.testing.assert_array_equal(source(data)[99], np.stack([data] * 3))


def test_too_little_data_for_a_window():
    sentence(lambda: source(noise(7)), "context=8", "context=7 or less")
    sentence(
        lambda: batches.train_batches(
            noise(7), batch_size=1, context=8, seed=0, start=0, steps=1
        ),
        "context=8",
    )


def test_seed_out_of_range():
    sentence(lambda: source(noise(9), seed=-3), "seed=-3", "use 0")
    sentence(lambda: source(noise(9), seed=2**64), f"use {2**64 - 1}")


# --- evaluation batches


@pytest.mark.parametrize("size", [1, 7, 8, 9, 24, 25, 63, 64, 65, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_holds_every_byte_once(size, batch_size):
    data = noise(size, size)
    seen, rows = [], 0
    for batch in batches.evaluation_batches(data, batch_size=batch_size, context=8):
        targets, weights = batch["targets_BT"], batch["weights_BT"]
        assert targets.shape == weights.shape == (batch_size, 8)
        assert weights.dtype == np.float32 and targets.dtype == np.int32
        assert set(np.unique(weights)) <= {0.0, 1.0}
        assert not targets[weights == 0].any()
        assert (batch["inputs_BT"][:, 0] == batches.START).all()
        np.testing.assert_array_equal(batch["inputs_BT"][:, 1:], targets[:, :-1])
        seen.append(targets[weights == 1])
        rows += int(weights.any(axis=1).sum())
    np.testing.assert_array_equal(np.concatenate(seen), data)
    assert rows == batches.evaluation_window_count(size, 8) == math.ceil(size / 8)
    assert len(seen) == math.ceil(rows / batch_size)


def test_a_few_windows_are_full_and_spread_evenly():
    data = numbered(8 * 100 + 4)
    evaluate = functools.partial(
        batches.evaluation_batches, data, batch_size=4, context=8
    )
    chosen = list(evaluate(max_windows=10))
    assert [batch["weights_BT"].sum() for batch in chosen] == [32, 32, 16]
    targets = np.concatenate([batch["targets_BT"] for batch in chosen])[:10]
    expected = [data[start : start + 8] for start in range(0, 800, 80)]
    np.testing.assert_array_equal(targets, expected)
    for max_windows in (1, 99, 100):
        total = sum(b["weights_BT"].sum() for b in evaluate(max_windows=max_windows))
        assert total == 8 * max_windows
        assert batches.evaluation_window_count(804, 8, max_windows) == max_windows
    for max_windows in (0, 101, 1000):
        total = sum(b["weights_BT"].sum() for b in evaluate(max_windows=max_windows))
        assert total == data.size
        assert batches.evaluation_window_count(804, 8, max_windows) == 101


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 24, 63, 100])
@pytest.mark.parametrize("least", range(8))
def test_with_a_minimum_of_context_every_byte_is_scored_once(size, least):
    data = np.arange(size, dtype=np.uint8)
    seen, rows = [], 0
    for batch in batches.evaluation_batches(
        data, batch_size=3, context=8, min_context=least
    ):
        for targets_T, weights_T in zip(
            batch["targets_BT"], batch["weights_BT"], strict=True
        ):
            (scored,) = np.nonzero(weights_T)
            if scored.size:
                assert scored[0] == (least if rows else 0)
                start = rows * (8 - least)  # what comes before is the real context
                expected = data[start : start + scored[-1] + 1]
                np.testing.assert_array_equal(targets_T[: scored[-1] + 1], expected)
                seen.append(targets_T[scored])
                rows += 1
    np.testing.assert_array_equal(np.concatenate(seen), data)
    assert rows == batches.evaluation_window_count(size, 8, min_context=least)


def test_a_part_gives_every_window_the_same_weight():
    data = numbered(800)
    (batch,) = batches.evaluation_batches(
        data, batch_size=10, context=8, max_windows=10, min_context=6
    )
    expected_T = [0] * 6 + [1] * 2
    np.testing.assert_array_equal(batch["weights_BT"], [expected_T] * 10)
    starts = [i * 397 // 10 * 2 for i in range(10)]
    expected = [data[start : start + 8] for start in starts]
    np.testing.assert_array_equal(batch["targets_BT"], expected)


def test_each_process_reads_its_own_rows_and_knows_the_weights_of_all():
    evaluate = functools.partial(
        batches.evaluation_batches, noise(100), batch_size=4, context=8
    )
    for whole, part in zip(evaluate(), evaluate(rows=np.array([1, 3])), strict=True):
        np.testing.assert_array_equal(part["weights_BT"], whole["weights_BT"])
        np.testing.assert_array_equal(
            part["targets_BT"][[1, 3]], whole["targets_BT"][[1, 3]]
        )
        assert not part["targets_BT"][[0, 2]].any()


# --- the bigram baseline


def test_bigram_equals_a_slow_count(monkeypatch):
    monkeypatch.setattr(bigram, "_CHUNK", 64)
    train = list(b"the cat sat on the mat, and that was that; " * 9)
    held_out = list(b"what a \xff hat the cat has, and the mat")
    singles, pairs = Counter(train), Counter(itertools.pairwise(train))
    firsts = Counter(train[:-1])

    def unigram(b):
        return (singles[b] + 1) / (len(train) + 256)

    bits = -math.log2(unigram(held_out[0]))
    for a, b in itertools.pairwise(held_out):
        bits -= math.log2((pairs[a, b] + 16 * unigram(b)) / (firsts[a] + 16))
    found = bigram.bigram_bits_per_byte(
        np.array(train, np.uint8), np.array(held_out, np.uint8)
    )
    assert found == pytest.approx(bits / len(held_out), rel=1e-12)


def test_pairs_of_sequences_equal_a_slow_count():
    """No pair is of two sequences, and the first bytes of each are without one."""
    train, held_out, lag = noise(120) // 64, noise(24, 1) // 64, 3
    train, held_out = train.reshape(10, 12), held_out.reshape(2, 12)
    singles = Counter(train.ravel())
    pairs = Counter((row[t], row[t + lag]) for row in train for t in range(12 - lag))
    firsts = Counter(train[:, :-lag].ravel())
    bits = 0.0
    for row, t in itertools.product(held_out, range(12)):
        p = (singles[row[t]] + 1) / (120 + 256)
        if t >= lag:
            before = row[t - lag]
            p = (pairs[before, row[t]] + 16 * p) / (firsts[before] + 16)
        bits -= math.log2(p)
    found = bigram.bigram_bits_per_byte(train, held_out, lag)
    assert found == pytest.approx(bits / 24, rel=1e-12)


def test_bigram_knows_the_extremes():
    data = noise(1 << 20)
    assert bigram.bigram_bits_per_byte(data, noise(1 << 16, 1)) == pytest.approx(
        8, 0.02
    )
    alternating = np.tile(np.array([1, 2], np.uint8), 1 << 16)
    assert bigram.bigram_bits_per_byte(alternating, alternating) < 0.01
    unseen = np.full(9, 7, np.uint8)
    assert 8 < bigram.bigram_bits_per_byte(alternating, unseen) < 64


# --- the standard library


def test_stdlib_is_large_and_always_the_same():
    one, other = bytes.load("stdlib"), bytes.load("stdlib")
    assert joined(one).size > 3_000_000
    assert one.fingerprint == other.fingerprint
    assert one.name == "stdlib" and "standard library" in one.source
    text = joined(one).tobytes()
    assert b"class ArgumentParser" in text  # argparse
    assert b"gencodec.py" not in text and b"class TestCase" in text  # unittest


def test_stdlib_refuses_a_path():
    sentence(lambda: bytes.load("stdlib", "a.txt"), "data.path=a.txt", "'bytes'")


def test_stdlib_without_source(tmp_path, monkeypatch):
    for root in (tmp_path, tmp_path / "python312.zip"):
        monkeypatch.setattr(sysconfig, "get_path", lambda _, root=root: str(root))
        sentence(lambda: bytes.load("stdlib"), root, "data.name=bytes")


# --- any file or folder


def test_a_file_is_split_in_order(tmp_path):
    data = noise(1011)
    path = tmp_path / "any.bin"
    data.tofile(path)
    splits = bytes.load("bytes", str(path))
    assert [splits.train.size, splits.validation.size, splits.test.size] == [
        909,
        51,
        51,
    ]
    np.testing.assert_array_equal(joined(splits), data)
    assert splits.train.dtype == np.uint8 and not splits.train.flags.writeable
    assert splits.source == str(path) and splits.notice == ""


def test_a_fingerprint_follows_the_bytes_not_the_path(tmp_path):
    data = noise(1000)
    data.tofile(tmp_path / "a")
    data.tofile(tmp_path / "b")
    data[3] ^= 1
    data.tofile(tmp_path / "changed")
    np.append(data, np.uint8(0)).tofile(tmp_path / "longer")
    names = ("a", "b", "changed", "longer")
    prints = [bytes.load("bytes", str(tmp_path / name)).fingerprint for name in names]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    digest = hashlib.blake2b(digest_size=16)
    original = np.fromfile(tmp_path / "a", np.uint8).tobytes()
    for part in (original[:900], original[900:950], original[950:]):
        digest.update(len(part).to_bytes(8, "little") + part)
    assert prints[0] == digest.hexdigest()


def test_a_folder_is_read_in_order_of_paths(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "z").write_bytes(b"4" * 30)
    (tmp_path / "b" / "deep" / "x.gz").write_bytes(gzip.compress(b"")[:4] + b"2" * 30)
    (tmp_path / "b" / "y").write_bytes(b"3" * 30)
    (tmp_path / "a").write_bytes(b"1" * 30)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / ".skipped").write_bytes(b"no")
    (tmp_path / ".hidden" / "f").write_bytes(b"no")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    splits = bytes.load("bytes", str(tmp_path))
    expected = b"1" * 30 + gzip.compress(b"")[:4] + b"2" * 30 + b"3" * 30 + b"4" * 30
    assert joined(splits).tobytes() == expected
    assert "5 files" in splits.source


def test_a_linked_folder_is_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_bytes(b"x" * 50)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "two").symlink_to(tmp_path / "elsewhere")
    assert joined(bytes.load("bytes", str(tmp_path / "root"))).size == 50


def test_a_small_file_still_splits(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(b"x" * 40)
    splits = bytes.load("bytes", str(path))
    assert min(s.size for s in (splits.train, splits.validation, splits.test)) >= 2
    for size in (0, 39):
        path.write_bytes(b"x" * size)
        sentence(lambda: bytes.load("bytes", str(path)), path, size, "40 bytes")


def test_paths_that_cannot_be_read(tmp_path, monkeypatch):
    sentence(lambda: bytes.load("bytes"), "data.path=''", "--config.data.path")
    missing = tmp_path / "missing"
    sentence(lambda: bytes.load("bytes", str(missing)), missing, "does not exist")
    os.mkfifo(tmp_path / "pipe")
    sentence(lambda: bytes.load("bytes", str(tmp_path / "pipe")), "neither a file")
    (tmp_path / "folder").mkdir()
    folder = str(tmp_path / "folder")
    sentence(lambda: bytes.load("bytes", folder), folder, "0 bytes")
    sentence(lambda: bytes.load("byte"), "'byte'", *bytes.NAMES)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "locked").write_bytes(b"x" * 99)
    monkeypatch.setattr("pathlib.Path.open", refuse)
    locked = str(tmp_path / "locked")
    sentence(lambda: bytes.load("bytes", locked), locked, "Permission denied")


@pytest.mark.parametrize("kind", ["xz", "gzip", "bzip2", "zip"])
def test_a_compressed_file_is_refused(tmp_path, kind):
    path = tmp_path / "data.txt"
    text = b"some text " * 99
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("data", text)
    else:
        compress = {"xz": lzma, "gzip": gzip, "bzip2": bz2}[kind].compress
        path.write_bytes(compress(text))
    sentence(lambda: bytes.load("bytes", str(path)), path, kind, "unpack")


# --- enwik8 and text8, played by a small file


@pytest.fixture
def genuine(monkeypatch):
    """Make 2000 bytes pass for enwik8, and a dead port for its server."""
    data = noise(2000, 8).tobytes()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/enwik8.zip"
    archive = archives.Archive(
        urls=(url,),
        zip_sha256="",
        size=2000,
        algorithm="sha256",
        digest=hashlib.sha256(data).hexdigest(),
    )
    monkeypatch.setitem(archives.ARCHIVES, "enwik8", archive)
    return data


def write_zip(path, data, member="enwik8"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("readme", b"not this one")
        file.writestr(member, data)
    return path


def check(splits, data):
    assert splits.notice == "" and splits.name == "enwik8"
    assert [splits.train.size, splits.validation.size] == [1800, 100]
    assert joined(splits).tobytes() == data


def test_the_published_sizes_split_as_in_the_literature():
    for name in ("enwik8", "text8"):
        archive = archives.ARCHIVES[name]
        assert archive.size * 90 // 100 == 90_000_000
        assert archive.size * 95 // 100 == 95_000_000
        assert hashlib.new(archive.algorithm).digest_size * 2 == len(archive.digest)
        assert len(archive.zip_sha256) == 64


@pytest.mark.parametrize("where", ["enwik8", "enwik8/enwik8"])
def test_found_as_a_file(tmp_path, genuine, where):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(genuine)
    check(bytes.load("enwik8", folder=str(tmp_path)), genuine)
    check(bytes.load("enwik8", path=str(path), folder="/nowhere"), genuine)
    check(bytes.load("enwik8", path=str(tmp_path), folder="/nowhere"), genuine)


@pytest.mark.parametrize("member", ["enwik8", "inside/enwik8"])
def test_found_in_a_zip(tmp_path, genuine, member):
    path = write_zip(tmp_path / "enwik8.zip", genuine, member)
    check(bytes.load("enwik8", folder=str(tmp_path)), genuine)
    check(bytes.load("enwik8", path=str(path), folder="/nowhere"), genuine)


def test_path_goes_before_folder(tmp_path, genuine):
    (tmp_path / "enwik8").write_bytes(b"x" * 2000)
    (tmp_path / "mine").write_bytes(genuine)
    mine = str(tmp_path / "mine")
    check(bytes.load("enwik8", path=mine, folder=str(tmp_path)), genuine)


def test_another_file_is_announced_loudly(tmp_path, genuine):
    (tmp_path / "short").write_bytes(genuine[:1000])
    splits = bytes.load("enwik8", path=str(tmp_path / "short"))
    assert "NOT enwik8" in splits.notice
    assert "1,000 bytes instead of 2,000" in splits.notice
    assert "not comparable" in splits.notice
    assert splits.train.size == 900
    (tmp_path / "enwik8").write_bytes(genuine[:-1] + b"?")
    splits = bytes.load("enwik8", folder=str(tmp_path))
    assert "sha256" in splits.notice and "not comparable" in splits.notice


def test_files_that_cannot_be_enwik8(tmp_path, genuine):
    load = functools.partial(bytes.load, "enwik8")
    (tmp_path / "empty").mkdir()
    sentence(lambda: load(str(tmp_path / "empty")), "holds 0 bytes")
    (tmp_path / "empty" / "a.txt").write_bytes(genuine[:100])
    splits = load(str(tmp_path / "empty"))  # a folder of other files serves, loudly
    assert splits.train.size == 90 and "without enwik8" in splits.notice
    sentence(lambda: load(str(tmp_path / "no")), tmp_path / "no", "does not exist")
    packed = tmp_path / "enwik8.xz"
    packed.write_bytes(lzma.compress(genuine))
    sentence(lambda: load(str(packed)), packed, "xz", "unpack")
    other = write_zip(tmp_path / "other.zip", genuine, "enwik9")
    sentence(lambda: load(str(other)), other, "without a member called enwik8")
    torn = tmp_path / "torn.zip"
    torn.write_bytes(other.read_bytes()[:1000])
    sentence(lambda: load(str(torn)), torn, "cannot be unpacked")


@pytest.fixture
def server(tmp_path):
    """Serve a folder, quietly, on a free port."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/enwik8.zip"
        httpd.shutdown()
        thread.join()


def publish(monkeypatch, genuine, server, **changes):
    folder, url = server
    packed = write_zip(folder / "enwik8.zip", genuine).read_bytes()
    archive = archives.ARCHIVES["enwik8"]
    archive = dataclasses.replace(
        archive,
        urls=(*archive.urls, url),  # After the dead one.
        zip_sha256=hashlib.sha256(packed).hexdigest(),
    )
    archive = dataclasses.replace(archive, **changes)
    monkeypatch.setitem(archives.ARCHIVES, "enwik8", archive)


def test_downloaded_once(tmp_path, monkeypatch, genuine, server, capsys):
    publish(monkeypatch, genuine, server)
    target = tmp_path / "data" / "deep"
    check(bytes.load("enwik8", folder=str(target)), genuine)
    assert [path.name for path in target.iterdir()] == ["enwik8"]
    assert "100%" in capsys.readouterr().err
    (server[0] / "enwik8.zip").unlink()
    check(bytes.load("enwik8", folder=str(target)), genuine)
    assert capsys.readouterr().err == ""


def test_a_changed_zip_is_thrown_away(tmp_path, monkeypatch, genuine, server):
    publish(monkeypatch, genuine, server, zip_sha256="0" * 64)
    target = tmp_path / "data"
    load = functools.partial(bytes.load, "enwik8", folder=str(target))
    sentence(load, "0" * 64, server[1], "--config.data.path=FILE")
    assert not list(target.iterdir())


def test_a_changed_member_is_thrown_away(tmp_path, monkeypatch, genuine, server):
    publish(monkeypatch, genuine, server, digest="0" * 64)
    target = tmp_path / "data"
    load = functools.partial(bytes.load, "enwik8", folder=str(target))
    sentence(load, "0" * 64, "--config.data.path=FILE")
    assert not list(target.iterdir())


def test_a_torn_download_is_thrown_away(tmp_path, monkeypatch, genuine, server):
    publish(monkeypatch, genuine, server)

    def send_half(handler, source, output):
        output.write(source.read(1000))

    monkeypatch.setattr(
        http.server.SimpleHTTPRequestHandler, "copyfile", send_half, raising=True
    )
    target = tmp_path / "data"
    load = functools.partial(bytes.load, "enwik8", folder=str(target))
    sentence(load, "ended at byte 1000")
    assert not list(target.iterdir())


def test_no_server(tmp_path, genuine):
    target = tmp_path / "data"
    load = functools.partial(bytes.load, "enwik8", folder=str(target))
    url = archives.ARCHIVES["enwik8"].urls[0]
    sentence(load, url, "unzip it", "--config.data.path=FILE", "refused")
    assert not list(target.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, genuine):
    (tmp_path / "file").write_bytes(b"")
    target = str(tmp_path / "file" / "data")
    load = functools.partial(bytes.load, "enwik8", folder=target)
    sentence(load, target, "--config.data.folder")


class Screen(list):
    """A stream that remembers what was written, and may be a terminal."""

    def __init__(self, tty):
        self.tty = tty

    def isatty(self):
        return self.tty

    def write(self, text):
        self.append(text)

    def flush(self):
        pass


def test_progress_in_a_log_is_a_line_a_tenth():
    screen = Screen(tty=False)
    progress = archives.Progress("url", 1000, screen)
    for _ in range(100):
        progress.advance(10)
    progress.finish()
    lines = "".join(screen).splitlines()
    assert [line.split(",")[1].strip() for line in lines] == [
        f"{percent}%" for percent in range(10, 101, 10)
    ]
    assert all("MB/s" in line and "s left" in line for line in lines)


def test_progress_on_a_terminal_redraws_one_line(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(archives.time, "monotonic", lambda: float(next(clock)))
    screen = Screen(tty=True)
    progress = archives.Progress("url", 0, screen)  # The server gave no length.
    for _ in range(3):
        progress.advance(10)
    progress.finish()
    text = "".join(screen)
    assert text.count("\r") == 3 and text.count("\n") == 1 and text.endswith("\n")
