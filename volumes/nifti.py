"""NIfTI: stored x, y, z, turned on reading and turned back on writing, never reoriented.

The header states sizes (pixdim) and up to two affines, qform and sform. As in viewers, sform holds
where its code is above 0, else qform. What is written keeps all three, their codes and the unit.
"""

import gzip

import nibabel
import numpy as np

from volumes.volume import (
    HEADER_TOLERANCE,
    Volume,
    VolumeError,
    apart,
    round_spacing,
    sizes,
    with_unit,
)

WRITES_DIMENSIONS = (3, 4)
UNIT_CODES = {"": 0, "m": 1, "mm": 2, "micron": 3}  # the lowest 3 bits of xyzt_units
SECONDS = (8, 16, 24)  # s, ms, µs: the next 3 bits
PLACE = ("xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
         "qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z")  # fmt: skip
MOST_VOXELS = 2**15 - 1  # on an axis of NIfTI-1
CHUNK = 2**20


def read(path, _dataset, _role):
    """The `Volume` in a NIfTI file, (D, H, W) or (C, D, H, W); float32 if its header scales it."""
    nibabel.imageglobals.logger.disabled = True  # its warnings do not name the file
    kind, packed = type(nibabel.load(path)), path.lower().endswith(".gz")
    with (gzip.open if packed else open)(path, "rb") as stream:
        # Unchecked: a checked header has a spacing of 0 turned into 1, a code above 5 into 0.
        header = kind.header_class.from_fileobj(stream, check=False)
        data = kind.from_stream(stream).dataobj
        array = np.asanyarray(data)
        while packed and stream.read(CHUNK):  # the checksum stands at the end
            pass
    if (data.slope, data.inter) != (1, 0):
        array = array.astype(np.float32)
    notes = []
    array = _of_four_axes(path, array, header, notes)
    spacing = round_spacing(header["pixdim"][3:0:-1])
    unit, doubt = _unit(header), ""
    if not all(0 < s < np.inf for s in spacing):
        header["pixdim"][1:4] = 1  # the spacing is refused, or given by hand
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1
    affine = _affine(header)
    if affine is not None and np.isfinite(affine).all() and header["sform_code"] > 0:
        of_sform = sizes(affine)
        if not np.allclose(spacing, of_sform, rtol=HEADER_TOLERANCE) and all(
            s > 0 for s in spacing
        ):
            got = f"{with_unit(spacing, unit)} (pixdim) and {with_unit(of_sform, unit)} (sform)"
            doubt, spacing = f"expected one voxel size z, y, x, got {got}", of_sform
        elif header["qform_code"] > 0 and (what := apart(_qform(header), affine, array.shape)):
            notes.append(f"qform and sform differ ({what}); sform is used")
    block = header.binaryblock
    return Volume(array.T, spacing, unit, affine, path, block, doubt, tuple(notes))


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
    old = None if header is None else _parse(header)
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
        image.header["xyzt_units"] = int(image.header["xyzt_units"]) & 0xF8 | UNIT_CODES[unit]
    nibabel.save(image, path)


def _parse(block):
    kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    kind = next(kind for kind in kinds if kind.sizeof_hdr == len(block))
    return kind(block, check=False)


def _keep_place(header, old, spacing, affine):
    """Give a header the place that another states, changed as the other's affine has been since.

    spacing, affine: of now, cut out and scaled since old was read; old: as it was read.
    """
    for name in PLACE:
        header[name] = old[name]
    header["pixdim"][:4] = old["pixdim"][:4]
    before = _affine(old)
    if before is not None and affine is not None and not np.array_equal(before, affine):
        change = np.linalg.solve(before, affine)  # of voxels
        if old["qform_code"] > 0:
            old["pixdim"][1:4] = sizes(before)[::-1]
            for name, place in zip("xyz", _qform(old) @ change[:, 3], strict=False):
                header[f"qoffset_{name}"] = place
        for name, row in zip("xyz", old.get_sform() @ change, strict=False):
            header[f"srow_{name}"] = row
    if spacing is not None and not np.allclose(header["pixdim"][3:0:-1], spacing, rtol=1e-4):
        header["pixdim"][1:4] = spacing[::-1]
