"""NIfTI: stored x, y, z, turned on reading and turned back on writing, never reoriented.

The header states sizes (pixdim) and up to two affines, qform and sform. As in viewers, sform holds
where its code is above 0, else qform. What is written keeps all three, their codes and the unit.
"""

import gzip
import math
import os
import zlib

import nibabel
import numpy as np

from volumes.volume import (
    HEADER_TOLERANCE,
    Volume,
    VolumeError,
    apart,
    is_spacing,
    round_spacing,
    scale_affine,
    sizes,
    with_unit,
)

WRITES_DIMENSIONS = (3, 4)
UNIT_CODES = {"": 0, "m": 1, "mm": 2, "micron": 3}  # the lowest 3 bits of xyzt_units
SECONDS = (8, 16, 24)  # s, ms, µs: the next 3 bits
PLACE = ("xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
         "qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z")  # fmt: skip
GZIP = b"\x1f\x8b"  # the first bytes of such a file
MOST_VOXELS = 2**15 - 1  # on an axis of NIfTI-1
MOST_PACKED = 1032  # bytes in one of gzip
CHUNK = 2**20


def read(path, _dataset, _role):
    """The `Volume` in a NIfTI file, (D, H, W) or (C, D, H, W); float32 if its header scales it."""
    nibabel.imageglobals.logger.disabled = True  # its warnings do not name the file
    notes, doubt = [], ""
    with open(path, "rb") as stream:
        packed = stream.read(2) == GZIP  # whatever the file is called
    try:
        with (gzip.open if packed else open)(path, "rb") as stream:
            kind = _kind(stream.read(4))
            stream.seek(0)
            # Unchecked: a checked one has a spacing of 0 turned into 1, and a code above 5 into 0.
            header = kind.from_fileobj(stream, check=False)
            checked = header.copy()
            checked.check_fix()
            data = nibabel.arrayproxy.ArrayProxy(stream, checked)
            if math.prod(data.shape) * data.dtype.itemsize > MOST_PACKED * os.path.getsize(path):
                raise EOFError(f"the header says {data.shape} voxels of {data.dtype}")
            array = np.asanyarray(data)
            while packed and stream.read(CHUNK):  # the checksum stands at the end
                pass
    except (gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError(
            f"{path}: expected a whole gzip file, got a damaged one ({error}); fetch it again"
        ) from error
    if (data.slope, data.inter) != (1, 0):
        array = array.astype(np.float32)
    array = _of_four_axes(path, array, header, notes)
    spacing, unit = round_spacing(header["pixdim"][3:0:-1]), _unit(header)
    usable = is_spacing(spacing)
    if not usable:
        header["pixdim"][1:4] = 1  # the spacing is refused, or given by hand
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1
    affine = _affine(header)
    if usable and affine is not None:
        if not np.allclose(spacing, sizes(affine), rtol=HEADER_TOLERANCE, atol=0.0):
            both = with_unit(spacing, unit), with_unit(sizes(affine), unit)
            doubt = "expected one voxel size z, y, x, got {} (pixdim) and {} (sform)".format(*both)
            spacing = sizes(affine)
        elif min(header["qform_code"], header["sform_code"]) > 0:
            if difference := apart(_qform(header), affine, array.shape):
                notes.append(f"qform and sform differ ({difference}); sform is used")
    return Volume(array.T, spacing, unit, affine, path, header.binaryblock, doubt, tuple(notes))


def _kind(start):
    """The class of a header by its first 4 bytes, its size in either byte order."""
    large = 540 in (int.from_bytes(start, order) for order in ("little", "big"))
    return nibabel.Nifti2Header if large else nibabel.Nifti1Header


def _of_four_axes(path, array, header, notes):
    """The array with x, y, z and perhaps channels: other axes of one voxel are dropped."""
    if array.ndim > 3:
        array = array.reshape(array.shape[:3] + tuple(n for n in array.shape[3:] if n > 1))
    times = int(header["dim"][4]) if header["dim"][0] > 3 else 1
    timed = times > 1 and int(header["xyzt_units"]) & 0x38 in SECONDS
    if timed and header["pixdim"][4] not in (0, 1):
        raise VolumeError(
            f"{path}: expected a NIfTI volume, got a series of {times} in time, "
            f"{header['pixdim'][4]:g} apart; store one volume, such as the mean, or set pixdim[4] "
            "to 0 if these are channels"
        )
    if array.ndim not in (3, 4):
        raise VolumeError(
            f"{path}: expected a NIfTI volume of 3 dimensions, or 4 with channels last, "
            f"got shape {array.shape}"
        )
    if timed:
        notes.append(f"{times} volumes along the time axis are read as channels")
    return array


def _unit(header):
    """The unit of the sizes; "" for codes that mean none."""
    code = int(header["xyzt_units"]) & 7
    return next((unit for unit, its_code in UNIT_CODES.items() if its_code == code), "")


def _affine(header):
    """The affine that holds, as it is in viewers; None if the header has none."""
    if header["sform_code"] > 0:
        return header.get_sform()
    return _qform(header) if header["qform_code"] > 0 else None


def _qform(header):
    try:
        return header.get_qform()
    except ValueError:  # no quaternion
        return np.full((4, 4), np.nan)


def count_voxels(path, _dataset):
    """Voxels of the volume, from the file's header alone."""
    return int(np.prod(nibabel.load(path).shape))


def write(path, array, spacing, unit, affine, header):
    """Write (D, H, W) or (C, D, H, W) on the grid of a header, of an affine or of the spacing."""
    if unit == "nm":  # NIfTI has no code for it
        unit, spacing = "micron", spacing and tuple(1e-3 * s for s in spacing)
        affine = None if affine is None else np.diag([1e-3, 1e-3, 1e-3, 1.0]) @ affine
    old = None if header is None else _kind(header[:4])(header, check=False)
    large = max(array.shape) > MOST_VOXELS or isinstance(old, nibabel.Nifti2Header)
    kind = nibabel.Nifti2Image if large else nibabel.Nifti1Image
    image = kind(array.T, None, dtype=array.dtype)
    if old is not None:
        _keep_place(image.header, old, spacing, affine)
    else:
        if affine is None:
            affine = np.diag([*(spacing or (1.0, 1.0, 1.0))[::-1], 1.0])
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
    if _unit(image.header) != unit:
        times = int(image.header["xyzt_units"]) & 0xF8
        image.header["xyzt_units"] = times | UNIT_CODES.get(unit, 0)
    nibabel.save(image, path)


def _keep_place(header, old, spacing, affine):
    """Give a header the place that another states, changed as the other's affine has been since.

    spacing, affine: of now, cut out and scaled since old was read; old: as it was read.
    """
    for name in PLACE:
        header[name] = old[name]
    header["pixdim"][:4] = old["pixdim"][:4]
    before = _affine(old)
    if before is not None and affine is not None and not np.array_equal(before, affine):
        # The voxel, by the old header, that has become the first one.
        first = np.linalg.solve(scale_affine(before, sizes(affine)), affine[:, 3])
        if old["qform_code"] > 0:
            old["pixdim"][1:4] = sizes(before)[::-1]
            origin = scale_affine(_qform(old), sizes(affine)) @ first
            header["qoffset_x"], header["qoffset_y"], header["qoffset_z"] = origin[:3]
        if old["sform_code"] > 0:
            header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    stated = header["pixdim"][3:0:-1] if before is None else sizes(before)
    if spacing is not None and not np.allclose(stated, spacing, rtol=1e-4, atol=0.0):
        header["pixdim"][1:4] = spacing[::-1]
