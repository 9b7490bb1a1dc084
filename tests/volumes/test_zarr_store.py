"""The store of predictions: whole shards, their pyramid, restarts, and what other programs read."""

import errno
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests import processes
from volumes import zarr_shards, zarr_store

ROOT = Path(__file__).parents[2]
SHAPE = (17, 19, 35)  # no multiple of a shard, and odd at most levels
OF = {
    "names": {"sheet": 1},
    "spacing": (4.0, 2.0, 2.0),
    "unit": "micron",
    "offset": (10.0, 0.0, 6.0),
    "shard": (16, 16, 16),
    "chunk": (8, 8, 8),
    "provenance": {"checkpoint": "3f2a", "config": {"threshold": 0.5, "flips": [1, 2]}},
}
TWO = {"artery": 3, "vein": 7}


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def create(path, shape=SHAPE, **other):
    return zarr_store.create(path, shape, **(OF | other))


def voxels(shape=SHAPE, regions=1, seed=0):
    """probability (C, D, H, W), with a corner of zeros, and mask (D, H, W)."""
    probability = np.random.default_rng(seed).integers(0, 256, (regions, *shape), dtype=np.uint8)
    probability[:, :16, :16, :16] = 0
    return probability, (probability[0] > 127).astype(np.uint8)


def fill(store, probability, mask, indexes=None):
    for index in indexes or store.missing():
        box = store.box(index)
        with store.lock(index) as free:
            assert free
            store.write(index, probability[:, *box], mask[box])


def files(path):
    """{name: bytes} of a folder; the date is of the store, not of the prediction."""
    content = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    root = json.loads(content.pop("zarr.json"))
    del root["attributes"]["lamina"]["provenance"]["date"]
    return content | {"zarr.json": root}


