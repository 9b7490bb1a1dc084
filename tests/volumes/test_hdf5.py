"""HDF5: axes, units, links, and no fill values for voxels that are elsewhere, or nowhere."""

import json

import h5py
import numpy as np
import pytest

from volumes.files import read_image, read_label, voxel_count
from volumes.volume import VolumeError

ZYX = np.random.default_rng(0).integers(-99, 99, (6, 20, 24)).astype(np.int16)
SIZES = [2.0, 0.5, 0.25]


@pytest.fixture
def volume(tmp_path):
    """Writes an array as the only dataset of a.h5, with attributes, and reads it as an image."""

    def read(array, **attributes):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["exported_data"] = array
            file["exported_data"].attrs.update(attributes)
        return read_image(tmp_path / "a.h5")

    return read


@pytest.fixture
def file(tmp_path):
    """Writes a.h5 by a function of the open file; returns its path."""

    def write(fill, name="a.h5"):
        with h5py.File(tmp_path / name, "w") as opened:
            fill(opened)
        return tmp_path / name

    return write


# ---------------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    "shape", [(6, 20, 24, 1), (1, 6, 20, 24), (1, 1, 6, 20, 24), (1, 6, 20, 24, 1)]
)
def test_axes_of_one_around_a_volume_are_left_out(volume, shape):
    assert np.array_equal(volume(ZYX.reshape(shape)).array[0], ZYX)


def test_channels_come_first_and_a_slice_stays_one(volume):
    both = np.stack([ZYX, 2 * ZYX])
    assert np.array_equal(volume(both).array, both)
    assert np.array_equal(volume(both[None]).array, both)
    assert np.array_equal(volume(both[:, :1]).array, both[:, :1])


@pytest.mark.parametrize("shape", [(2, 1, 6, 20, 12), (1, 1, 1, 6, 20, 24), (20, 144)])
def test_a_dataset_that_is_no_volume_is_named_with_its_shape(volume, shape):
    with pytest.raises(VolumeError) as caught:
        volume(ZYX.reshape(shape))
    assert "a.h5:exported_data: expected a dataset of 3 dim" in str(caught.value)
    assert str(shape) in str(caught.value)


def axistags(keys, resolution=None):
    axes = [{"key": k, "typeFlags": 2, "resolution": (resolution or {}).get(k, 0)} for k in keys]
    return json.dumps({"axes": axes})


@pytest.mark.parametrize(
    ("keys", "stored"),
    [
        ("zyx", ZYX),
        ("xyz", ZYX.T),
        ("yxz", ZYX.transpose(1, 2, 0)),
        ("tzyxc", ZYX[None, ..., None]),
        ("tyx", ZYX),
    ],
)
def test_axistags_of_ilastik_give_the_order(volume, keys, stored):
    assert np.array_equal(volume(stored, axistags=axistags(keys)).array[0], ZYX)


def test_axistags_tell_channels_from_slices(volume):
    both = np.stack([ZYX, 2 * ZYX], axis=-1)
    assert np.array_equal(volume(both, axistags=axistags("zyxc")).array, both.transpose(3, 0, 1, 2))
    with pytest.raises(VolumeError, match="with axistags TZYX"):
        volume(np.stack([ZYX, ZYX]), axistags=axistags("tzyx"))


@pytest.mark.parametrize("tags", ["{", axistags("zy"), axistags("zzyx"), "[]", '{"axes": 3}'])
def test_axistags_that_do_not_fit_are_a_fault(volume, tags):
    with pytest.raises(VolumeError, match=r"a\.h5:exported_data: .*with axistags .*[{\[]"):
        volume(ZYX, axistags=tags)


@pytest.mark.parametrize("text", [str, np.bytes_])
def test_axistags_and_axis_units_give_the_spacing(volume, text):
    tags = text(axistags("xyz", {"z": 2.0, "y": 0.5, "x": 250}))
    units = text(json.dumps({"z": "um", "y": "um", "x": "nm"}))
    read = volume(ZYX.T, axistags=tags, axis_units=units)
    assert (read.spacing, read.unit) == ((2000.0, 500.0, 250.0), "nm")
    read = volume(ZYX.T, axistags=tags)
    assert (read.spacing, read.unit) == ((2.0, 0.5, 250.0), "")


def test_axistags_without_resolution_are_no_spacing(volume):
    assert volume(ZYX, axistags=axistags("zyx", {"z": 2.0})).spacing is None


