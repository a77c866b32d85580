"""The feature cache, both ends.    python -m pytest tests/test_feature_cache.py"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO

import dataset
import model
from benchmarks import bench_writer
from benchmarks.plain import PlainWriter
from dataset import FAKE, REAL, JoinedFeatures, ReferenceFeatures, Trial, open_features, read_ahead
from formats import feature_cache
from formats.audio import RESAMPLER
from formats.feature_cache import (
    DAMAGED,
    DONE,
    FAILED,
    NOT_YET,
    CacheWriter,
    FeatureCache,
    decode,
    encode,
)
from runtime.cli import InputError

SHAPE = (505, 80)
FRONT_END = {"feat": "mel", "clip_samples": 64_600}
TRIALS = [
    Trial(f"LA_T_{n}", f"/nowhere/{n}.flac", n % 2, f"A0{n}" if n % 2 else "-") for n in range(10)
]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 4)


@pytest.fixture
def values() -> np.ndarray:
    """(10, 505, 80) with every row different, exact in float16."""
    return np.random.default_rng(0).integers(-1000, 1000, (10, *SHAPE)).astype(np.float32) / 64


def writer(folder: Path, **changes) -> CacheWriter:
    options = {"trials": TRIALS, "front_end": FRONT_END, "shape": SHAPE} | changes
    return CacheWriter(folder, **options)


@pytest.fixture
def folder(tmp_path: Path, values: np.ndarray) -> Path:
    """A complete cache of three shards, in the place of Codecfake's train part."""
    folder = tmp_path / "train" / "mel"
    cache = writer(folder)
    cache.write(range(10), values)
    cache.close()
    return folder


def test_rows_come_back_in_the_order_asked_for(folder: Path, values: np.ndarray) -> None:
    cache, rows = FeatureCache(folder), np.array([9, 0, 4, 3, 4])
    features, labels = cache.read(rows)
    assert features.dtype == torch.float16 and np.array_equal(features.numpy(), values[rows])
    assert labels.tolist() == [1, 0, 0, 1, 0] and cache.names[9] == "LA_T_9"


def test_the_plain_way_to_read_agrees(folder: Path, values: np.ndarray) -> None:
    """The files are ordinary .npy files."""
    shards = [np.load(path) for path in sorted(folder.glob("features_*.npy"))]
    assert [len(shard) for shard in shards] == [4, 4, 2]
    assert np.array_equal(np.concatenate(shards), values)
    assert np.load(folder / "index.npy").shape == (10, 2)


def test_bytes_are_half_of_the_references(folder: Path) -> None:
    assert (
        sum(path.stat().st_size for path in folder.iterdir())
        < 0.51 * 10 * 4 * SHAPE[0] * SHAPE[1] + 5_000
    )


def test_an_interrupted_cache_goes_on(tmp_path: Path, values: np.ndarray) -> None:
    first = writer(tmp_path)
    first.write([0, 1, 5], values[[0, 1, 5]])
    first.flush()
    first.write([2], values[[2]])  # written but never marked: as if killed here
    second = writer(tmp_path)
    assert np.flatnonzero(second.states() == NOT_YET).tolist() == [2, 3, 4, 6, 7, 8, 9]
    with pytest.raises(InputError, match="7 of 10 rows are not extracted yet; run preprocess.py"):
        FeatureCache(tmp_path).require_complete()
    second.write([2, 3, 4, 6, 7, 8, 9], values[[2, 3, 4, 6, 7, 8, 9]])
    second.close()
    assert np.array_equal(FeatureCache(tmp_path).read(np.arange(10))[0], values)


