"""Boxes and rows as VolumeCache reads them from case files, and case files that are wrong."""

import dataclasses
import os
import resource

import h5py
import numpy as np
import pytest

from patches.cache import VolumeCache
from volumes import casefile

SHAPE = (6, 20, 30)
HUGE = 2**30
NAMES = ("image", "label", "skeleton")
BOX = (slice(1, 5), slice(3, 17), slice(0, 30))
CHUNKED = {"chunks": (2, 8, 8)}
STORED = {
    "contiguous": {},
    "lzf": {**CHUNKED, "compression": "lzf"},
    "gzip": {**CHUNKED, "compression": "gzip", "shuffle": True},
}


def write(folder, number=0, shape=SHAPE, *, dtype="u1", channels=1, stored="contiguous"):
    """A case of random voxels, stored as asked: the case, and its arrays."""
    rng = np.random.default_rng(number)
    image = (1000 * rng.random((channels, *shape))).astype(dtype)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    path = folder / f"case{number}.h5"
    settings = {"spacing": (1, 1, 1), "unit": "mm", "affine": None, "group": "g"}
    casefile.write_case(path, image, label, ignore_label=2, skeleton=False, **settings)
    arrays = {"image": image, "label": label, "skeleton": (label == 1).view(np.uint8)}
    with h5py.File(path, "a") as file:
        file.create_dataset("skeleton", data=arrays["skeleton"], chunks=True, compression="lzf")
        if stored != "contiguous":
            del file["image"], file["label"]
            chunks = (1, *CHUNKED["chunks"])
            file.create_dataset("image", data=image, **{**STORED[stored], "chunks": chunks})
            file.create_dataset("label", data=label, **STORED[stored])
    return casefile.read_case(path), arrays


def check(cache, case, arrays, box=BOX, names=NAMES):
    arrays_read = cache.read(case, box, names)
    assert list(arrays_read) == list(names)
    for name in names:
        expected = arrays[name][(..., *box)]
        assert arrays_read[name].dtype == expected.dtype.newbyteorder("=")
        assert arrays_read[name].flags.c_contiguous and arrays_read[name].flags.owndata
        np.testing.assert_array_equal(arrays_read[name], expected)


# ---------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("stored", ["contiguous", "lzf"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<f4", ">f8", "i1"])
def test_any_dtype_comes_in_native_byte_order(tmp_path, dtype, stored):
    case, arrays = write(tmp_path, dtype=dtype, channels=3, stored=stored)
    cache = VolumeCache([case], HUGE)
    for _ in range(2):
        check(cache, case, arrays)
    assert cache.read(case, BOX, ["image"])["image"].shape == (3, 4, 14, 30)


@pytest.mark.parametrize("budget", [0, HUGE])
def test_a_volume_of_one_slice_is_read(tmp_path, budget):
    case, arrays = write(tmp_path, shape=(1, 20, 30))
    check(VolumeCache([case], budget), case, arrays, box=(slice(0, 1), slice(2, 3), slice(0, 30)))


def test_rows_are_those_of_the_stored_lists(tmp_path):
    case, _ = write(tmp_path)
    cache = VolumeCache([case], 0)
    with h5py.File(case.path) as file:
        lists = {"background": file["background"][:], 1: file["foreground/1"][:]}
    for key, rows in lists.items():
        for i in (0, 7, len(rows) - 1):
            row = cache.row(case, key, i)
            assert row.dtype == np.int32 and row.tolist() == rows[i].tolist()


def test_rows_of_a_compressed_list_are_read(tmp_path):
    case, _ = write(tmp_path)
    with h5py.File(case.path, "a") as file:
        rows = file["background"][:]
        del file["background"]
        file.create_dataset("background", data=rows, chunks=True, compression="gzip")
    case = casefile.read_case(case.path)
    assert VolumeCache([case], 0).row(case, "background", 5).tolist() == rows[5].tolist()


@pytest.mark.parametrize("key, i", [("background", -1), ("background", 10**6), (1, 10**6), (9, 0)])
def test_a_row_that_is_not_there_is_refused(tmp_path, key, i):
    case, _ = write(tmp_path)
    with pytest.raises(ValueError, match="case0"):
        VolumeCache([case], 0).row(case, key, i)


# ---------------------------------------------------------------------------- wrong files


def changed(case):
    os.utime(case.path, ns=(0, case.stamp[1] + 1))


