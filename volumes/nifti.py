"""NIfTI: stored x, y, z, turned on reading and turned back on writing, never reoriented."""

import nibabel
import numpy as np

from volumes.volume import Volume, VolumeError, round_spacing, unit_of

WRITES_DIMENSIONS = (3, 4)
UNIT_CODES = {"mm": "mm", "micron": "micron", "m": "meter"}


def read(path, _dataset, _role):
    """The `Volume` in a NIfTI file, (D, H, W) or (C, D, H, W); float32 if its header scales it."""
    nibabel.imageglobals.logger.disabled = True  # its warnings do not name the file
    image = nibabel.load(path)
    with nibabel.openers.ImageOpener(path) as stream:
        # Unchecked: the checked header that the image carries has a spacing of 0 turned into 1.
        header = image.header_class.from_fileobj(stream, check=False)
    array = np.asanyarray(image.dataobj)
    if (image.dataobj.slope, image.dataobj.inter) != (1, 0):
        array = array.astype(np.float32)
    if array.ndim == 5 and array.shape[3] == 1:
        array = array[:, :, :, 0]  # a vector image: x, y, z, time, channel
    if array.ndim not in (3, 4):
        raise VolumeError(
            f"{path}: expected a NIfTI volume of 3 dimensions, or 4 with channels last, "
            f"got shape {array.shape}"
        )
    unit, affine = unit_of(image.header.get_xyzt_units()[0]), np.array(image.affine, np.float64)
    return Volume(array.T, round_spacing(header["pixdim"][3:0:-1]), unit, affine, path)


def count_voxels(path, _dataset):
    """Voxels of the volume, from the file's header alone."""
    return int(np.prod(nibabel.load(path).shape))


def write(path, array, spacing, unit, affine, header):
    """Write (D, H, W) or (C, D, H, W) with an affine, or with one made of the spacing."""
    if affine is None:
        affine = np.diag([*(spacing or (1.0, 1.0, 1.0))[::-1], 1.0])
        if unit == "nm":  # NIfTI has no code for it
            affine[:3] *= 1e-3
            unit = "micron"
    affine = np.array(affine, np.float64)
    image = nibabel.Nifti1Image(array.T, affine, dtype=array.dtype)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(UNIT_CODES.get(unit, "unknown"))
    nibabel.save(image, path)