def test_a_kill_while_the_files_are_laid_out(
    tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_dump = json.dump
    monkeypatch.setattr(
        feature_cache.json, "dump", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path)
    assert not (tmp_path / "cache.json").exists()
    monkeypatch.setattr(feature_cache.json, "dump", real_dump)
    cache = writer(tmp_path)
    cache.write(range(10), values)
    cache.close()
    FeatureCache(tmp_path).require_complete()


def test_failed_rows_are_left_out_of_training(folder: Path) -> None:
    cache = writer(folder)
    cache.mark_failed([0, 7])
    cache.write_failures({0: "broken", 7: "absent"})
    cache.close()
    found = FeatureCache(folder)
    found.require_complete()
    assert (
        len(found.labels) == 8
        and found.names[0] == "LA_T_1"
        and (found.states == FAILED).sum() == 2
    )
    assert (folder / "failed.txt").read_text() == "LA_T_0\tbroken\nLA_T_7\tabsent\n"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"front_end": FRONT_END | {"clip_samples": 1}},
            "clip_samples 64600, this run would make 1",
        ),
        (
            {"front_end": FRONT_END | {"weights_sha256": "ab"}},
            "weights_sha256 None, this run would make 'ab'",
        ),
        ({"dtype": "float32"}, "dtype 'float16'"),
        ({"shape": (505, 81)}, "dim 80"),
        ({"trials": TRIALS[:-1]}, "rows 10"),
        ({"trials": TRIALS[::-1]}, "protocol_sha256"),
    ],
)
def test_a_cache_made_with_something_else_is_refused(
    folder: Path, change: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        writer(folder, **change)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "000000_a.wav_real.pt").write_text("x")
    with pytest.raises(InputError, match="000000_a.wav_real.pt.*can be trained as it is"):
        writer(tmp_path)


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    values[3, 0, 0] = 1e5
    with pytest.raises(
        InputError,
        match="3.flac: its feature reaches 1e.05, which float16 cannot hold; give --dtype float32",
    ):
        writer(tmp_path / "half").write(range(10), values)
    with np.errstate(over="ignore"), pytest.raises(InputError, match="3.flac: .*beyond float16"):
        writer(tmp_path / "half").write(range(10), values.astype(np.float16))
    wide = writer(tmp_path / "single", dtype="float32")
    wide.write(range(10), values)
    wide.close()
    assert np.array_equal(FeatureCache(tmp_path / "single").read(np.array([3]))[0][0], values[3])


def test_a_full_disk_is_seen_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        feature_cache.os,
        "statvfs",
        lambda path: os.statvfs_result((4096, 4096, 9, 9, 9, 0, 0, 0, 0, 255)),
    )
    with pytest.raises(InputError, match="the cache needs 0.0 GB, 0.0 GB are free"):
        writer(tmp_path / "x")


def test_a_disk_that_fills_up_loses_nothing(
    tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = writer(tmp_path)
    cache.write(range(4), values[:4])
    cache.flush()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache.os, "pwrite", full)
    with pytest.raises(OSError) as caught:
        cache.write([4], values[[4]])
    assert caught.value.filename.endswith("features_00001.npy")
    monkeypatch.undo()
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 4)
    resumed = writer(tmp_path)
    assert (resumed.states() == DONE).tolist() == [True] * 4 + [False] * 6


# ── float16 ──


