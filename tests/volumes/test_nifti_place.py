"""NIfTI headers: a prediction lies where its image lies, for every way a header can say where."""

import gzip
import itertools
import struct

import h5py
import nibabel
import numpy as np
import pytest

import prepare
from volumes.files import read_image, read_label, write_volume
from volumes.inputs import check_inputs
from volumes.volume import Volume, VolumeError, axes_of, compare, crop_affine

SHAPE = (3, 4, 5)  # z, y, x
RUN = {"spacing": [0.0] * 3, "unit": "mm", "channels": 1}


def turned(degrees, sizes, origin=(0, 0, 0), mirror=(1, 1, 1), shear=0.0):
    """An affine: sizes x, y, z, turned about (1, 2, 3), columns mirrored, y pushed along x."""
    x, y, z = np.array([1, 2, 3]) / 14**0.5
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    matrix = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine = np.eye(4)
    matrix = matrix @ np.diag(mirror) @ [[1, shear, 0], [0, 1, 0], [0, 0, 1]]
    affine[:3, :3] = matrix / np.linalg.norm(matrix, axis=0) * sizes
    affine[:3, 3] = origin
    return affine


PLAIN, OBLIQUE = turned(0, (0.5, 1, 2), (7, -8, 9)), turned(20, (0.5, 1, 2), (-30, 12.5, 4))
MIRRORED = turned(20, (0.5, 1, 2), (3, 2, 1), (-1, 1, 1))
SHEARED = turned(10, (0.5, 1, 2), (3, 2, 1), shear=0.2)
HEADERS = {  # name: (qform, its code, sform, its code, xyzt_units)
    "plain": (PLAIN, 1, PLAIN, 1, 2),
    "sform_only": (None, 0, OBLIQUE, 2, 2),
    "qform_only": (OBLIQUE, 1, None, 0, 2),
    "pixdim_only": (None, 0, None, 0, 2),
    "pixdim_only_no_unit": (None, 0, None, 0, 0),
    "oblique": (OBLIQUE, 1, OBLIQUE, 1, 10),
    "oblique_mni": (OBLIQUE, 1, OBLIQUE, 4, 10),
    "oblique_aligned": (OBLIQUE, 2, OBLIQUE, 2, 2),
    "oblique_talairach": (OBLIQUE, 3, OBLIQUE, 3, 2),
    "template": (OBLIQUE, 5, OBLIQUE, 5, 2),
    "mirrored": (MIRRORED, 1, MIRRORED, 1, 2),
    "mirrored_qform": (MIRRORED, 1, None, 0, 2),
    "mirrored_sform": (None, 0, MIRRORED, 1, 2),
    "radiological": (turned(0, (0.5, 1, 2), (9, 0, 0), (-1, 1, 1)), 1, None, 0, 2),
    "two_mirrored": (turned(0, (0.5, 1, 2), (9, 9, 0), (-1, -1, 1)), 1, None, 0, 2),
    "sheared": (None, 0, SHEARED, 1, 2),
    "sheared_qform": (turned(10, (0.5, 1, 2), (3, 2, 1)), 1, SHEARED, 2, 2),
    "micron": (OBLIQUE, 1, OBLIQUE, 1, 3),
    "meter": (OBLIQUE, 1, None, 0, 1),
    "no_unit": (OBLIQUE, 1, OBLIQUE, 1, 0),
    "odd_unit": (PLAIN, 1, PLAIN, 1, 255),
    "time_unit_alone": (None, 0, OBLIQUE, 1, 48),
    "origin_of_sform": (PLAIN, 1, turned(0, (0.5, 1, 2), (70, 0, 0)), 1, 2),
}