# ---------------------------------------------------------------------------- attributes


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"spacing": SIZES, "unit": np.bytes_("mm")}, (2, 0.5, 0.25, "mm")),
        ({"spacing": SIZES, "unit": np.array([b"um"])}, (2, 0.5, 0.25, "micron")),
        ({"spacing": SIZES, "units": np.bytes_("µm".encode())}, (2, 0.5, 0.25, "micron")),
        ({"spacing": SIZES, "unit": [b"um", b"nm", b"nm"]}, (2000, 0.5, 0.25, "nm")),
        ({"spacing": SIZES, "unit": "cm"}, (20, 5, 2.5, "mm")),
        ({"spacing": SIZES, "unit": "furlong"}, (2, 0.5, 0.25, "")),
        ({"spacing": [SIZES], "unit": "mm"}, (2, 0.5, 0.25, "mm")),
        ({"resolution": [8, 4, 4], "units": np.bytes_("nm")}, (8, 4, 4, "nm")),
        ({"element_size_um": np.float32([2, 1, 1])}, (2, 1, 1, "micron")),
    ],
)
def test_attributes_are_read_as_text_bytes_and_arrays(volume, attributes, expected):
    read = volume(ZYX, **attributes)
    assert (*read.spacing, read.unit) == expected


@pytest.mark.parametrize("value", [h5py.Empty("f8"), "2 1 1", [2.0, 1.0], 2.0])
def test_an_attribute_that_is_no_spacing_is_passed_over(volume, value):
    assert volume(ZYX, spacing=value).spacing is None


def test_a_spacing_goes_with_the_axes_of_its_dataset(volume):
    assert volume(ZYX[..., None], spacing=[*SIZES, 1.0]).spacing == tuple(SIZES)
    assert volume(ZYX[None, None], spacing=SIZES).spacing == tuple(SIZES)
    assert volume(ZYX.T, spacing=SIZES[::-1], axistags=axistags("xyz")).spacing == tuple(SIZES)


@pytest.mark.parametrize("dtype", [">i2", bool, h5py.enum_dtype({"no": 0, "yes": 1}, "u1")])
def test_dtypes_of_other_machines_are_read(file, dtype):
    array = (ZYX > 50).astype(np.uint8)
    path = file(lambda f: f.create_dataset("label", data=array, dtype=dtype))
    assert np.array_equal(read_label(path).array, array)


# ---------------------------------------------------------------------------- links


def test_links_are_followed_and_two_names_of_one_dataset_are_one(file):
    def fill(f):
        f["deep/er/raw"] = ZYX
        f["alias"], f["round/about"] = h5py.SoftLink("/deep/er/raw"), h5py.SoftLink("/round")

    path = file(fill)
    assert np.array_equal(read_image(path).array[0], ZYX)
    assert voxel_count(path) == ZYX.size


def link(f, name, target, to="there.h5"):
    f[name] = h5py.ExternalLink(to, target)


def test_external_links_are_followed_to_datasets_and_groups(file):
    file(lambda f: f.create_dataset("g/raw", data=ZYX), "there.h5")
    for target in ("/g/raw", "/g"):
        path = file(lambda f, to=target: link(f, "x", to))
        assert np.array_equal(read_image(path).array[0], ZYX)


@pytest.mark.parametrize("name", ["image", "raw", "volumes/raw"])
def test_a_link_to_a_file_that_is_gone_is_named(file, name):
    path = file(lambda f: link(f, name, "/d", "gone.h5"))
    for text in (path, f"{path}:{name}"):
        with pytest.raises(VolumeError, match=rf"a\.h5:{name}: .*a link to gone\.h5:/d"):
            read_image(text)


def test_a_link_that_leads_nowhere_is_never_absence(file):
    def fill(f):
        f["raw"], f["other"], f["label"] = ZYX, h5py.SoftLink("/nothing"), h5py.SoftLink("/no")

    path = file(fill)
    with pytest.raises(VolumeError, match="the file holds label, other, raw"):
        read_image(path)
    with pytest.raises(VolumeError, match="label: expected a dataset, got a link to /no"):
        read_label(path)
    assert np.array_equal(read_image(f"{path}:raw").array[0], ZYX)


# ---------------------------------------------------------------------------- voxels elsewhere


def virtual(f, sources=("s0.h5", "s1.h5")):
    layout, half = h5py.VirtualLayout(ZYX.shape, ZYX.dtype), len(ZYX) // 2
    layout[:half] = h5py.VirtualSource(sources[0], "d", (half, 20, 24))
    layout[half:] = h5py.VirtualSource(sources[1], "d", (half, 20, 24))
    f.create_virtual_dataset("raw", layout)


def test_a_virtual_dataset_is_read_from_all_its_sources(file):
    for number, part in enumerate((ZYX[:3], ZYX[3:])):
        file(lambda f, part=part: f.create_dataset("d", data=part), f"s{number}.h5")
    assert np.array_equal(read_image(file(virtual)).array[0], ZYX)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"no HDF5"),
        lambda path: h5py.File(path, "w").close(),
        lambda path: h5py.File(path, "w").create_dataset("d", data=ZYX[3:5]).file.close(),
    ],
)
def test_a_source_of_a_virtual_dataset_that_is_gone_is_named(file, spoil):
    file(lambda f: f.create_dataset("d", data=ZYX[:3]), "s0.h5")
    spoil(file(lambda f: f.create_dataset("d", data=ZYX[3:]), "s1.h5"))
    with pytest.raises(VolumeError, match=r"a\.h5:raw: expected all voxels.*s1\.h5:d"):
        read_image(file(virtual))