def halves() -> np.ndarray:
    """(65536,) float16, every bit pattern."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16)


def near_halves() -> np.ndarray:
    """float32 values around all that float16 rounds: each of its values, the middle between it and
    its neighbour, and the float32 below and above both; subnormals, ties and overflow among them;
    a million random patterns.
    """
    every = np.sort(halves()[np.isfinite(halves())].astype(np.float32))
    middles = (every[1:] + every[:-1]) / 2
    edges = np.concatenate([every, middles, [65519.996, 65520, 65536, 1e38, np.inf]])
    edges = np.concatenate([edges, -edges]).astype(np.float32)
    around = [np.nextafter(edges, np.float32(end)) for end in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    values = np.concatenate([edges, *around, random])
    return values[~np.isnan(values)]


def test_float16_is_rounded_as_numpy_rounds() -> None:
    values = near_halves()
    with np.errstate(over="ignore"):
        plain = values.astype(np.float16)
    found = encode(values.reshape(1, 1, -1), "float16")
    assert found.dtype == np.float16 and found.flags.c_contiguous
    assert np.array_equal(found.reshape(-1).view(np.uint16), plain.view(np.uint16))


def read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


@pytest.mark.filterwarnings("error")  # torch warns of memory that cannot be written
@pytest.mark.parametrize(
    "view",
    [
        read_only,
        lambda values: values[::2],
        lambda values: values[::-1],
        lambda values: values.transpose(0, 2, 1),
        lambda values: values[:0],
    ],
    ids=["read-only", "every second", "reversed", "transposed", "none"],
)
def test_float16_of_arrays_that_torch_does_not_take(values: np.ndarray, view) -> None:
    found = encode(view(values), "float16")
    assert found.flags.c_contiguous and np.array_equal(found, view(values).astype(np.float16))


def test_finite_rows_are_those_that_numpy_finds() -> None:
    rows = halves().reshape(-1, 1, 1)
    plain = np.isfinite(rows).all(axis=(1, 2))
    assert np.array_equal(feature_cache._finite(rows), plain)
    mixed = np.where(np.eye(9) == 1, np.float16(np.nan), np.float16(1)).reshape(9, 3, 3)
    mixed[4, 1, 1] = 1
    assert feature_cache._finite(mixed).tolist() == [False] * 4 + [True] + [False] * 4
    assert feature_cache._finite(mixed[:0]).tolist() == []


# ── Flushing while writing goes on ──


class Disk:
    """Stands in for os.fdatasync: waits to be let go, then fails if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int | None = None):
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.error, self.calls = error, 0
        monkeypatch.setattr(feature_cache.os, "fdatasync", self.sync)

    def sync(self, descriptor: int) -> None:
        self.calls += 1
        self.begun.set()
        assert self.may_end.wait(60)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