def halved(array):
    """An independent mean of 2x2x2 voxels (D, H, W), of those that there are."""
    padded = np.full([n + n % 2 for n in array.shape], np.nan)
    padded[tuple(map(slice, array.shape))] = array
    d, h, w = (n // 2 for n in padded.shape)
    mean = np.nanmean(padded.reshape(d, 2, h, 2, w, 2), axis=(1, 3, 5))
    return np.floor(mean + 0.5).astype(np.uint8)


# ---------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("names", [{"sheet": 1}, TWO])
@pytest.mark.parametrize("shape", [SHAPE, (16, 16, 32), (3, 5, 17), (1, 1, 1)])
def test_zarr_reads_what_was_written_at_every_level(tmp_path, shape, names):
    probability, mask = voxels(shape, len(names))
    store = create(tmp_path / "p.zarr", shape, names=names)
    fill(store, probability, mask)
    assert store.missing() == [] and store.finish()
    group, expected = zarr.open_group(store.path, mode="r"), list(probability)
    for level in range(3):
        array = group[str(level)]
        np.testing.assert_array_equal(array[...].reshape(np.shape(expected)), expected)
        assert array.shards[-3:] == (16 >> level,) * 3
        assert array.chunks[:-3] == (1,) * (len(names) > 1)
        step = 2**level
        np.testing.assert_array_equal(
            group[f"labels/mask/{level}"][...], mask[::step, ::step, ::step]
        )
        expected = [halved(channel) for channel in expected]
    assert "3" not in group


def test_shards_of_512_have_levels_down_to_64():
    levels = zarr_shards.levels_of((512, 512, 512), (128, 128, 128))
    assert levels == [
        ((512,) * 3, (128,) * 3),
        ((256,) * 3, (128,) * 3),
        ((128,) * 3, (128,) * 3),
        ((64,) * 3, (64,) * 3),
    ]


def test_chunks_divide_their_shard_at_every_level():
    for shard in [(384, 128, 640), (128, 128, 128), (1024, 256, 128), (130, 260, 390)]:
        chunk = (10, 10, 10) if shard[0] == 130 else (128, 128, 128)
        for outer, inner in zarr_shards.levels_of(shard, chunk):
            assert not np.mod(outer, inner).any()


def test_means_of_voxels_are_rounded_and_no_border_is_darker():
    voxels = np.zeros((1, 3, 2, 1), np.uint8)
    voxels[0, :2, 0] = 1  # 2 of 4 voxels: a half goes up
    voxels[0, 2, 0, 0], voxels[0, 2, 1, 0] = 255, 252  # alone at the end: 253.5
    np.testing.assert_array_equal(zarr_shards.pool(voxels), [[[[1]], [[254]]]])


def test_a_thin_sheet_keeps_its_share_in_the_levels_of_the_mask(tmp_path):
    mask = np.zeros((32, 32, 32), np.uint8)
    z, y, x = np.indices(mask.shape)
    mask[(z + y + x) % 8 < 2] = 1  # a quarter, thinner than a voxel of level 2
    store = create(tmp_path / "p.zarr", mask.shape)
    fill(store, mask[None] * 255, mask)
    shares = [
        zarr.open_array(store.path / f"labels/mask/{k}", mode="r")[...].mean() for k in (0, 1)
    ]
    assert shares == [0.25, 0.25]


def test_a_shard_of_zeros_is_a_file_and_done(tmp_path):
    store = create(tmp_path / "p.zarr", (16, 16, 32))
    store.write((0, 0, 1), np.zeros((1, 16, 16, 16), np.uint8), np.zeros((16, 16, 16), np.uint8))
    assert store.missing() == [(0, 0, 0)]
    assert (store.path / "0/c/0/0/1").stat().st_size == 8 * 16 + 4  # the index alone


def test_metadata_of_arrays_is_what_zarr_itself_would_write(tmp_path):
    store = create(tmp_path / "p.zarr", names=TWO)
    for name, lead in (("0", (2,)), ("labels/mask/0", ())):
        theirs = zarr.create_array(
            tmp_path / f"theirs{len(lead)}",
            shape=(*lead, *SHAPE),
            dtype="uint8",
            shards=(*lead, 16, 16, 16),
            chunks=(*(1 for _ in lead), 8, 8, 8),
            compressors=zarr.codecs.ZstdCodec(level=3, checksum=True),
            dimension_names=[*("c" for _ in lead), "z", "y", "x"],
            fill_value=0,
        )
        ours = zarr.open_array(store.path / name, mode="r")
        assert ours.metadata == theirs.metadata


def test_files_are_the_same_whoever_writes_them_in_any_order(tmp_path):
    probability, mask = voxels()
    one, other = create(tmp_path / "one.zarr"), create(tmp_path / "other.zarr")
    fill(one, probability, mask)
    again = zarr_store.open_store(other.path)
    fill(again, probability, mask, other.missing()[::-2])
    fill(other, probability, mask)
    assert one.finish() and again.finish() and other.finish()
    assert files(one.path) == files(other.path)


def test_a_damaged_chunk_is_noticed_by_zarr(tmp_path):
    store = create(tmp_path / "p.zarr", (16, 16, 16))
    fill(store, *(array[..., -16:, -16:, -16:] for array in voxels((16, 16, 32))))
    path = store.path / "0/c/0/0/0"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises((RuntimeError, ValueError)):
        zarr.open_array(store.path / "0", mode="r")[...]


# ---------------------------------------------------------------------------- what others read


def test_each_level_says_where_the_centers_of_its_voxels_are(tmp_path):
    store = create(tmp_path / "p.zarr")
    places = {}
    for folder in ("", "labels/mask"):
        ome = json.loads((store.path / folder / "zarr.json").read_text())["attributes"]["ome"]
        assert [axis["unit"] for axis in ome["multiscales"][0]["axes"]] == ["micrometer"] * 3
        places[folder] = [
            [t[t["type"]] for t in dataset["coordinateTransformations"]]
            for dataset in ome["multiscales"][0]["datasets"]
        ]
    assert places[""][:2] == [
        [[4.0, 2.0, 2.0], [10.0, 0.0, 6.0]],
        [[8.0, 4.0, 4.0], [12.0, 1.0, 7.0]],  # means lie half a voxel further
    ]
    assert places[""][2] == [[16.0, 8.0, 8.0], [16.0, 3.0, 9.0]]  # one and a half
    assert places["labels/mask"][1] == [[8.0, 4.0, 4.0], [10.0, 0.0, 6.0]]  # the first of two


@pytest.mark.parametrize("about", [{}, {"names": TWO}, {"spacing": None, "unit": ""}])
def test_metadata_is_valid_ome_zarr(tmp_path, about):
    models = pytest.importorskip("ome_zarr_models")
    v05 = pytest.importorskip("ome_zarr_models.v05")
    store = create(tmp_path / "p.zarr", **about)
    kinds = {"": v05.Image, "labels": v05.Labels, "labels/mask": v05.ImageLabel}
    for folder, kind in kinds.items():
        group = zarr.open_group(store.path / folder, mode="r")
        assert type(models.open_ome_zarr(group)) is kind


@pytest.mark.parametrize("names", [{"sheet": 1}, TWO])
def test_the_reader_of_ome_zarr_shows_probability_and_mask(tmp_path, names):
    """napari-ome-zarr shows what this reader yields."""
    io, reader = pytest.importorskip("ome_zarr.io"), pytest.importorskip("ome_zarr.reader")
    probability, mask = voxels(regions=len(names))
    store = create(tmp_path / "p.zarr", names=names)
    fill(store, probability, mask)
    nodes = [node for node in reader.Reader(io.parse_url(str(store.path)))() if node.data]
    image, label = nodes
    np.testing.assert_array_equal(image.data[0].compute().reshape(probability.shape), probability)
    np.testing.assert_array_equal(label.data[0].compute(), mask)
    assert [len(node.data) for node in nodes] == [3, 3]
    assert image.metadata["channel_names"] == list(names)
    assert image.metadata["contrast_limits"] == [[0, 255]] * len(names)
    assert list(label.metadata["color"]) == list(names.values())
    scale = image.metadata["coordinateTransformations"][1][0]["scale"]
    assert scale[-3:] == [8.0, 4.0, 4.0]


# ---------------------------------------------------------------------------- never lost

KILLED = """
import os, signal, sys
import numpy as np
from volumes import zarr_store
path, kill_at = sys.argv[1], int(sys.argv[2])
store = zarr_store.open_store(path)
data = np.load(sys.argv[3])
events = 0
def count():
    global events
    events += 1
    if events == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
real_replace = os.replace
def replace(*paths):
    count()
    real_replace(*paths)
    count()
os.replace = replace
encode = zarr_store.zarr_shards.write_shard
def write_shard(file, *about):
    file.write(b"half")
    file.flush()
    count()
    file.seek(0)
    encode(file, *about)
zarr_store.zarr_shards.write_shard = write_shard
for index in store.missing():
    with store.lock(index) as free:
        box = store.box(index)
        store.write(index, data["probability"][:, *box], data["mask"][box])
store.finish()
"""


def test_a_store_whose_writers_were_killed_equals_an_undisturbed_one(tmp_path):
    shape = (16, 16, 32)
    probability, mask = voxels(shape, seed=1)
    whole, store = create(tmp_path / "whole.zarr", shape), create(tmp_path / "p.zarr", shape)
    fill(whole, probability, mask)
    whole.finish()
    np.savez(tmp_path / "data.npz", probability=probability, mask=mask)
    # A shard is 6 files of 3 events each. In the first file; before the last file of a shard has
    # its name, and after; then before the store is called complete, and after.
    left = []
    for kill_at in (1, 17, 18, 19, 2):
        words = ["-c", KILLED, store.path, kill_at, tmp_path / "data.npz"]
        done = processes.run(words, cwd=ROOT)
        left.append((done.returncode, len(store.missing())))
    assert left == [(-9, 2), (-9, 2), (-9, 1), (-9, 0), (-9, 0)]
    assert store.finish()
    assert create(store.path, shape).description["complete"]
    assert files(store.path) == files(whole.path)


HOLD = """
import os, sys, time
from volumes import zarr_store
with zarr_store.open_store(sys.argv[1]).lock((0, 0, 1)) as free:
    os.mkdir(f"{sys.argv[1]}_{free}")
    time.sleep(60)
"""


def test_one_process_holds_a_shard_until_it_is_killed(tmp_path):
    store = create(tmp_path / "p.zarr")
    holder = processes.Script(["-c", HOLD, store.path], cwd=ROOT)
    while not (tmp_path / "p.zarr_True").exists():
        assert holder.poll() is None
        time.sleep(0.02)
    with store.lock((0, 0, 1)) as free, store.lock((0, 0, 0)) as other:
        assert not free and other
    holder.kill()
    holder.communicate()
    with store.lock((0, 0, 1)) as free:
        assert free


def test_two_writers_share_a_store_and_no_shard_is_written_twice(tmp_path, monkeypatch):
    probability, mask = voxels()
    stores, written = [create(tmp_path / "p.zarr") for _ in range(3)], []
    write = zarr_store.Store.write

    def counted(store, index, *arrays):
        written.append(index)
        write(store, index, *arrays)

    def work(store):
        for index in store.missing():
            with store.lock(index) as free:
                if free:
                    store.write(index, probability[:, *store.box(index)], mask[store.box(index)])
        store.finish()

    monkeypatch.setattr(zarr_store.Store, "write", counted)
    threads = [threading.Thread(target=work, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == list(np.ndindex(2, 2, 3))
    assert zarr_store.open_store(tmp_path / "p.zarr").description["complete"]
    assert not (tmp_path / "p.zarr/.lamina").exists()


def test_a_shard_that_another_process_has_done_meanwhile_is_left_alone(tmp_path):
    store = create(tmp_path / "p.zarr")
    probability, mask = voxels()
    fill(store, probability, mask, [(0, 0, 0)])
    with store.lock((0, 0, 0)) as free:
        assert not free


def test_a_shard_that_is_done_just_before_its_lock_is_free_is_left_alone(tmp_path, monkeypatch):
    store, arrays = create(tmp_path / "p.zarr"), voxels()

    def late(file):
        monkeypatch.undo()
        fill(store, *arrays, [(0, 0, 0)])
        return True

    monkeypatch.setattr(zarr_store.atomic, "try_lock", late)
    with store.lock((0, 0, 0)) as free:
        assert not free


def test_a_store_that_another_process_makes_meanwhile_is_gone_on_with(tmp_path, monkeypatch):
    first, make = create(tmp_path / "p.zarr"), zarr_store._make
    (tmp_path / "p.zarr").rename(tmp_path / "made")

    def late(path, description):
        (tmp_path / "made").rename(path)
        make(path, description)

    monkeypatch.setattr(zarr_store, "_make", late)
    assert create(tmp_path / "p.zarr") == first
    assert [path.name for path in tmp_path.iterdir()] == ["p.zarr"]


def test_processes_that_create_one_store_at_once_all_get_it(tmp_path):
    stores, errors = [], []

    def work():
        try:
            stores.append(create(tmp_path / "p.zarr"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(stores) == 4 and all(store == stores[0] for store in stores)
    assert [path.name for path in tmp_path.iterdir()] == ["p.zarr"]


def test_a_full_disk_is_one_sentence_and_the_next_start_goes_on(tmp_path, monkeypatch):
    probability, mask = voxels()
    store, whole = create(tmp_path / "p.zarr"), create(tmp_path / "whole.zarr")
    encode, calls = zarr_shards.write_shard, itertools.count()

    def full(file, *about):
        if next(calls) == 6 + 3:  # in the second shard
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        encode(file, *about)

    monkeypatch.setattr(zarr_shards, "write_shard", full)
    with pytest.raises(OSError) as caught:
        fill(store, probability, mask)
    path = store.path / "2/c/0/0/1"
    assert str(caught.value) == (
        f"{path}: expected a disk that takes it, got No space left on device; make room and start "
        "again: only what is missing will be done"
    )
    assert list(store.path.rglob(".partial_*")) == []
    assert len(store.missing()) == 11 and not store.finish()
    fill(store, probability, mask)
    fill(whole, probability, mask)
    assert store.finish() and whole.finish() and files(store.path) == files(whole.path)


def test_an_empty_file_is_no_shard(tmp_path):
    store, (probability, mask) = create(tmp_path / "p.zarr"), voxels()
    fill(store, probability, mask)
    whole = files(store.path)
    for name in ("0/c/0/0/1", "labels/mask/0/c/1/1/0"):
        (store.path / name).write_bytes(b"")
    assert store.missing() == [(0, 0, 1)] and store.missing(mask=True) == [(1, 1, 0)]
    with store.lock((0, 0, 1)) as free:
        assert free
    store.repair()
    fill(store, probability, mask)
    assert files(store.path) == whole


def test_a_store_goes_on_with_another_commit_of_the_code(tmp_path):
    create(tmp_path / "p.zarr", provenance={"commit": "a", "checkpoint": "1"})
    create(tmp_path / "p.zarr", provenance={"commit": "b", "checkpoint": "1"})
    with pytest.raises(ValueError, match="checkpoint"):
        create(tmp_path / "p.zarr", provenance={"commit": "b", "checkpoint": "2"})


def test_a_disk_that_is_full_at_the_start_leaves_no_store(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zarr_store.atomic.os, "fsync", full)
    with pytest.raises(ValueError, match=r"expected a disk that takes it, got No space left"):
        create(tmp_path / "p.zarr")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shard": (32, 16, 16)}, "shard [16, 16, 16] instead of [32, 16, 16]"),
        ({"chunk": (4, 4, 4)}, "chunk [8, 8, 8] instead of [4, 4, 4]"),
        ({"shape": (17, 19, 36)}, "shape [17, 19, 35] instead of [17, 19, 36]"),
        ({"spacing": None}, "spacing [4.0, 2.0, 2.0] instead of null"),
        ({"post": True}, "post false instead of true"),
        ({"names": {"vein": 1}}, 'names [["sheet", 1]] instead of [["vein", 1]]'),
        (
            {"provenance": {"checkpoint": "77", "config": {"threshold": 0.4}, "torch": "a"}},
            'checkpoint "3f2a" instead of "77", config.threshold 0.5 instead of 0.4, config.flips '
            '[1, 2] instead of nothing, torch nothing instead of "a"',
        ),
    ],
)
def test_a_store_of_another_prediction_is_refused_with_what_differs(tmp_path, change, said):
    path = tmp_path / "p.zarr"
    create(path)
    with pytest.raises(ValueError) as caught:
        create(path, **change)
    assert str(caught.value) == (
        f"{path}: expected the store of this prediction, got one with {said}; go on with what it "
        "was begun with, or give another output"
    )


def test_regions_in_another_order_are_another_prediction(tmp_path):
    create(tmp_path / "p.zarr", names={"artery": 3, "vein": 7})
    with pytest.raises(ValueError, match="got one with names"):
        create(tmp_path / "p.zarr", names={"vein": 7, "artery": 3})


def test_a_store_of_another_day_is_the_same_prediction(tmp_path, monkeypatch):
    first = create(tmp_path / "p.zarr")
    monkeypatch.setattr(zarr_store, "_now", lambda: "2030-01-01T00:00:00+00:00")
    assert create(tmp_path / "p.zarr") == first


def test_what_is_no_store_is_refused_and_stays(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    zarr.create_array(tmp_path / "scroll.zarr", shape=(4, 4, 4), dtype="uint8")
    for name in ("notes", "notes/a.txt", "scroll.zarr"):
        with pytest.raises(ValueError, match=f"{name}: expected .* got something else"):
            create(tmp_path / name)
    with pytest.raises(ValueError, match=r"none.zarr: expected a store .* got none there"):
        zarr_store.open_store(tmp_path / "none.zarr")
    assert (tmp_path / "notes/a.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "scroll.zarr"]


def test_a_shard_that_is_no_multiple_of_the_chunk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"whole chunks of \(8, 8, 8\), got \(16, 18, 16\)"):
        create(tmp_path / "p.zarr", shard=(16, 18, 16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["probability", "mask", "dtype"])
def test_voxels_of_another_shape_or_type_are_refused_before_anything_is_written(tmp_path, fault):
    store = create(tmp_path / "p.zarr")
    before = files(store.path)
    probability = np.zeros((1, 16, 16, 16 - (fault == "probability")), np.uint8)
    mask = np.zeros((16, 16 - (fault == "mask"), 16), bool if fault == "dtype" else np.uint8)
    with pytest.raises(ValueError, match=r"shard \(0, 0, 0\): expected uint8 of shape"):
        store.write((0, 0, 0), probability, mask)
    assert files(store.path) == before


# ---------------------------------------------------------------------------- masks that come later


def test_a_store_with_post_is_complete_when_its_masks_are_there(tmp_path):
    probability, mask = voxels(regions=2)
    raw = probability // 100
    store = create(tmp_path / "p.zarr", names=TWO, post=True)
    for index in store.missing():
        box = store.box(index)
        store.write(index, probability[:, *box], raw=raw[:, *box])
    assert store.missing() == [] and store.missing(mask=True) == list(np.ndindex(2, 2, 3))
    assert not store.finish()
    codes = zarr.open_array(store.path / zarr_store.RAW / "0", mode="r")
    np.testing.assert_array_equal(codes[...], raw)
    for index in store.missing(mask=True):
        store.write_mask(index, mask[store.box(index)])
    assert store.finish() and not (store.path / ".lamina").exists()
    plain = create(tmp_path / "plain.zarr", names=TWO)
    fill(plain, probability, mask)
    shutil.rmtree(plain.path / ".lamina")
    ours, theirs = files(store.path), files(plain.path)
    assert ours.pop("zarr.json") != theirs.pop("zarr.json") and ours == theirs
