"""NRRD and MetaImage: read as their headers say, and a prediction lies where its image lies."""

import datetime
import gzip
import itertools
import zlib

import numpy as np
import pytest

import prepare
from tests.volumes.test_nifti_place import MIRRORED, OBLIQUE, PLAIN, SHEARED, write_prediction
from volumes import files, formats
from volumes.files import find_volumes, read_image, read_label, write_volume
from volumes.inputs import check_inputs
from volumes.volume import InputErrors, VolumeError

SHAPE = (3, 4, 5)  # z, y, x
VOXELS = np.arange(60, dtype=np.int16).reshape(SHAPE) * 300
AFFINES = {"plain": PLAIN, "oblique": OBLIQUE, "mirrored": MIRRORED, "sheared": SHEARED}
NRRD = "NRRD0004\ntype: short\ndimension: {}\nsizes: {}\nendian: {}\nencoding: {}\n{}\n"
MHA = (
    "ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementType = MET_SHORT\n"
    "BinaryDataByteOrderMSB = {}\nCompressedData = {}\n{}ElementDataFile = {}\n"
)


def text_of(numbers):
    return ",".join(f"{n:.17g}" for n in numbers)


def nrrd(path, lines, array=VOXELS, order="<", packed=False, data_file=None):
    """A NRRD written here; lines: of its header after the encoding."""
    sizes = " ".join(map(str, array.shape[::-1]))
    lines += f"data file: {data_file}\n" if data_file else ""
    how = ("little" if order == "<" else "big", "gzip" if packed else "raw", lines)
    data = array.astype(f"{order}i2").tobytes()
    data = gzip.compress(data) if packed else data
    header = NRRD.format(array.ndim, sizes, *how).encode()
    path.write_bytes(header if data_file else header + data)
    if data_file:
        (path.parent / data_file).write_bytes(data)
    return path


def metaimage(path, lines, array=VOXELS, order="<", packed=False, data_file="LOCAL"):
    """A MetaImage written here; lines: of its header before the last."""
    data = array.astype(f"{order}i2").tobytes()
    data = zlib.compress(data) if packed else data
    header = MHA.format(order == ">", packed, lines, data_file).encode()
    path.write_bytes(header + (data if data_file == "LOCAL" else b""))
    if data_file != "LOCAL":
        (path.parent / data_file).write_bytes(data)
    return path


def in_space(affine, signs, word):
    """The lines of a NRRD for an affine to right, anterior, superior."""
    columns = (np.diag(signs) @ affine[:3]).T
    vectors = " ".join(f"({text_of(c)})" for c in columns[:3])
    return f"space: {word}\nspace directions: {vectors}\nspace origin: ({text_of(columns[3])})\n"


def in_lps(affine):
    """The lines of a MetaImage for an affine to right, anterior, superior."""
    columns = (np.diag([-1, -1, 1]) @ affine[:3]).T
    steps = np.linalg.norm(columns[:3], axis=1)
    matrix = text_of((columns[:3] / steps[:, None]).ravel()).replace(",", " ")
    return (
        f"TransformMatrix = {matrix}\nOffset = {text_of(columns[3]).replace(',', ' ')}\n"
        f"ElementSpacing = {text_of(steps).replace(',', ' ')}\n"
    )


def corners(path):
    """Corners x, y, z of (3, 4, 5) voxels in right, anterior, superior, by the text of a header."""
    lines = path.read_bytes()[:2000].decode("latin-1").split("\n")
    fields = dict(line.split(sep, 1) for line in lines for sep in (": ", " = ") if sep in line)
    ends = np.array([*itertools.product((0, 4), (0, 3), (0, 2))])
    if path.suffix in (".nrrd", ".nhdr"):
        vectors = [eval(word) for word in fields["space directions"].split()]
        places = ends @ np.array(vectors) + eval(fields["space origin"])
        signs = {"l": -1, "p": -1, "r": 1, "a": 1, "s": 1}
        words = fields["space"].split("-") if "-" in fields["space"] else fields["space"]
        return places * [signs[word[0].lower()] for word in words]
    numbers = {key: np.array(fields[key].split(), float) for key in fields if key[0] in "TOE"
               and key in ("TransformMatrix", "Offset", "ElementSpacing")}  # fmt: skip
    steps = numbers["TransformMatrix"].reshape(3, 3) * numbers["ElementSpacing"][:, None]
    return (ends @ steps + numbers["Offset"]) * (-1, -1, 1)