def make(path, header, array=None, zooms=(0.5, 1, 2)):
    """A NIfTI file of a header of HEADERS, its fields set one by one."""
    qform, qcode, sform, scode, units = header
    array = np.arange(60, dtype=np.int16).reshape(SHAPE) if array is None else array
    image = nibabel.Nifti1Image(array.T, None)
    fields = image.header
    fields["pixdim"][1:4] = zooms
    if qform is not None:
        fields.set_qform(qform, 1)  # sets pixdim too
    if sform is not None:
        fields["srow_x"], fields["srow_y"], fields["srow_z"] = sform[:3]
    fields["qform_code"], fields["sform_code"], fields["xyzt_units"] = qcode, scode, units
    fields["descrip"], fields["cal_max"], fields["intent_code"] = b"a scan", 1500, 1002
    path.parent.mkdir(exist_ok=True)
    nibabel.save(image, path)
    return path


def places(path, shape=SHAPE):
    """(corners by sform or qform, sizes, codes, units), by the formulas of the NIfTI standard."""
    raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read(348)
    pixdim = struct.unpack_from("<4f", raw, 76)
    codes = struct.unpack_from("<2h", raw, 252)
    b, c, d, *offset = struct.unpack_from("<6f", raw, 256)
    a = max(0.0, 1 - b * b - c * c - d * d) ** 0.5
    rotation = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    sizes = np.array(pixdim[1:4])
    steps = sizes * (1, 1, -1 if pixdim[0] < 0 else 1)
    sform = np.reshape(struct.unpack_from("<12f", raw, 280), (3, 4))
    ends = np.array([*itertools.product(*((0, n - 1) for n in shape[::-1]))], float)
    by_qform = ends * steps @ np.transpose(rotation) + offset
    by_sform = ends @ sform[:, :3].T + sform[:, 3]
    return by_qform * (codes[0] > 0), by_sform * (codes[1] > 0), sizes, codes, raw[123]