def test_rows_are_written_during_a_flush_and_marked_after_it(
    tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, disk = writer(tmp_path), Disk(monkeypatch)
    cache.write([0, 1], values[:2])
    cache.start_flush(3)
    assert not disk.begun.is_set() and cache.unmarked() == 2
    cache.start_flush(2)
    assert disk.begun.wait(60)
    cache.write([2], values[[2]])
    assert cache.unmarked() == 1
    assert (cache.states() == NOT_YET).all()
    disk.may_end.set()
    cache.close()
    assert np.flatnonzero(FeatureCache(tmp_path).states == DONE).tolist() == [0, 1, 2]


def test_a_flush_that_fails_is_told_and_loses_nothing(
    tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells of a failed fdatasync once; another try may succeed without the bytes."""
    cache = writer(tmp_path)
    cache.write([0], values[[0]])
    cache.flush()
    disk = Disk(monkeypatch, error=28)
    disk.may_end.set()
    cache.write([5, 6], values[5:7])
    cache.start_flush()
    with pytest.raises(OSError, match="No space left") as caught:
        cache.flush()
    assert caught.value.filename.endswith("features_00001.npy")
    disk.error = None
    cache.write([7], values[[7]])
    for end in (cache.flush, cache.close):
        with pytest.raises(OSError, match="No space left"):
            end()
    resumed = writer(tmp_path)
    assert np.flatnonzero(resumed.states() == DONE).tolist() == [0]
    resumed.write(range(1, 10), values[1:])
    resumed.close()
    assert np.array_equal(FeatureCache(tmp_path).read(np.arange(10))[0], values)


def test_a_flush_of_nothing_leaves_the_disk_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, cache = Disk(monkeypatch), writer(folder)
    cache.mark_failed([])
    cache.close()
    assert disk.calls == 0


def test_threads_write_what_one_alone_writes(
    tmp_path: Path, folder: Path, values: np.ndarray
) -> None:
    for number in range(20):
        cache = writer(tmp_path / str(number))

        def store(row: int, cache: CacheWriter = cache) -> None:
            cache.write([row], values[[row]])
            cache.start_flush(2)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(store, range(10)))
        cache.close()
        for path in folder.glob("*.npy"):
            assert path.read_bytes() == (tmp_path / str(number) / path.name).read_bytes()


def test_the_plain_writer_makes_the_same_files(
    tmp_path: Path, folder: Path, values: np.ndarray
) -> None:
    cache = PlainWriter(tmp_path / "plain", TRIALS, FRONT_END, SHAPE)
    cache.write(range(10), values)
    cache.mark_failed([])
    cache.close()
    for path in folder.glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "plain" / path.name).read_bytes()


def test_the_benchmark_of_the_writer_runs(capsys: pytest.CaptureFixture) -> None:
    bench_writer.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if " % |" in line] == [
        "| pwrite, CRC-32 and fdatasync alone",
        "| the plain writer",
        "| the writer",
    ]


@pytest.mark.parametrize("row", [0, 3, 4, 9])
def test_a_flipped_bit_in_a_row_is_found_and_named(folder: Path, row: int) -> None:
    shard = folder / f"features_{row // 4:05d}.npy"
    data = bytearray(shard.read_bytes())
    data[128 + (row % 4) * SHAPE[0] * SHAPE[1] * 2 + 777] ^= 4
    shard.write_bytes(data)
    cache = FeatureCache(folder)
    assert cache.damaged_rows() == [row]
    with pytest.raises(
        InputError,
        match=rf"features_{row // 4:05d}\.npy: row {row} \(LA_T_{row}\) is damaged; "
        "run preprocess.py --verify --repair",
    ):
        cache.read(np.arange(10))


def test_swapped_rows_are_found(folder: Path) -> None:
    shard = folder / "features_00000.npy"
    rows = np.load(shard)
    np.save(shard, rows[[1, 0, 2, 3]])
    assert FeatureCache(folder).damaged_rows() == [0, 1]


def test_no_flipped_bit_of_the_index_goes_unseen(folder: Path) -> None:
    """Each bit of each entry: the row becomes damaged, never silently undone, failed or trusted."""
    whole = (folder / "index.npy").read_bytes()
    for bit in range(8 * (len(whole) - 80), 8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (folder / "index.npy").write_bytes(data)
        states = FeatureCache(folder).states
        assert (
            states[(bit // 8 - (len(whole) - 80)) // 8] == DAMAGED and (states == DONE).sum() == 9
        )
    with pytest.raises(
        InputError,
        match="1 of 10 rows are damaged in index.npy; run preprocess.py --verify --repair",
    ):
        FeatureCache(folder).require_complete()


@pytest.mark.parametrize("name", ["cache.json", "trials.tsv", "index.npy", "features_00001.npy"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b"",
        lambda b: bytes([b[0] ^ 1]) + b[1:],
        lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:],
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, damage) -> None:
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(InputError, match=name):
        FeatureCache(folder).read(np.arange(10))


def test_forgotten_rows_are_made_anew(folder: Path, values: np.ndarray) -> None:
    cache = writer(folder)
    cache.forget([2, 3])
    assert np.flatnonzero(cache.states() != DONE).tolist() == [2, 3]
    cache.write([2, 3], values[[2, 3]])
    cache.close()
    assert FeatureCache(folder).damaged_rows() == []


def test_the_protocol_must_be_the_caches_own(folder: Path) -> None:
    FeatureCache(folder).check_protocol(TRIALS)
    with pytest.raises(InputError, match="made from another protocol"):
        FeatureCache(folder).check_protocol(TRIALS[1:])


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_reading_ahead_equals_reading(folder: Path, threads: int) -> None:
    cache = FeatureCache(folder)
    batches = [np.array([3, 1]), np.array([9, 8, 7]), np.array([0])] * 3
    found = list(read_ahead(cache, batches, threads))
    assert all(
        torch.equal(a, cache.read(rows)[0]) and torch.equal(b, cache.read(rows)[1])
        for (a, b), rows in zip(found, batches, strict=True)
    )


@pytest.mark.parametrize("threads", [0, 2])
def test_features_are_pinned_for_a_gpu(
    folder: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # there is no GPU
    cache, rows = FeatureCache(folder), np.array([3, 1])
    plain, labels = next(read_ahead(cache, [rows], threads))
    monkeypatch.setattr(dataset, "is_gpu", lambda device: True)
    pinned, pinned_labels = next(read_ahead(cache, [rows], threads))
    assert torch.equal(pinned, plain + 1) and torch.equal(pinned_labels, labels + 1)


@pytest.mark.parametrize("dtype", ["affine8", "sqrt8"])
def test_codes_that_a_gpu_decodes_have_the_bits_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Of two caches as one, whose rows do not end at whole words."""
    parts = []
    for number in range(2):
        values = np.random.default_rng(number).normal(0, 2, (len(TRIALS), 5, 3)).astype(np.float32)
        cache = writer(tmp_path / str(number), shape=(5, 3), dtype=dtype)
        cache.write(range(len(TRIALS)), values * np.float32(10.0) ** np.arange(-20, 20, 16))
        cache.close()
        parts.append(FeatureCache(tmp_path / str(number)))
    both = JoinedFeatures(parts)
    batches = [np.array([11, 3, 0, 15]), np.array([4]), np.array([1, 2])]
    expected = list(read_ahead(both, batches, 2))
    monkeypatch.setattr(dataset, "is_gpu", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(feature_cache, "decode", None)
    found = list(read_ahead(both, batches, 2))
    for (values, labels), (wanted, wanted_labels) in zip(found, expected, strict=True):
        assert values.dtype == torch.float32 and values.shape == wanted.shape
        assert values.numpy().tobytes() == wanted.numpy().tobytes()
        assert torch.equal(labels, wanted_labels)


def test_joined_parts_number_their_rows_on(folder: Path, values: np.ndarray) -> None:
    both = JoinedFeatures([FeatureCache(folder), FeatureCache(folder)])
    assert both.sizes == [10, 10] and both.name(13) == "LA_T_3"
    features, labels = both.read(np.array([13, 2, 19]))
    assert np.array_equal(features, values[[3, 2, 9]]) and labels.tolist() == [1, 0, 1]
    assert np.array_equal(both.read(np.array([12, 11]))[0], values[[2, 1]])


# ── Eight bits a value ──


def powers(count: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Positive and negative values over twelve decades, as mel bands of one frame lie apart."""
    rng = np.random.default_rng(3)
    return (
        rng.choice([-1, 1], (count, *shape)) * 10 ** rng.uniform(-9, 3, (count, *shape))
    ).astype(np.float32)


def assert_within_bound(found: np.ndarray, values: np.ndarray) -> None:
    """encode()'s own promise, with room for float32's last digits."""
    size, peak = (
        np.abs(values.astype(np.float64)),
        np.abs(values.astype(np.float64)).max(axis=-1, keepdims=True),
    )
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert (
        np.abs(found - values.astype(np.float64))
        <= np.sqrt(peak * size) / 127 + peak / 254**2 + 1e-6 * size
    ).all()


def test_eight_bits_keep_every_band_of_a_frame() -> None:
    """Steps of equal size would lose all below 1/254 of the frame's peak."""
    values = powers(3)
    found = decode(encode(values, "sqrt8")).numpy()
    assert_within_bound(found, values)
    peak = np.abs(values).max(axis=2, keepdims=True)
    quiet = (np.abs(values) > peak / 1000) & (np.abs(values) < peak / 500)
    assert quiet.sum() > 500 and (np.abs(found / values - 1)[quiet] < 0.3).all()


@pytest.mark.parametrize("peak", [0, 1e-30, 1, 3.4028235e38])
def test_extreme_frames_decode_within_the_bound(peak: float) -> None:
    """Silence, which has no peak to divide by, and values whose own code must not decode to
    infinity.
    """
    values = np.linspace(-1, 1, 2 * 5 * 81).reshape(2, 5, 81).astype(np.float32) * np.float32(peak)
    values[0, 1] = 0
    values[1, 2, :-1] = 0  # one outlier
    assert_within_bound(decode(encode(values, "sqrt8")).numpy(), values)


def test_a_frames_scale_is_its_own() -> None:
    """A loud frame takes nothing from the frames beside it."""
    values = powers(2)
    louder = values.copy()
    louder[0, 7] *= 1e6
    one, other = decode(encode(values, "sqrt8")), decode(encode(louder, "sqrt8"))
    assert not torch.equal(one[0, 7], other[0, 7])
    one[0, 7] = other[0, 7] = 0
    assert torch.equal(one, other)


def test_an_eight_bit_cache_gives_back_what_its_code_holds(tmp_path: Path) -> None:
    """Written, interrupted, resumed and read; the plain way, numpy.load and the formula, agrees;
    bytes are the same over runs.
    """
    values = powers(10)
    for name, rows in (("one", [range(10)]), ("two", [range(3), range(3, 10)])):
        for some in rows:
            cache = writer(tmp_path / name, dtype="sqrt8")
            cache.write(some, values[some])
            cache.close()
    order = np.array([9, 0, 4, 4])
    features, labels = FeatureCache(tmp_path / "one").read(order)
    assert torch.equal(features, decode(encode(values, "sqrt8"))[order]) and labels.tolist() == [
        1,
        0,
        0,
        0,
    ]
    plain = np.concatenate(
        [np.load(path) for path in sorted((tmp_path / "one").glob("features_*.npy"))]
    )
    code = plain["code"].astype(np.float32)
    np.testing.assert_allclose(
        features, (plain["scale"][..., None] * code * np.abs(code))[order], rtol=1e-6
    )
    files = [path.name for path in (tmp_path / "one").iterdir()]
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        for name in files
    )
    with pytest.raises(InputError, match="dtype 'sqrt8', this run would make 'float16'"):
        writer(tmp_path / "one")


def test_eight_bit_rows_take_a_quarter_of_the_references_bytes() -> None:
    assert len(encode(np.ones((1, 201, 1024), np.float32), "affine8").tobytes()) <= 0.26 * 824_774
    assert (
        len(encode(np.ones((1, *SHAPE), np.float32), "sqrt8").tobytes())
        <= 0.263 * 4 * SHAPE[0] * SHAPE[1]
    )


@pytest.mark.parametrize("offset", [0, 777, 4 * SHAPE[0], 4 * SHAPE[0] + SHAPE[0] * SHAPE[1] - 1])
def test_damage_to_eight_bit_rows_is_found_and_mended(tmp_path: Path, offset: int) -> None:
    """In the scales and in the codes."""
    values = powers(10)
    cache = writer(tmp_path, dtype="sqrt8")
    cache.write(range(10), values)
    cache.close()
    shard = tmp_path / "features_00001.npy"
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[cache.layout.header_bytes + 2 * cache.layout.row_bytes + offset] ^= 1
    shard.write_bytes(data)
    assert FeatureCache(tmp_path).damaged_rows() == [6]
    with pytest.raises(InputError, match=r"row 6 \(LA_T_6\) is damaged"):
        FeatureCache(tmp_path).read(np.arange(10))
    assert feature_cache.mend_files(tmp_path, TRIALS) == []
    cache = writer(tmp_path, dtype="sqrt8")
    cache.forget([6])
    cache.write([6], values[[6]])
    cache.close()
    assert FeatureCache(tmp_path).damaged_rows() == [] and shard.read_bytes() == whole


@pytest.mark.parametrize("dtype", feature_cache.DTYPES)
def test_a_batch_whose_files_all_failed_writes_nothing(tmp_path: Path, dtype: str) -> None:
    cache = writer(tmp_path, dtype=dtype)
    cache.write([], np.empty((0, *SHAPE), np.float32))
    cache.close()
    assert (FeatureCache(tmp_path).states == NOT_YET).all()


@pytest.mark.parametrize("dtype", ["float32", "affine8", "sqrt8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    values = powers(10)
    values[3, 5, 6] = value
    with pytest.raises(InputError, match="3.flac: its feature is not finite; check the file"):
        writer(tmp_path, dtype=dtype).write(range(10), values)


# ── The reference's own files ──


def reference_folder(folder: Path, names: list[str], tensor: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        torch.save(tensor + number, folder / name)
    return folder


def test_the_references_files_are_read_as_they_are(tmp_path: Path) -> None:
    """Labels follow the last underscore; mel is stored frequency first."""
    mel = torch.randn(1, 80, 505)
    folder = reference_folder(
        tmp_path / "train/mel",
        ["000000_SSB13650058.wav_real.pt", "000001_F01_real_one.wav_fake.pt"],
        mel,
    )
    features = open_features(tmp_path, "train", "mel")
    assert features.names == [
        "SSB13650058.wav",
        "F01_real_one.wav",
    ] and features.labels.tolist() == [REAL, FAKE]
    torch.testing.assert_close(
        features.read(np.array([1, 0]))[0], torch.stack([mel[0].T + 1, mel[0].T])
    )
    xlsr = torch.randn(1, 201, 1024)
    folder = reference_folder(
        tmp_path / "la/train/xls-r-5",
        ["00000_LA_T_1138215_-_bonafide.pt", "00001_LA_T_1_A05_spoof.pt"],
        xlsr,
    )
    found = ReferenceFeatures(folder, "xls-r-5")
    assert found.labels.tolist() == [REAL, FAKE] and torch.equal(found.read(np.array([0]))[0], xlsr)
    found.check_protocol([Trial("LA_T_1138215", "", REAL, "-"), Trial("LA_T_1", "", FAKE, "A05")])
    with pytest.raises(InputError, match="00001_LA_T_1_A05_spoof.pt"):
        found.check_protocol([Trial("LA_T_1138215", "", REAL, "-")])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.pt", torch.zeros(1, 80, 505), "x.pt: expected the reference's"),
        ("0_a_genuine.pt", torch.zeros(1, 80, 505), "expected the reference's"),
        (
            "0_a_real.pt",
            torch.zeros(1, 201, 1024),
            r"expected a tensor \(1, 80, 505\) of --feat mel, got \(1, 201, 1024\)",
        ),
        ("0_a_real.pt", {"a": 1}, "got dict"),
        ("0_a_real.pt", torch.full((1, 80, 505), float("nan")), "not finite"),
        ("0_a_real.pt", torch.zeros(3, 80, 505, 10), "got a file of"),
    ],
)
def test_other_files_in_such_a_folder_are_named(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    (tmp_path / "train/mel").mkdir(parents=True)
    torch.save(content, tmp_path / "train/mel" / name)
    with pytest.raises(InputError, match=message):
        open_features(tmp_path, "train", "mel").read(np.array([0]))


def test_a_feature_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_here"),)

    (tmp_path / "train/mel").mkdir(parents=True)
    torch.save(Runs(), tmp_path / "train/mel/0_a_real.pt")
    with pytest.raises(InputError, match="refused, it names posix.mkdir"):
        open_features(tmp_path, "train", "mel").read(np.array([0]))
    assert not (tmp_path / "was_here").exists()


def test_a_wrong_features_folder_says_what_is_there(folder: Path) -> None:
    root = folder.parent.parent
    with pytest.raises(
        InputError,
        match=r"expected the features of --feat xls-r-5, found mel there.*-f \(Codecfake\)",
    ):
        open_features(root, "train", "xls-r-5")
    with pytest.raises(InputError, match="found no features under"):
        open_features(root, "dev", "mel")
    folder.rename(root / "train" / "xls-r-5")
    with pytest.raises(InputError, match="made with --feat mel"):
        open_features(root, "train", "xls-r-5")
    (root / "train" / "mel").mkdir()
    with pytest.raises(InputError, match="neither a feature cache nor"):
        open_features(root, "train", "mel")


# ── 8-bit hidden states ──


def test_affine_codes_are_within_half_a_step(tmp_path: Path) -> None:
    """Each dimension of a clip has a range of its own: an outlying one costs the others nothing."""
    values = np.random.default_rng(0).normal(0, 1.5, (3, 201, 64)).astype(np.float32)
    values[:, :, 25] -= 30
    values[1, :, 3] = 7
    values[2] *= np.float32(1e36)
    rows = encode(values, "affine8")
    step = np.ptp(values, axis=1, keepdims=True) / 255
    error = np.abs(decode(rows).numpy().astype(np.float64) - values)
    assert (error <= 0.5001 * step + 1e-6 * np.abs(values)).all()
    cache = writer(tmp_path, trials=TRIALS[:3], shape=(201, 64), dtype="affine8")
    cache.write(range(3), values)
    cache.close()
    assert torch.equal(FeatureCache(tmp_path).read(np.arange(3))[0], decode(rows))


@pytest.fixture(scope="module")
def hidden_states(reference: Path) -> np.ndarray:
    """(21, 201, 1024) of the real XLS-R."""
    folder = reference / "real" / "xlsr5"
    if not folder.is_dir():
        pytest.skip("needs ../shared/reference/real/xlsr5, real hidden states")
    files = sorted(folder.glob("*.pt"))
    return np.stack([torch.load(path, weights_only=True)[0].float().numpy() for path in files])


def test_eight_bits_keep_real_hidden_states(hidden_states: np.ndarray) -> None:
    found = decode(encode(hidden_states, "affine8")).numpy()
    rms = np.sqrt(np.square(found - hidden_states).mean() / np.square(hidden_states).mean())
    assert rms <= 0.006


@pytest.mark.parametrize(
    "head", ["vocoder_w2v2aasist", "codec_w2v2aasist", "cotrain_w2v2aasist_CSAM"]
)
def test_eight_bits_move_no_verdict(reference: Path, hidden_states: np.ndarray, head: str) -> None:
    network = model.load_head(reference / "checkpoints" / head)
    exact = torch.from_numpy(hidden_states)
    with torch.inference_mode():
        before, after = (network(x)[1] for x in (exact, decode(encode(hidden_states, "affine8"))))
    moved = ((after - before)[:, 0] - (after - before)[:, 1]).abs().max()
    assert moved <= 0.07, moved


# ── What converted the clips ──


def test_a_cache_records_the_resampler_only_where_a_clip_needs_it(folder: Path) -> None:
    assert feature_cache.read_resampler(folder) is None
    cache = writer(folder)
    cache.note_rates([16_000, 16_000])
    assert feature_cache.read_resampler(folder) is None
    cache.note_rates([16_000, 48_000])
    cache.close()
    assert feature_cache.read_resampler(folder) == RESAMPLER


def test_rows_of_another_resampler_do_not_mix(folder: Path) -> None:
    feature_cache.record_resampler(folder, "kaiser_best")
    for opened in (lambda: FeatureCache(folder), lambda: writer(folder)):
        with pytest.raises(InputError, match="converted by 'kaiser_best', this program uses 'soxr"):
            opened()


def test_a_damaged_record_of_the_resampler_is_named(folder: Path) -> None:
    (folder / "resampler.json").write_text("{")
    with pytest.raises(InputError, match=r"resampler\.json: damaged"):
        FeatureCache(folder)
    assert feature_cache.mend_files(folder, TRIALS) == ["resampler.json"]
    cache = writer(folder)
    assert not cache.records_resampler()  # preprocess.py looks at the rates now
    cache.close()


# ── The page ──


def test_the_readers_lines_in_the_docs_read_a_cache(folder: Path, values: np.ndarray) -> None:
    page = (REPO / "docs" / "formats.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    for n in range(10):
        known = {"np": np, "folder": folder, "n": n}
        exec(lines, known)
        assert (known["feature"] == values[n]).all()
        assert known["names"][n] == TRIALS[n].name
        assert int(known["labels"][n]) == TRIALS[n].label
        assert known["sources"][n] == TRIALS[n].source
