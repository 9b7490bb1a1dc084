"""NIfTI headers: a prediction lies where its image lies, for every way a header can say where."""

import gzip
import itertools
import os
import struct

import h5py
import nibabel
import numpy as np
import pytest

import prepare
from volumes.files import read_image, read_label, write_volume
from volumes.inputs import check_inputs
from volumes.volume import METRES, Volume, VolumeError, compare, crop_affine, scale_affine

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


def write_prediction(source, folder, image=None):
    """The prediction of a file, a fake mask, as infer.py writes it."""
    (volume,), _ = check_inputs([str(source)], RUN | {"unit": ""}, "", folder)
    about = {key: getattr(volume, key) for key in ("spacing", "unit", "affine", "header")}
    write_volume(volume.prediction_path(folder), np.ones(volume.shape, np.uint8), **about)
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
    assert ours.get_data_dtype() == np.uint8 and (np.asanyarray(ours.dataobj) == 1).all()
    assert (ours.dataobj.slope, ours.dataobj.inter) == (1, 0)
    header = ours.header
    assert (header["cal_max"], header["intent_code"], header["descrip"]) == (0, 0, b"")
    assert compare(read_label(mask), read_image(image)) == ([], [])