def make(path, affine, **how):
    if path.suffix in (".nrrd", ".nhdr"):
        return nrrd(path, in_space(affine, (-1, -1, 1), "left-posterior-superior"), **how)
    return metaimage(path, in_lps(affine), **how)


# ---------------------------------------------------------------------------- places


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("kind", ["raw", "case"])
def test_a_prediction_lies_where_its_image_lies(tmp_path, suffix, name, kind):
    image = source = make(tmp_path / f"a{suffix}", AFFINES[name])
    if kind == "case":
        arguments = ("--images", image, "--out", tmp_path / "cases", "--workers", 1)
        assert prepare.main([str(a) for a in arguments]) == 0
        source = tmp_path / "cases" / "a.h5"
    mask = write_prediction(source, tmp_path / "out")
    assert mask.name == f"a{suffix}"
    np.testing.assert_allclose(corners(mask), corners(image), rtol=0, atol=1e-9)
    ours, theirs = read_label(mask), read_image(image)
    assert np.array_equal(ours.array, np.arange(60, dtype=np.uint8).reshape(SHAPE))
    assert (ours.spacing, ours.unit, theirs.spacing) == ((2, 1, 0.5), theirs.unit, (2, 1, 0.5))
    expected = np.array([*itertools.product((0, 4), (0, 3), (0, 2))]) @ AFFINES[name][:3, :3].T
    np.testing.assert_allclose(corners(image), expected + AFFINES[name][:3, 3], atol=1e-9)
    np.testing.assert_allclose(theirs.affine, AFFINES[name], atol=1e-9)


@pytest.mark.parametrize(
    ("signs", "word"),
    [
        ((1, 1, 1), "right-anterior-superior"),
        ((1, 1, 1), "RAS"),
        ((-1, 1, 1), "left-anterior-superior"),
        ((-1, -1, 1), "LPS"),
    ],
)
def test_each_space_of_nrrd_is_brought_to_one(tmp_path, signs, word):
    volume = read_image(nrrd(tmp_path / "a.nrrd", in_space(OBLIQUE, signs, word)))
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-12)
    assert volume.notes == ()


def test_a_space_without_directions_of_a_body_is_noted(tmp_path):
    lines = in_space(OBLIQUE, (-1, -1, 1), "scanner-xyz")
    volume = read_image(nrrd(tmp_path / "a.nrrd", lines))
    assert volume.notes == ("its space is scanner-xyz; left-posterior-superior is taken",)


@pytest.mark.parametrize(("suffix", "result"), [(".nhdr", "a.nrrd"), (".mhd", "a.mha")])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
def test_a_header_with_its_voxels_beside_it_is_one_volume(tmp_path, suffix, result, order, packed):
    data_file = {".nhdr": "a.raw.gz", ".mhd": "a.zraw"}[suffix] if packed else "a.raw"
    make(tmp_path / f"a{suffix}", OBLIQUE, order=order, packed=packed, data_file=data_file)
    notes = []
    (source,) = find_volumes(tmp_path, notes)
    volume = read_image(source.path)
    assert np.array_equal(volume.array[0], VOXELS) and volume.array.dtype == np.int16
    assert (source.id, notes, files.voxel_count(source.path)) == ("a", [], 60)
    mask = write_prediction(source.path, tmp_path / "out")
    assert mask.name == result and [p.name for p in (tmp_path / "out").iterdir()] == [result]
    np.testing.assert_allclose(corners(mask), corners(tmp_path / f"a{suffix}"), atol=1e-9)


# ---------------------------------------------------------------------------- sizes and units