def test_a_gap_in_the_source_of_a_source_is_found(file):
    file(lambda f: virtual(f, ("t0.h5", "t1.h5")), "s0.h5")

    def fill(f):
        layout = h5py.VirtualLayout(ZYX.shape, ZYX.dtype)
        layout[:] = h5py.VirtualSource("s0.h5", "raw", ZYX.shape)
        f.create_virtual_dataset("raw", layout)

    with pytest.raises(VolumeError, match=r"a\.h5:raw: .*t0\.h5:d is missing"):
        read_image(file(fill))


def test_external_storage_that_is_gone_or_short_is_named(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = h5py.h5f.UNLIMITED
    parts = [("r0.bin", 0, ZYX.nbytes // 2), ("r1.bin", 8, rest)]
    path = file(lambda f: f.create_dataset("raw", ZYX.shape, ZYX.dtype, external=parts))
    (tmp_path / "r0.bin").write_bytes(ZYX[:3].tobytes())
    for content in (None, b"", bytes(8) + ZYX[3:].tobytes()[:-2]):
        if content is not None:
            (tmp_path / "r1.bin").write_bytes(content)
        with pytest.raises(VolumeError, match=r"a\.h5:raw: .*2880 bytes in r1\.bin are missing"):
            read_image(path)
    (tmp_path / "r1.bin").write_bytes(bytes(8) + ZYX[3:].tobytes())
    assert np.array_equal(read_image(path).array[0], ZYX)


@pytest.mark.parametrize("options", [{}, {"chunks": True}, {"compression": "gzip"}])
def test_a_dataset_that_was_never_written_is_no_volume_of_zeros(file, options):
    path = file(lambda f: f.create_dataset("raw", ZYX.shape, "u1", **options))
    with pytest.raises(VolumeError, match=r"a\.h5:raw: .*no voxel was ever written"):
        read_image(path)
    zeros = file(lambda f: f.create_dataset("raw", data=np.zeros(ZYX.shape), **options))
    assert not read_image(zeros).array.any()


def test_a_file_whose_writer_never_closed_it_is_not_called_truncated(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as writer:
        writer["raw"] = ZYX
        writer.flush()
        content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "b.h5").write_bytes(content)
    with pytest.raises(VolumeError, match=r"b\.h5: .*died before it closed.*h5clear") as caught:
        read_image(tmp_path / "b.h5")
    assert "truncated" not in str(caught.value)


def test_an_unknown_filter_is_named_as_one(file):
    path = file(lambda f: f.create_dataset("raw", data=ZYX, compression="lzf"))
    content = path.read_bytes()
    known = (32000).to_bytes(2, "little") + b"\x08\0"  # lzf, bytes of its name
    assert content.count(known) == 1
    path.write_bytes(content.replace(known, (31999).to_bytes(2, "little") + b"\x08\0"))
    with pytest.raises(VolumeError, match=r"a\.h5: .*compression is not known") as caught:
        read_image(path)
    assert "truncated" not in str(caught.value)


# ---------------------------------------------------------------------------- parts, contradictions


def test_chunks_that_were_never_written_are_a_fault(file):
    def half(opened):
        item = opened.create_dataset("raw", ZYX.shape, "i2", chunks=(2, 20, 24))
        item[:4] = ZYX[:4]

    with pytest.raises(VolumeError, match="1 of 3 chunks were never written"):
        read_image(file(half))


def test_a_part_of_a_virtual_dataset_without_a_source_is_a_fault(file, tmp_path):
    file(lambda f: f.create_dataset("raw", data=ZYX), "source.h5")
    layout = h5py.VirtualLayout(ZYX.shape, ZYX.dtype)
    layout[:4] = h5py.VirtualSource(tmp_path / "source.h5", "raw", ZYX.shape)[:4]
    with pytest.raises(VolumeError, match="a part comes from no source"):
        read_image(file(lambda f: f.create_virtual_dataset("raw", layout)))


def test_a_link_to_itself_harms_no_dataset_that_is_named(file):
    def fill(opened):
        opened["raw"], opened["circle"] = ZYX, h5py.SoftLink("/circle")

    assert np.array_equal(read_image(f"{file(fill)}:raw").array[0], ZYX)


def test_an_attribute_of_another_length_is_noted(volume):
    (note,) = volume(ZYX, element_size_um=5.0).notes
    assert note == "the attribute element_size_um, 5.0, is no size of z, y and x"


def test_two_attributes_of_different_sizes_are_a_fault(volume):
    with pytest.raises(VolumeError, match=r"got 2 2 2 mm \(spacing\) and 5 1 1 micron \(element"):
        volume(ZYX, spacing=[2, 2, 2], unit="mm", element_size_um=[5, 1, 1])
    same = volume(ZYX, spacing=[0.005, 0.001, 0.001], unit="mm", element_size_um=[5, 1, 1])
    assert same.spacing == (0.005, 0.001, 0.001)
