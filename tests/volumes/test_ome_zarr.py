"""OME-Zarr: voxels, places and levels as numpy and the metadata have them; faults in a sentence."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from tests.volumes.zarrs import add_label, set_metadata, write_zarr
from volumes import files, ome_zarr
from volumes.volume import VolumeError

STORES = {
    "v2": {"version": "0.4"},
    "v3": {"version": "0.5"},
    "sharded": {"version": "0.5", "shard": 16},
}
every_store = pytest.mark.parametrize("store", STORES.values(), ids=STORES)


def voxels(shape=(20, 24, 28), dtype=np.uint16):
    return np.random.default_rng(0).integers(1, 200, shape).astype(dtype)


def pyramid(array, levels=3):
    return [array[:: 2**k, :: 2**k, :: 2**k] for k in range(levels)]


def chunk_files(path, level="0"):
    """The files of the chunks of a level, by their key."""
    folder = Path(path, level)
    files = [file for file in folder.rglob("*") if file.is_file()]
    keys = {str(file.relative_to(folder)): file for file in files}
    return {key: file for key, file in keys.items() if not key.startswith((".z", "zarr"))}


def refused(path, **options):
    with pytest.raises(VolumeError) as error:
        ome_zarr.open_volume(path, **options)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


# ---------------------------------------------------------------------------- voxels


@every_store
def test_a_box_holds_what_numpy_cuts_out(tmp_path, store):
    array = voxels()
    path = write_zarr(tmp_path / "a.zarr", [array], **store)
    volume = ome_zarr.open_volume(path)
    assert (volume.shape, volume.dtype, volume.chunks) == ((1, 20, 24, 28), np.uint16, (8, 8, 8))
    for box in (np.s_[:, 3:17, 8:16, 1:28], np.s_[:, 19:20], np.s_[:], np.s_[:, 5:5, 0:99]):
        part = volume[box]
        assert part.dtype == array.dtype and np.array_equal(part, array[None][box])


@pytest.mark.parametrize("axes", ["czyx", "tczyx", "zyxc", "xyz", "tzyx"])
def test_axes_go_by_their_names(tmp_path, axes):
    array = voxels((2, 1, 5, 6, 7))  # c, t, z, y, x
    order = ["ctzyx".index(axis) for axis in axes]
    rest = [axis for axis in range(5) if axis not in order]
    stored = array.transpose(*rest, *order)
    stored = stored[(0,) * len(rest)]
    path = write_zarr(tmp_path / "a.zarr", [stored], axes=axes, chunk=4, spacing=(3.0, 2.0, 1.0))
    volume = ome_zarr.open_volume(path)
    expected = array[:, 0] if "c" in axes else array[:1, 0]
    assert volume.shape == expected.shape and volume.spacing == (3.0, 2.0, 1.0)
    assert np.array_equal(volume[:, 1:5, 2:4, 3:7], expected[:, 1:5, 2:4, 3:7])


def test_axes_go_by_their_types_where_names_are_words(tmp_path):
    array = voxels((2, 1, 5, 6, 7))
    path = write_zarr(tmp_path / "a.zarr", [array], axes="ctzyx", chunk=4)
    group = zarr.open_group(str(path), mode="a")
    content = group.attrs["multiscales"]
    content[0]["axes"][0]["name"], content[0]["axes"][1]["name"] = "stain", "time"
    group.attrs["multiscales"] = content
    assert np.array_equal(ome_zarr.open_volume(path)[:], array[:, 0])
    names, options = ["x", "y", "z", "channel"], {"data": array[:, 0].transpose(3, 2, 1, 0)}
    zarr.create_array(str(tmp_path / "b.zarr"), dimension_names=names, **options)
    options |= {"zarr_format": 2, "attributes": {"_ARRAY_DIMENSIONS": names}}  # as xarray does
    zarr.create_array(str(tmp_path / "c.zarr"), **options)
    for plain in ("b.zarr", "c.zarr"):
        assert np.array_equal(ome_zarr.open_volume(tmp_path / plain)[:], array[:, 0])


@pytest.mark.parametrize("dtype", [">u2", "<i4", ">f4", "bool", "f2"])
def test_voxels_come_in_native_byte_order(tmp_path, dtype):
    array = voxels().astype(dtype)
    part = ome_zarr.open_volume(write_zarr(tmp_path / "a.zarr", [array]))[:]
    assert part.dtype == array.dtype.newbyteorder("=") and np.array_equal(part[0], array)


@every_store
def test_a_box_reads_its_own_chunks_alone(tmp_path, store):
    array = voxels()
    path = write_zarr(tmp_path / "a.zarr", [array], **store)
    first, *others = sorted(chunk_files(path).items())
    assert first[0] in ("0.0.0", "c/0/0/0") and others
    for _, file in others:
        file.write_bytes(b"damaged")
    assert np.array_equal(ome_zarr.open_volume(path)[:, :8, :8, :8], array[None, :8, :8, :8])


def test_threads_read_one_volume_at_once(tmp_path):
    array = voxels()
    volume = ome_zarr.open_volume(write_zarr(tmp_path / "a.zarr", [array]))
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda z: volume[:, z : z + 1], [*range(20)] * 2))
    assert np.array_equal(np.concatenate(rows, axis=1)[0], np.concatenate([array, array]))


def test_a_url_is_read_through_fsspec(tmp_path):
    array = voxels()
    path = write_zarr(tmp_path / "a.zarr", pyramid(array), shard=16, version="0.5")
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/bucket/a.zarr", recursive=True)
    try:
        url = "memory://bucket/a.zarr"
        assert [source.id for source in files.find_volumes(f"{url}/1")] == ["a"]
        assert np.array_equal(files.read_image(f"{url}/1").array[0], array[::2, ::2, ::2])
        assert ome_zarr.open_volume(url).stored(2, 2, 3)
    finally:
        memory.rm("/bucket", recursive=True)


# ---------------------------------------------------------------------------- chunks


def test_a_chunk_that_is_not_stored_is_fill_and_its_index_says_so(tmp_path):
    array = np.full((16, 16, 16), 7, np.uint8)
    array[8:, :8, 8:] = 1
    for name, store in STORES.items():
        path = write_zarr(tmp_path / f"{name}.zarr", [array], fill_value=7, **store)
        volume = ome_zarr.open_volume(path)
        stored = [i for i in np.ndindex(2, 2, 2) if volume.stored(*i)]
        assert (stored, volume.fill) == ([(1, 0, 1)], 7)
        assert np.array_equal(volume[:][0], array)


def test_a_chunk_is_stored_if_any_channel_of_it_is(tmp_path):
    array = np.zeros((2, 16, 8, 8), np.uint8)
    array[1, 8:] = 1
    volume = ome_zarr.open_volume(write_zarr(tmp_path / "a.zarr", [array], axes="czyx"))
    assert [volume.stored(z, 0, 0) for z in (0, 1)] == [False, True]


def test_an_index_at_the_start_of_a_shard_is_read_too(tmp_path):
    array = np.zeros((16, 16, 16), np.uint8)
    array[:8, 8:, :8] = 1
    inner = zarr.codecs.ShardingCodec(chunk_shape=(8, 8, 8), index_location="start")
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    serializer = {"shape": (16,) * 3, "chunks": (16,) * 3, "serializer": inner}
    root.create_array("0", dtype="u1", compressors=None, **serializer)[...] = array
    volume = ome_zarr.open_volume(tmp_path / "a.zarr/0")
    assert volume.chunks == (8, 8, 8)
    assert [i for i in np.ndindex(2, 2, 2) if volume.stored(*i)] == [(0, 1, 0)]


def test_reading_a_file_notes_chunks_that_are_not_stored(tmp_path):
    array = voxels((16, 16, 16))
    array[8:, 8:] = 0
    path = write_zarr(tmp_path / "a.zarr", [array])
    assert files.read_image(path).notes == ("2 of 8 chunks are not stored, and read as 0",)
    box = (slice(0, 9), slice(0, 9), slice(0, 8))
    assert files.read_image(path, box).notes == ("1 of 4 chunks are not stored, and read as 0",)
    assert files.read_image(path, (slice(0, 8),) * 3).notes == ()


@pytest.mark.parametrize(
    ("store", "key", "at"),
    [
        ("v2", "0.1.2", "0:8, 8:16, 16:24"),
        ("v3", "c/0/1/2", "0:8, 8:16, 16:24"),
        ("sharded", "c/0/1/1", "0:8, 16:24, 16:24"),
    ],
)
def test_a_damaged_chunk_is_named_by_its_place_and_file(tmp_path, store, key, at):
    array = voxels()
    path = write_zarr(tmp_path / "a.zarr", [array], **STORES[store])
    file = chunk_files(path)[key]
    whole = file.read_bytes()
    for content in (b"damaged" + whole[7:], b""):
        file.write_bytes(content)
        volume = ome_zarr.open_volume(path)
        with pytest.raises(VolumeError) as error:
            volume[:, :8]
        got = f"the chunk at {at} (z, y, x; file {key}) that cannot ("
        if store == "sharded" and not content:
            got = f"the file {key} that is cut or damaged; fetch it again"
        assert str(error.value).startswith(f"{path}: expected chunks that can be read, got {got}")
        assert np.array_equal(volume[:, :8, :8, :8], array[None, :8, :8, :8])


def test_a_shard_whose_index_is_cut_or_damaged_is_not_read_as_fill(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", [voxels((16, 16, 16))], "0.5", shard=16)
    file = chunk_files(path)["c/0/0/0"]
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole[:-20] + b"\xff" * 16 + whole[-4:]):
        file.write_bytes(content)
        for read in (lambda volume: volume[:], lambda volume: volume.stored(0, 0, 0)):
            with pytest.raises(VolumeError, match="the file c/0/0/0 that is cut or damaged"):
                read(ome_zarr.open_volume(path))


# ---------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_spacing_unit_and_offset_are_those_of_the_level(tmp_path, version):
    levels = pyramid(voxels())
    path = write_zarr(tmp_path / "a.zarr", levels, version, translation=(8.0, 3.0, 1.0))
    volume = ome_zarr.open_volume(path)
    assert (volume.spacing, volume.unit, volume.offset) == ((4, 2, 2), "micron", (8, 3, 1))
    volume = ome_zarr.open_volume(f"{path}/2")
    assert (volume.spacing, volume.level, volume.shape) == ((16, 8, 8), "2", (1, 5, 6, 7))


def test_transformations_hold_one_after_another_and_units_are_converted(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", [voxels()], unit="angstrom", translation=(8.0, 3.0, 1.0))
    group = zarr.open_group(str(path), mode="a")
    content = group.attrs["multiscales"]
    # 4 angstrom at 8, then five times as large and moved by 20: 20 angstrom at 60, in nm 2 and 6.
    content[0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [5, 5, 5]},
        {"type": "translation", "translation": [20, 0, 0]},
    ]
    group.attrs["multiscales"] = content
    volume = ome_zarr.open_volume(path)
    assert (volume.spacing, volume.unit) == ((2.0, 1.0, 1.0), "nm")
    assert volume.offset == pytest.approx((6.0, 1.5, 0.5))


def test_a_scale_of_1_without_a_unit_is_no_spacing(tmp_path):
    one = write_zarr(tmp_path / "one.zarr", pyramid(voxels()), spacing=(1.0,) * 3, unit=None)
    two = write_zarr(tmp_path / "two.zarr", pyramid(voxels()), spacing=(1.0, 2.0, 2.0), unit=None)
    volumes = [ome_zarr.open_volume(path) for path in (one, f"{one}/1", two)]
    assert [volume.spacing for volume in volumes] == [None, None, (1.0, 2.0, 2.0)]
    assert volumes[2].unit == ""


@pytest.mark.parametrize(
    ("wanted", "unit", "level"),
    [
        ((4, 2, 2), "micron", "0"),
        ((8, 4, 4), "micron", "1"),
        ((0.008, 0.004, 0.004), "mm", "1"),
        ((5.8, 2.9, 2.9), "micron", "1"),  # level 1 is 1.38 times as coarse, less than half a step
        ((5.5, 2.75, 2.75), "micron", "0"),  # 1.45 times
        ((15.9, 7.9, 7.9), "micron", "2"),
        ((99, 99, 99), "micron", "2"),
        ((1, 1, 1), "micron", "0"),
        ((4, 4, 4), "micron", "0"),  # z decides: level 1 has 8
        ((2, 2, 2), "micron", "0"),
        ((0, 4, 4), "micron", "1"),  # z is free
        ((8, 4, 4), "", "0"),  # of an unknown unit
        (None, "micron", "0"),
    ],
)
def test_the_level_is_the_coarsest_within_half_a_step_of_what_is_wanted(
    tmp_path, wanted, unit, level
):
    path = write_zarr(tmp_path / "a.zarr", pyramid(voxels()))
    assert ome_zarr.open_volume(path, wanted=wanted, unit=unit).level == level


def test_an_axis_that_level_0_has_too_coarse_keeps_no_level_out(tmp_path):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    datasets = []
    for level, size in enumerate([(30.0, 8.0, 8.0), (30.0, 16.0, 16.0), (60.0, 32.0, 32.0)]):
        group.create_array(str(level), shape=(4, 4, 4), dtype="u1", chunks=(4, 4, 4))
        steps = [{"type": "scale", "scale": size}]
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    set_metadata(group, {"multiscales": [{"axes": axes, "datasets": datasets}]})
    assert ome_zarr.open_volume(path, wanted=(16, 16, 16), unit="micron").level == "1"


def test_a_label_that_came_after_the_metadata_were_consolidated_is_read(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", [voxels()])
    zarr.consolidate_metadata(str(path))
    label = (voxels() > 100).astype(np.uint8)
    add_label(path, "ink", [label])
    assert np.array_equal(files.read_label(path).array, label)


def test_a_plain_array_has_no_spacing(tmp_path):
    array = voxels()
    zarr.save_array(str(tmp_path / "a.zarr"), array)
    zarr.open_group(str(tmp_path / "b.zarr"), mode="w").create_array("x/y", data=array)
    for path in (tmp_path / "a.zarr", tmp_path / "b.zarr/x/y"):
        volume = ome_zarr.open_volume(path)
        assert (volume.spacing, volume.unit, volume.level) == (None, "", "")
        assert np.array_equal(volume[:][0], array)


def test_the_label_of_an_image_is_the_one_in_it(tmp_path):
    image, label = voxels(), (voxels() > 100).astype(np.uint8)
    for version in ("0.4", "0.5"):
        path = write_zarr(tmp_path / f"a{version}.zarr", [image], version)
        assert np.array_equal(files.read_label(path).array, image)  # which is a label itself
        add_label(path, "ink", [label], version)
        assert np.array_equal(files.read_label(path).array, label)
        assert np.array_equal(files.read_image(path).array[0], image)
        add_label(path, "sheets", [1 - label], version)
        assert "got ink, sheets; name one, as " in refused(path, role="label")
        assert np.array_equal(files.read_label(f"{path}/labels/sheets").array, 1 - label)
        assert np.array_equal(files.read_label(f"{path}/labels/sheets/0").array, 1 - label)


# ---------------------------------------------------------------------------- faults


def test_a_level_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", pyramid(voxels()))
    expected = f"{path}/7: expected an array or a group, got none there; its levels are 0, 1, 2"
    assert refused(f"{path}/7") == expected
    assert refused(f"{path}/a/b").endswith("got none there; check the path")


def test_a_group_without_multiscales_is_refused_with_what_is_in_it(tmp_path):
    path = tmp_path / "a.zarr"
    zarr.open_group(str(path), mode="w", zarr_format=2)
    assert "expected the multiscales of OME-Zarr, got a group without; check it" in refused(path)
    write_zarr(path / "0", [voxels()])
    assert refused(path).endswith(f"got a group without; give {path}/0")
    add_label(path / "0", "ink", [voxels()])
    (path / "0/labels/ink/.zattrs").unlink()
    assert refused(path / "0", role="label").endswith(f"give {path}/0/labels/ink/0")
    assert ome_zarr.open_volume(path / "0").spacing == (4.0, 2.0, 2.0)
    assert ome_zarr.open_volume(path / "0/0").spacing == (4.0, 2.0, 2.0)


def test_what_is_no_single_volume_of_real_numbers_is_refused(tmp_path):
    array = voxels((3, 5, 6, 7))
    movie = write_zarr(tmp_path / "movie.zarr", [array], axes="tzyx")
    assert "an axis t of length 1 at most, got t of 3" in refused(movie)
    flat = write_zarr(tmp_path / "flat.zarr", [array[0, 0]], axes="yx")
    assert "expected axes z, y and x, each once, and perhaps c, got y, x" in refused(flat)
    volume = write_zarr(tmp_path / "volume.zarr", [array], axes="czyx")
    group = zarr.open_group(str(volume), mode="a")
    group.attrs["multiscales"] = [{"axes": list("zyx"), "datasets": [{"path": "0"}]}]
    assert "got z, y, x of shape (3, 5, 6, 7)" in refused(volume)
    wave = write_zarr(tmp_path / "wave.zarr", [array[0].astype(np.complex64)])
    assert "expected voxels of real numbers, got dtype complex64" in refused(wave)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("axes", [{"type": "space"}] * 3),
        ("coordinateSystems", [{"name": "physical", "axes": [{"name": a} for a in "xyz"]}]),
        ("datasets", [{"name": "0"}]),
        ("datasets", []),
        ("coordinateTransformations", [{"type": "rotation"}]),
        ("coordinateTransformations", [{"type": "scale", "scale": [0, 1, 1]}]),
        ("coordinateTransformations", [{"type": "scale", "scale": [1, 1]}]),
        ("coordinateTransformations", [{"type": "scale", "scale": [2]}]),
        ("coordinateTransformations", [{"type": "scale", "scale": 2}]),
        ("coordinateTransformations", [{"type": "translation", "translation": [2]}]),
    ],
)
def test_metadata_that_are_wrong_are_refused(tmp_path, key, value):
    path = write_zarr(tmp_path / "a.zarr", [voxels()])
    group = zarr.open_group(str(path), mode="a")
    group.attrs["multiscales"] = [group.attrs["multiscales"][0] | {key: value}]
    assert "expected metadata of OME-Zarr 0.4 or 0.5, got " in refused(path)


def test_what_is_no_zarr_or_is_cut_is_refused(tmp_path):
    assert "expected a zarr group or array, got none there" in refused(tmp_path / "none.zarr")
    (tmp_path / "empty.zarr").mkdir()
    assert "expected a zarr group or array, got none there" in refused(tmp_path / "empty.zarr")
    path = write_zarr(tmp_path / "a.zarr", [voxels()])
    (path / ".zattrs").write_text("{")
    assert "expected metadata of OME-Zarr 0.4 or 0.5, got JSONDecodeError" in refused(path)
    unknown = refused("nothing://a.zarr")
    assert "got ValueError: Protocol not known: nothing; correct them, or check" in unknown


def test_a_level_that_the_metadata_list_and_nobody_wrote_is_refused(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", [voxels()])
    content = json.loads((path / ".zattrs").read_text())
    content["multiscales"][0]["datasets"][0]["path"] = "s0"
    (path / ".zattrs").write_text(json.dumps(content))
    assert f"{path}/s0: expected an array or a group, got none there; its levels" in refused(path)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a.zarr", ("a.zarr", "")),
        ("d.zarrs/a.zarr/", ("d.zarrs/a.zarr", "")),
        ("https://h/b/A.ZARR/labels/mask", ("https://h/b/A.ZARR", "labels/mask")),
        ("d/a.tif", ("d/a.tif", "")),
    ],
)
def test_a_path_is_split_behind_zarr(path, parts):
    assert ome_zarr.split(path) == parts


def test_a_folder_of_volumes_may_hold_zarr(tmp_path):
    for name in ("a_img", "b_img"):
        write_zarr(tmp_path / f"{name}.zarr", pyramid(voxels()))
    found = files.find_volumes(tmp_path)
    assert [(s.id, Path(s.path).name) for s in found] == [("a", "a_img.zarr"), ("b", "b_img.zarr")]
    found = files.find_volumes(f"{tmp_path}/{{id}}_img.zarr/1")
    assert [files.voxel_count(source.path) for source in found] == [10 * 12 * 14] * 2