@pytest.mark.parametrize(
    ("name", "lines", "spacing", "unit"),
    [
        ("a.nrrd", "", None, ""),
        ("a.nrrd", "spacings: 0.5 1 2\n", (2, 1, 0.5), ""),
        ("a.nrrd", 'spacings: 0.5 1 2\nunits: "cm" "cm" "cm"\n', (20, 10, 5), "mm"),
        ("a.nrrd", in_space(PLAIN, (1, 1, 1), "RAS") + 'space units: "um" "um" "um"\n', (2, 1, 0.5),
         "micron"),
        ("a.mha", "", None, ""),
        ("a.mha", "ElementSpacing = 0.5 1 2\nDistanceUnits = cm\n", (20, 10, 5), "mm"),
        ("a.mha", "ElementSize = 0.5 1 2\n", (2, 1, 0.5), ""),
    ],
)  # fmt: skip
def test_spacing_and_unit_are_those_of_the_header_or_none(tmp_path, name, lines, spacing, unit):
    volume = read_image((nrrd if name == "a.nrrd" else metaimage)(tmp_path / name, lines))
    assert (volume.spacing, volume.unit) == (spacing, unit)
    mask = write_prediction(tmp_path / name, tmp_path / "out")
    assert (read_label(mask).spacing, read_label(mask).unit) == (spacing, unit)


@pytest.mark.parametrize(
    ("name", "lines"),
    [("a.nrrd", "spacings: 0.5 0 2\n"), ("a.mha", "ElementSpacing = 0.5 -1 2\n"),
     ("a.mha", "ElementSpacing = 0.5 nan 2\n")],
)  # fmt: skip
def test_a_spacing_that_is_none_is_refused_by_name(tmp_path, capfd, name, lines):
    (nrrd if name == "a.nrrd" else metaimage)(tmp_path / name, lines)
    arguments = ("--images", tmp_path / name, "--out", tmp_path / "out", "--workers", 1)
    assert prepare.main([str(a) for a in arguments]) == 2
    assert f"{name}: expected a spacing above 0" in capfd.readouterr().err


# ---------------------------------------------------------------------------- channels