def cut(case):
    os.truncate(case.path, case.stamp[0] // 2)


@pytest.mark.parametrize(
    "change, words",
    [
        (changed, "was changed since; start the run again"),
        (cut, "was changed since; start the run again"),
        (lambda case: os.unlink(case.path), "No such file or directory; put it back"),
    ],
)
@pytest.mark.parametrize("budget", [0, HUGE])
def test_a_file_that_changed_is_named(tmp_path, budget, change, words):
    case, arrays = write(tmp_path)
    cache = VolumeCache([case], budget)
    check(cache, case, arrays)
    change(case)
    for read in (lambda: cache.read(case, BOX, NAMES), lambda: cache.row(case, "background", 0)):
        with pytest.raises(ValueError, match=words) as caught:
            read()
        assert "case case0: expected" in str(caught.value) and case.path in str(caught.value)


def test_a_volume_beyond_the_end_of_its_file_is_an_error_and_no_crash(tmp_path):
    case, _ = write(tmp_path)
    layout = {**case.layout, "label": (case.stamp[0] - 5, SHAPE, "|u1")}
    layout["background"] = (case.stamp[0] - 5, (9, 3), "<i4")
    case = dataclasses.replace(case, layout=layout)
    cache = VolumeCache([case], HUGE)
    with pytest.raises(ValueError, match="cut off, prepare this case again"):
        cache.read(case, BOX, NAMES)
    with pytest.raises(ValueError, match="cut off, prepare this case again"):
        cache.row(case, "background", 0)
    assert cache.counts()["bytes"] == 0


def test_chunks_that_cannot_be_decoded_are_an_error_and_leave_no_trace(tmp_path):
    case, _ = write(tmp_path, stored="gzip")
    with h5py.File(case.path) as file:
        first = file["image"].id.get_chunk_info(0)
    with open(case.path, "r+b") as file:
        file.seek(first.byte_offset)
        file.write(bytes(first.size))
    os.utime(case.path, ns=(0, case.stamp[1]))
    cache = VolumeCache([case], HUGE)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"case case0: expected to read .* prepare this case"):
            cache.read(case, tuple(slice(0, n) for n in SHAPE), NAMES)
    assert cache.counts()["bytes"] == 0


def test_a_case_without_a_label_says_so(tmp_path):
    path, settings = tmp_path / "bare.h5", {"unit": "mm", "affine": None, "group": "g"}
    casefile.write_case(path, np.ones((1, *SHAPE), np.uint8), spacing=(1, 1, 1), **settings)
    case = casefile.read_case(path)
    cache = VolumeCache([case], HUGE)
    assert cache.read(case, BOX, ["image"])["image"].sum() == 4 * 14 * 30
    with pytest.raises(ValueError, match=r"case bare: expected 'label' .* got a file with image"):
        cache.read(case, BOX, ["image", "label"])


def test_a_case_that_the_cache_was_not_made_with_is_read_from_its_file(tmp_path):
    (ours, _), (other, arrays) = write(tmp_path, 0, stored="lzf"), write(tmp_path, 1, stored="lzf")
    cache = VolumeCache([ours], HUGE)
    check(cache, other, arrays)
    assert cache.counts()["bytes"] == 0


@pytest.mark.parametrize("z", [slice(-1, 3), slice(4, 7), slice(3, 2)])
def test_a_box_outside_the_volume_is_refused(tmp_path, z):
    case, _ = write(tmp_path)
    with pytest.raises(ValueError, match=r"expected a box inside \(6, 20, 30\)"):
        VolumeCache([case], HUGE).read(case, (z, *BOX[1:]), NAMES)


def test_a_box_touches_its_own_pages_only(tmp_path):
    # Of 2048; a fault maps the pages around it too, if they are in memory.
    case, _ = write(tmp_path, shape=(128, 256, 256))
    cache = VolumeCache([case], 0)
    box = (slice(64, 65), slice(9, 10), slice(9, 10))
    cache.read(case, box, ["image"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cache.read(case, box, ["image"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20


@pytest.mark.parametrize("compression", ["lzf", "gzip"])
@pytest.mark.parametrize("budget", [0, HUGE])
def test_a_bit_that_changed_in_a_compressed_case_is_found(tmp_path, compression, budget):
    path = tmp_path / "case.h5"
    image = np.random.default_rng(0).integers(0, 255, (1, *SHAPE)).astype(np.uint8)
    settings = {"spacing": (1, 1, 1), "unit": "mm", "affine": None, "group": "g"}
    label = (image[0] > 99).view(np.uint8)
    casefile.write_case(
        path, image, label, ignore_label=2, skeleton=False, compression=compression, **settings
    )
    with h5py.File(path) as file:
        chunk = file["image"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 4
    path.write_bytes(content)
    case = casefile.read_case(path)
    cache = VolumeCache([case], budget)
    assert np.array_equal(cache.read(case, BOX, ("label",))["label"], label[BOX])
    with pytest.raises(casefile.Unreadable, match=r"case case: expected to read .*case\.h5"):
        cache.read(case, BOX, ("image",))