def write_prediction(source, folder):
    """The prediction of a file, a fake mask, as infer.py writes it."""
    (volume,), _ = check_inputs([str(source)], RUN | {"unit": ""}, "", folder)
    about = {key: getattr(volume, key) for key in ("spacing", "unit", "affine", "header")}
    mask = np.arange(np.prod(volume.shape), dtype=np.uint8).reshape(volume.shape)
    write_volume(volume.prediction_path(folder), mask, **about)
    return volume.prediction_path(folder)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A folder with an image of every header, i/, and their case files, cases/."""
    folder = tmp_path_factory.mktemp("headers")
    for name, header in HEADERS.items():
        make(folder / "i" / f"{name}.nii.gz", header)
        out = ("--out", folder / "cases" / name, "--workers", 1)
        arguments = ("--images", folder / "i" / f"{name}.nii.gz", *out)
        assert prepare.main([str(a) for a in arguments]) == 0, name
    return folder


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("kind", ["raw", "case"])
def test_a_prediction_lies_where_its_image_lies(cases, tmp_path, name, kind):
    image = cases / "i" / f"{name}.nii.gz"
    source = image if kind == "raw" else cases / "cases" / name / f"{name}.h5"
    mask = write_prediction(source, tmp_path)
    for ours, theirs in zip(places(mask), places(image), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = nibabel.load(mask), nibabel.load(image)
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert ours.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)
    assert (ours.dataobj.slope, ours.dataobj.inter) == (1, 0)
    header = ours.header
    assert (header["cal_max"], header["intent_code"], header["descrip"]) == (0, 0, b"")
    assert compare(read_label(mask), read_image(image)) == ([], [])


# ---------------------------------------------------------------------------- what moves a case


def prepared(folder, header, *options, **how):
    """(image, the prediction of its only case file) after prepare.py with options."""
    image = make(folder / "i" / "a.nii.gz", header, **how)
    out = folder / "cases"
    arguments = ("--images", image, "--out", out, "--workers", 1, *options)
    assert prepare.main([str(a) for a in arguments]) == 0
    (case,) = out.glob("*.h5")
    return image, write_prediction(case, folder / "p")


@pytest.mark.parametrize("name", ["oblique", "qform_only", "sform_only", "origin_of_sform"])
def test_a_crop_lies_where_it_was_cut_by_both_forms(tmp_path, name):
    image, mask = prepared(tmp_path, HEADERS[name], "--crop", "low=1:3")
    whole, part = places(image, SHAPE), places(mask, (2, 4, 5))
    # Corners are x, y, z with z the fastest: planes 0 and 2 of the whole, 0 and 1 of the crop.
    for by, code in ((0, part[3][0]), (1, part[3][1])):
        lower, upper = whole[by][0::2], whole[by][1::2]
        np.testing.assert_allclose(part[by][0::2], (lower + upper) / 2 * (code > 0), atol=1e-5)
        np.testing.assert_allclose(part[by][1::2], upper, atol=1e-5)
    np.testing.assert_array_equal(part[2], whole[2])
    assert part[3:] == whole[3:]


@pytest.mark.parametrize(
    "name", ["oblique_mni", "mirrored_qform", "sheared", "sheared_qform", "pixdim_only"]
)
@pytest.mark.parametrize(
    ("options", "factors", "unit"),
    [
        (("--spacing", 0.002, 0.001, 0.0005), (1e-3,) * 3, 2),
        (("--spacing", 6, 1, 0.5), (1, 1, 3), 2),
        (("--spacing", 2, 1, 0.5, "--unit", "micron"), (1, 1, 1), 3),
        (("--unit", "micron"), (1e3,) * 3, 3),
        (("--unit", "nm"), (1e3,) * 3, 3),  # written as micron
        (("--unit", "m"), (1e-3,) * 3, 1),
    ],
)
def test_what_is_said_by_hand_holds_for_sizes_affine_and_unit(
    tmp_path, name, options, factors, unit
):
    image, mask = prepared(tmp_path, HEADERS[name], *options)
    assert places(mask)[4] & 7 == unit and places(mask)[3] == places(image)[3]
    np.testing.assert_allclose(places(mask)[2], places(image)[2] * factors, rtol=1e-5)
    for ours, theirs, code in zip(places(mask), places(image), places(mask)[3], strict=False):
        if code > 0:  # edges x, y, z from the first corner
            edges = [(corners[[4, 2, 1]] - corners[0]).T for corners in (ours, theirs)]
            np.testing.assert_allclose(edges[0], edges[1] * factors, rtol=1e-4, atol=1e-9)
            # The voxel that lay at the world's origin still does.
            steps = (ours[[4, 2, 1]] - ours[0]) / [[4], [3], [2]]
            old = (theirs[[4, 2, 1]] - theirs[0]) / [[4], [3], [2]]
            np.testing.assert_allclose(
                np.linalg.solve(steps.T, ours[0]), np.linalg.solve(old.T, theirs[0]), rtol=1e-3
            )
    back = read_label(mask)
    assert back.doubt == "" and back.notes == read_image(image).notes
    with h5py.File(next((tmp_path / "cases").glob("*.h5"))) as file:
        if "affine" in file.attrs:
            steps = np.linalg.norm(file.attrs["affine"][:3, :3], axis=0)[::-1]
            np.testing.assert_allclose(steps, file.attrs["spacing"], rtol=1e-5)


def test_a_table_of_spacings_moves_each_case_by_its_own(tmp_path):
    (tmp_path / "s.csv").write_text("id,z,y,x,unit\na,20,10,5,um\n")
    _, mask = prepared(tmp_path, HEADERS["oblique"], "--spacing-csv", tmp_path / "s.csv")
    assert (read_label(mask).spacing, read_label(mask).unit) == ((20, 10, 5), "micron")
    expected = np.diag([10, 10, 10, 1]) @ OBLIQUE
    np.testing.assert_allclose(nibabel.load(mask).affine, expected, rtol=1e-5)


# ---------------------------------------------------------------------------- contradictions


def test_sizes_that_differ_within_a_file_are_a_fault_unless_given(tmp_path, capsys):
    header = (None, 0, OBLIQUE, 1, 2)
    image = make(tmp_path / "i" / "a.nii.gz", header, zooms=(1, 1, 2))
    options = ["--images", str(image), "--out", str(tmp_path / "cases"), "--workers", "1"]
    assert prepare.main(options) == 2
    assert (
        f"{image}: expected one voxel size z, y, x, got 2 1 1 mm (pixdim) and 2 1 0.5 mm (sform); "
        "correct the header or give --spacing Z Y X" in capsys.readouterr().err
    )
    assert prepare.main([*options, "--spacing", "2", "1", "0.5"]) == 0
    mask = write_prediction(tmp_path / "cases" / "a.h5", tmp_path / "p")
    assert read_label(mask).doubt == ""
    np.testing.assert_array_equal(places(mask)[1], places(image)[1])
    np.testing.assert_allclose(places(mask)[2], (0.5, 1, 2))


def test_sizes_that_differ_matter_to_a_run_of_a_spacing_and_are_said_to_any_other(tmp_path):
    image = make(tmp_path / "i" / "a.nii.gz", (None, 0, OBLIQUE, 1, 2), zooms=(1, 1, 2))
    _, (note,) = check_inputs([str(image)], RUN, "", tmp_path / "p")
    assert f"{image}: " in note and "2 1 1 mm (pixdim) and 2 1 0.5 mm (sform)" in note
    with pytest.raises(ValueError, match=r"pixdim.*prepare\.py --spacing Z Y X"):
        check_inputs([str(image)], RUN | {"spacing": [1, 1, 1]}, "", tmp_path / "p")


def test_a_size_of_one_per_cent_off_is_rounding(tmp_path):
    path = make(tmp_path / "i" / "a.nii", (None, 0, PLAIN, 1, 2), zooms=(0.504, 1, 2))
    assert read_image(path).doubt == "" and read_image(path).spacing == (2, 1, 0.504)


@pytest.mark.parametrize(
    ("qform", "what"),
    [
        (turned(0, (0.5, 1, 2), (7.2, -8, 9)), None),  # less than half a voxel
        (turned(0, (0.5, 1, 2), (7.3, -8, 9)), "origin"),
        (turned(0, (0.5, 1, 2), (7, -8, 9), (-1, 1, 1)), "axes"),
        (turned(30, (0.5, 1, 2), (7, -8, 9)), "axes"),
    ],
)
def test_forms_that_differ_within_a_file_are_a_note(tmp_path, qform, what):
    volume = read_image(make(tmp_path / "i" / "a.nii", (qform, 1, PLAIN, 1, 2)))
    note = f"qform and sform differ ({what}); sform is used"
    assert volume.notes == ((note,) if what else ())
    np.testing.assert_allclose(volume.affine, PLAIN)


@pytest.mark.parametrize(
    "fields",
    [
        {280: ("<12f", [0] * 12)},
        {280: ("<12f", [np.nan] * 12)},
        {292: ("<f", [np.inf])},  # the origin
        {280: ("<12f", [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0])},  # x along y
        {252: ("<2h", [1, 0]), 256: ("<3f", [np.nan] * 3)},
        {252: ("<2h", [1, 0]), 256: ("<3f", [2, 2, 2])},  # no quaternion
    ],
)
def test_an_affine_that_cannot_be_inverted_is_a_fault_before_any_prediction(tmp_path, fields):
    path = make(tmp_path / "i" / "a.nii", HEADERS["oblique"])
    raw = bytearray(path.read_bytes())
    for offset, (layout, values) in fields.items():
        struct.pack_into(layout, raw, offset, *values)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.nii: expected an affine that can be inverted"):
        check_inputs([str(path)], RUN, "", tmp_path / "p")


@pytest.mark.parametrize("size", [0, -0.5, np.nan, np.inf])
def test_a_size_that_is_none_is_a_fault_of_any_run(tmp_path, size):
    path = make(tmp_path / "i" / "a.nii", HEADERS["oblique"])
    raw = bytearray(path.read_bytes())
    struct.pack_into("<f", raw, 80, size)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.nii: expected a spacing.*--spacing Z Y X"):
        check_inputs([str(path)], RUN, "", tmp_path / "p")


# ---------------------------------------------------------------------------- between files


def volume_of(affine, unit="mm", spacing=(2, 1, 0.5), path="b", shape=SHAPE):
    return Volume(np.zeros(shape, np.uint8), spacing, unit, affine, path)


MICRON = np.diag([1e3, 1e3, 1e3, 1])
IMAGE = volume_of(OBLIQUE, path="a")


@pytest.mark.parametrize(
    "other",
    [
        volume_of(OBLIQUE),
        volume_of(None),
        volume_of(None, spacing=None, unit=""),
        volume_of(MICRON @ OBLIQUE, "micron", (2000, 1000, 500)),
        volume_of(OBLIQUE, unit=""),
        volume_of(crop_affine(OBLIQUE, (0.4, 0.4, -0.4))),
        volume_of(turned(20.2, (0.5, 1, 2), OBLIQUE[:3, 3])),
        volume_of(OBLIQUE * [1.004, 1, 1, 1], spacing=(2, 1, 0.502)),
    ],
)
def test_headers_that_say_the_same_are_not_mentioned(other):
    assert compare(other, IMAGE) == ([], [])


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (volume_of(MIRRORED), "axes"),
        (volume_of(OBLIQUE * [1, 1, -1, 1]), "axes"),
        (volume_of(OBLIQUE[:, [1, 0, 2, 3]] * [0.5, 2, 1, 1]), "axes"),
        (volume_of(turned(110, (0.5, 1, 2))), "axes"),
        (volume_of(OBLIQUE, spacing=(2, 1, 0.51)), "spacing"),
        (volume_of(OBLIQUE, "micron"), "spacing"),
        (volume_of(OBLIQUE, "m"), "spacing"),
        (volume_of(OBLIQUE, shape=(3, 5, 4)), "shape"),
    ],
)
def test_voxels_that_lie_elsewhere_are_a_fault_that_names_both(other, what):
    faults, _ = compare(other, IMAGE)
    assert faults[0].startswith(f"b: expected the {what} of a, ")


@pytest.mark.parametrize(
    "affine",
    [
        crop_affine(OBLIQUE, (0.6, 0, 0)),
        crop_affine(OBLIQUE, (0, 0, -6)),
        MICRON @ crop_affine(OBLIQUE, (0, 1, 0)),
    ],
)
def test_an_origin_half_a_voxel_away_is_a_note(affine):
    scale = 1e3 if affine[0, 0] > 100 else 1
    other = volume_of(affine, "micron" if scale > 1 else "mm", np.multiply((2, 1, 0.5), scale))
    note = "the headers differ (origin); they are matched voxel by voxel"
    assert compare(other, IMAGE) == ([], [note])


def test_a_slight_turn_moves_the_far_corner_of_a_long_volume():
    other = volume_of(turned(20.5, (0.5, 1, 2), OBLIQUE[:3, 3]), shape=(3, 4, 900))
    assert compare(other, volume_of(OBLIQUE, shape=(3, 4, 900)))[1] != []


def test_a_spacing_by_hand_leaves_the_axes_a_note():
    other, note = volume_of(MIRRORED, spacing=(9, 9, 9)), "the headers differ (axes)"
    faults, notes = compare(other, IMAGE, spacing=False, axes=False)
    assert faults == [] and notes == [f"{note}; they are matched voxel by voxel"]


# ---------------------------------------------------------------------------- odd files


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda packed: packed[:-5] + bytes([packed[-5] ^ 1]) + packed[-4:], "CRC check failed"),
        (lambda packed: packed[:-1] + bytes([packed[-1] ^ 1]), "a damaged one"),
        (lambda packed: packed[:60] + bytes([packed[60] ^ 4]) + packed[61:], "CRC check failed"),
        (lambda packed: packed + b"more", "a damaged one"),
        (lambda packed: packed[:-4], "truncated"),
        (lambda packed: packed[:-9], "truncated"),
    ],
)
def test_gzip_is_checked_to_the_end(tmp_path, damage, sentence):
    path = make(tmp_path / "i" / "a.nii.gz", HEADERS["plain"])
    path.write_bytes(damage(gzip.compress(gzip.decompress(path.read_bytes()), 0)))
    with pytest.raises(VolumeError, match=rf"a\.nii\.gz: .*{sentence}"):
        read_image(path)


def test_gzip_in_two_members_and_padded_with_zeros_is_whole(tmp_path):
    path = make(tmp_path / "i" / "a.nii.gz", HEADERS["plain"])
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]) + bytes(512))
    assert read_image(path).array.reshape(-1).tolist() == list(range(60))


def test_every_unit_code_is_read(tmp_path):
    path = make(tmp_path / "i" / "a.nii", HEADERS["plain"])
    raw = bytearray(path.read_bytes())
    for code in (*range(20), 48, 100, 127, 254, 255):
        raw[123] = code
        path.write_bytes(raw)
        assert read_image(path).unit == {1: "m", 2: "mm", 3: "micron"}.get(code % 8, ""), code


@pytest.mark.parametrize("rest", [(2,), (1, 2), (2, 1), (1, 1, 2)])
def test_axes_of_one_are_dropped_and_channels_come_first(tmp_path, rest):
    array = np.arange(120, dtype=np.int16).reshape(5, 4, 3, *rest)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    expected = array.reshape(5, 4, 3, 2).transpose(3, 2, 1, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").array, expected)


@pytest.mark.parametrize(("step", "unit"), [(2.0, "sec"), (720, "msec"), (0.5, "sec")])
def test_a_series_in_time_is_a_fault_and_channels_beside_a_time_unit_a_note(tmp_path, step, unit):
    image = nibabel.Nifti1Image(np.ones((5, 4, 3, 7), np.int16), np.eye(4))
    image.header.set_xyzt_units("mm", unit)
    nibabel.save(image, tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").notes == (
        "7 volumes along the time axis are read as channels",
    )
    image.header.set_zooms((1, 1, 1, step))
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=r"a series of 7 in time.*store one volume"):
        read_image(tmp_path / "a.nii")


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_either_version_and_byte_order_keeps_its_place(tmp_path, kind, endian):
    header = kind.header_class(endianness=endian)
    image = kind(np.arange(60, dtype=f"{endian}i2").reshape(5, 4, 3), OBLIQUE, header)
    nibabel.save(image, tmp_path / "a.nii.gz")
    mask = nibabel.load(write_prediction(tmp_path / "a.nii.gz", tmp_path / "p"))
    assert isinstance(mask, kind)
    np.testing.assert_array_equal(mask.affine, nibabel.load(tmp_path / "a.nii.gz").affine)


def test_an_axis_too_long_for_nifti_1_is_written_as_nifti_2(tmp_path):
    write_volume(tmp_path / "a.nii", np.ones((1, 1, 2**15), np.uint8), spacing=(3, 2, 1))
    back = read_label(tmp_path / "a.nii")
    assert back.array.shape == (1, 1, 2**15) and back.spacing == (3, 2, 1)


def test_a_header_that_asks_for_more_voxels_than_a_file_can_hold_is_a_fault(tmp_path):
    path = make(tmp_path / "i" / "a.nii.gz", HEADERS["plain"])
    raw = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<3h", raw, 42, 32767, 32767, 32767)
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(VolumeError, match=r"a\.nii\.gz: .*32767, 32767, 32767"):
        read_image(path)


def test_a_constant_volume_that_packs_well_is_read(tmp_path):
    array = np.ones((256, 256, 256), np.uint8)
    path = make(tmp_path / "i" / "a.nii.gz", HEADERS["plain"], array)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9))
    assert read_label(path).array.sum() == 256**3


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_the_directions_of_axes_are_those_of_nibabel(order):
    tilt = np.linalg.qr(np.eye(3) + np.random.default_rng(0).normal(0, 0.2, (3, 3)))[0]
    for signs in itertools.product((-1, 1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = (tilt @ np.diag(signs))[:, order] * (1, 2, 5)
        assert axes_of(affine) == "".join(nibabel.aff2axcodes(affine))