@pytest.mark.parametrize(
    ("array", "lines"),
    [
        (np.moveaxis(np.stack([VOXELS, -VOXELS]), 0, -1), "kinds: vector domain domain domain\n"),
        (np.stack([VOXELS, -VOXELS]), "kinds: domain domain domain list\n"),
        (np.moveaxis(np.stack([VOXELS, -VOXELS]), 0, -1),
         "space: LPS\nspace directions: none (1,0,0) (0,2,0) (0,0,3)\nspace origin: (0,0,0)\n"),
        (np.stack([VOXELS, -VOXELS]), "spacings: 1 2 3 nan\nkinds: ??? ??? ??? ???\n"),
    ],
    ids=["first", "last", "directions", "spacings"],
)  # fmt: skip
def test_channels_of_nrrd_are_the_axis_that_its_header_names(tmp_path, array, lines):
    volume = read_image(nrrd(tmp_path / "a.nrrd", lines, array))
    assert np.array_equal(volume.array, [VOXELS, -VOXELS])


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_channels_are_written_and_read_back(tmp_path, name):
    array = np.stack([VOXELS, -VOXELS, VOXELS // 2]).astype(np.float32)
    write_volume(tmp_path / name, array, spacing=(2.0, 1.0, 0.5), unit="mm", affine=OBLIQUE)
    volume = read_image(tmp_path / name)
    assert np.array_equal(volume.array, array) and volume.array.dtype == np.float32
    assert (volume.spacing, volume.unit) == ((2, 1, 0.5), "mm")
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-12)
    assert files.voxel_count(tmp_path / name) == 180


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_equal_voxels_make_equal_files_at_any_time(tmp_path, name):
    write_volume(tmp_path / name, VOXELS, spacing=(2.0, 1.0, 0.5), unit="mm")
    content = (tmp_path / name).read_bytes()
    assert str(datetime.date.today().year).encode() not in content.replace(b"NRRD", b"")[:300]
    write_volume(tmp_path / name, VOXELS, spacing=(2.0, 1.0, 0.5), unit="mm")
    assert (tmp_path / name).read_bytes() == content


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "expected 3 axes of space, got 4"),
        ("kinds: domain domain domain time\n", "got one of the kind time"),
        ("kinds: domain domain 2D-matrix list\n", "got one of the kind 2D-matrix"),
        ("kinds: vector domain domain list\n", "expected 3 axes of space, got 2"),
    ],
)
def test_four_axes_of_nrrd_without_a_word_are_refused(tmp_path, lines, message):
    path = nrrd(tmp_path / "a.nrrd", lines, np.stack([VOXELS, VOXELS]))
    with pytest.raises(VolumeError, match=f"a.nrrd: .*{message}"):
        read_image(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"LPS", b"LPT", "expected a space such as"),
        (b"0.", b"0.\xb4", "expected a field of a NRRD header"),
        (b"space origin", b"space nrigin", "expected a field of a NRRD header, got 'space nrigin"),
    ],
)
def test_a_damaged_header_of_nrrd_is_refused(tmp_path, old, new, message):
    """pynrrd drops bytes that are no ASCII, 0.\xb4605 is 0.605, and lets unknown fields pass."""
    path = nrrd(tmp_path / "a.nrrd", in_space(OBLIQUE, (-1, -1, 1), "LPS") + "my key:=Zo\xeb\n")
    assert read_image(path).notes == ()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(VolumeError, match=f"a.nrrd: .*{message}"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("packed", [False, True])
def test_voxels_that_are_cut_or_gone_are_refused(tmp_path, suffix, packed):
    beside = {"data_file": "a.raw"} if suffix in (".nhdr", ".mhd") else {}
    path = make(tmp_path / f"a{suffix}", PLAIN, packed=packed, **beside)
    data = tmp_path / "a.raw" if beside else path
    data.write_bytes(data.read_bytes()[:-20])
    with pytest.raises(VolumeError, match=f"a{suffix}: expected"):
        read_image(path)
    if beside:
        data.unlink()
        with pytest.raises(VolumeError, match=r"No such file.*see to that first"):
            read_image(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NDims = 3\nDimSize = 5 4 3", "NDims = 4\nDimSize = 5 4 1 3", "expected 3 dimensions"),
        ("MET_SHORT", "MET_FLOAT_ARRAY", "expected ElementType of MET_CHAR"),
        ("LOCAL", "LIST", "expected binary voxels in one file"),
        ("ElementDataFile", "Nothing", "expected a header of MetaImage"),
        ("DimSize = 5 4 3", "DimSize = 5 4 2", "expected 80 bytes of voxels"),
        ("ObjectType", "ElementSpacing = 1 1\nObjectType", "expected 3 numbers of ElementSpacing"),
    ],
)
def test_a_metaimage_that_is_not_understood_is_refused(tmp_path, old, new, message):
    path = metaimage(tmp_path / "a.mha", "")
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(VolumeError, match=f"a.mha: {message}"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr", "a.npy", "a"])
def test_a_suffix_without_a_writer_is_refused_with_what_can_be_written(tmp_path, name):
    with pytest.raises(VolumeError) as caught:
        write_volume(tmp_path / name, np.zeros(SHAPE, np.uint8))
    assert ".nii.gz, .nii, .nrrd, .mha, .tif, .tiff, .h5, .hdf5" in str(caught.value)
    assert "\n" not in str(caught.value) and [*tmp_path.iterdir()] == []


def test_an_image_for_which_nothing_can_be_written_is_refused_before_it_is_predicted(
    tmp_path, monkeypatch
):
    path = make(tmp_path / "a.mha", PLAIN)
    only_read = formats.Format(formats.FORMATS[".mha"].module, "")
    monkeypatch.setitem(formats.FORMATS, ".mha", only_read)
    run = {"spacing": [0.0] * 3, "unit": "", "channels": 1}
    with pytest.raises(InputErrors, match=r"a\.mha: expected a name .*\.mha is only read"):
        check_inputs([str(path)], run, "", tmp_path / "out")
