"""TIFF, NIfTI and HDF5: arrays with spacing, unit and affine, into files and out of them.

A reader gives (array, spacing z, y, x or None, unit or "", affine or None), axes z, y, x with
channels first, if any; a writer takes the same. What volumes.py builds on.
"""

import contextlib
import logging
from pathlib import Path

import numpy as np

UNITS = {"mm": "mm", "millimeter": "mm", "micron": "micron", "microns": "micron", "um": "micron",
         "µm": "micron", "μm": "micron", "\\u00b5m": "micron", "micrometer": "micron",
         "nm": "nm", "nanometer": "nm", "m": "m", "meter": "m"}  # fmt: skip
NIFTI_UNITS = {"mm": "mm", "micron": "micron", "m": "meter"}
IMAGEJ_DTYPES = ("uint8", "uint16", "float32")
CLASSIC_TIFF_BYTES = 2**32 - 2**25  # beyond this offsets need BigTIFF, which ImageJ has not


class VolumeError(ValueError):
    """A volume that cannot be used; the message is one sentence that names the file."""


def read_tiff(path):
    import tifffile

    with _broken_pages(path), tifffile.TiffFile(path) as tif:
        series, page = tif.series, tif.pages[0]
        shape, axes = series[0].shape, series[0].axes
        if len(series) > 1:
            what = f"{len(series)} images of differing shape"
        elif "S" in axes:
            what = f"colour pictures of shape {shape} (tifffile: photometric='minisblack' for grey)"
        elif len(shape) not in (3, 4) or (len(shape) == 4 and "C" not in axes):
            what = f"one page of shape {shape}" if len(shape) < 3 else f"axes {axes} of {shape}"
        else:
            array = series[0].asarray()
            spacing, unit = _tiff_spacing(page, tif.imagej_metadata)
            array = array if array.ndim == 3 else np.moveaxis(array, axes.index("C"), 0)
            return array, spacing, unit, None
    raise VolumeError(
        f"{path}: expected a TIFF with one grey page per z, got {what}, which is no volume; "
        "store the volume as a multi-page TIFF"
    )


@contextlib.contextmanager
def _broken_pages(path):
    """A truncated TIFF reads as one of fewer pages; tifffile only logs the page that it misses."""
    found, logger = [], logging.getLogger("tifffile")

    def keep(record):
        found.append(record.getMessage())
        return "invalid page offset" not in found[-1]

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
    if any("invalid page offset" in message for message in found):
        raise VolumeError(f"{path}: expected a whole TIFF, got one that is cut; fetch it again")


def _tiff_spacing(page, imagej):
    """(spacing, unit), or (None, ""): only ImageJ's metadata say all three axes and their unit."""
    imagej = imagej or {}
    unit, z = UNITS.get(str(imagej.get("unit", "")).lower(), ""), imagej.get("spacing")
    tags = [page.tags.get(name) for name in ("YResolution", "XResolution")]
    if not unit or z is None or None in tags or any(0 in tag.value for tag in tags):
        return None, ""
    y, x = (tag.value[1] / tag.value[0] for tag in tags)
    return _rounded((z, y, x)), unit


@contextlib.contextmanager
def _unheard(logger):
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def read_nifti(path):
    import nibabel

    with nibabel.openers.ImageOpener(path) as stream:
        size = stream.read(4)
        stream.seek(0)
        two = 540 in (int.from_bytes(size, order) for order in ("little", "big"))
        kind = nibabel.Nifti2Header if two else nibabel.Nifti1Header
        # Unchecked: the checked header that the image carries has a spacing of 0 turned into 1.
        header = kind.from_fileobj(stream, check=False)
    with _unheard(nibabel.imageglobals.logger):  # it says so, and without the file's name
        image = nibabel.load(path)
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
    unit = UNITS.get(image.header.get_xyzt_units()[0], "")
    spacing = _rounded(header["pixdim"][3:0:-1])
    return array.T, spacing, unit, np.array(image.affine, np.float64)


def count_voxels(path, dataset):
    """Voxels of the volume in a file, from its header; of HDF5 without a dataset, the largest."""
    if path.lower().endswith((".tif", ".tiff")):
        import tifffile

        with tifffile.TiffFile(path) as tif:
            return int(np.prod(tif.series[0].shape))
    if path.lower().endswith((".nii", ".nii.gz")):
        import nibabel

        return int(np.prod(nibabel.load(path).shape))
    import h5py

    with h5py.File(path, "r") as file:
        found = [file[dataset]] if dataset else file.values()
        return max(int(each.size) for each in found if isinstance(each, h5py.Dataset))


def read_hdf5(path, dataset, wanted, other):
    import h5py

    with h5py.File(path, "r") as file:
        dataset = dataset or _only_dataset(path, file, wanted, other)
        found = file.get(dataset)
        if not isinstance(found, h5py.Dataset) or found.ndim not in (3, 4):
            got = "none" if found is None else f"shape {getattr(found, 'shape', 'of a group')}"
            raise VolumeError(
                f"{path}:{dataset}: expected a dataset of 3 dimensions, or 4 with channels first, "
                f"got {got}; the file holds {', '.join(_volume_datasets(file)) or 'no volume'}"
            )
        spacing, unit = _hdf5_spacing({**file.attrs, **found.attrs})
        affine = file.attrs.get("affine")
        return found[()], spacing, unit, affine


def _volume_datasets(file):
    names = []
    file.visititems(lambda n, item: names.append(n) if getattr(item, "ndim", 0) in (3, 4) else None)
    return names


def _only_dataset(path, file, wanted, other):
    """The dataset to read where none is named: by its usual name, or because it is the only one."""
    names = _volume_datasets(file)
    usual = [name for name in wanted if name in names]
    rest = [name for name in names if name not in other]
    if usual or len(rest) == 1:
        return (usual or rest)[0]
    raise VolumeError(
        f"{path}: expected the name of a dataset as {Path(path).name}:NAME, got none; "
        f"the file holds {', '.join(names) or 'no volume'}"
    )


def _hdf5_spacing(attributes):
    """(spacing, unit) from the attributes in use: ours, ilastik's, CREMI's, `spacing_<unit>`."""
    unit = UNITS.get(str(attributes.get("unit", attributes.get("units", ""))).lower(), "")
    known = {"spacing": unit, "element_size_um": "micron", "resolution": unit,
             "spacing_mm": "mm", "spacing_um": "micron", "spacing_nm": "nm"}  # fmt: skip
    for name, its_unit in known.items():
        value = np.asarray(attributes.get(name, ()))
        if value.shape == (3,) and value.dtype.kind in "uif":
            return _rounded(value), its_unit
    return None, ""


def _rounded(spacing):
    """To 6 significant digits: headers hold float32, where 0.994 reads 0.9940000176."""
    return tuple(float(f"{float(s):.6g}") for s in spacing)


def write_tiff(path, array, spacing, unit):
    import tifffile

    big = array.nbytes > CLASSIC_TIFF_BYTES
    options = {"compression": "lzw", "photometric": "minisblack", "bigtiff": big}
    if not big and str(array.dtype) in IMAGEJ_DTYPES and len(array) > 1:  # one page has no z
        z, y, x = spacing or (1.0, 1.0, 1.0)
        options |= {"imagej": True, "resolution": (1 / x, 1 / y)}
        options["metadata"] = {"axes": "ZYX", "spacing": z, "unit": unit or "voxel"}
    tifffile.imwrite(path, array, **options)


def write_nifti(path, array, spacing, unit, affine):
    import nibabel

    if affine is None:
        affine = np.diag([*(spacing or (1.0, 1.0, 1.0))[::-1], 1.0])
        if unit == "nm":  # NIfTI has no code for it
            affine[:3] *= 1e-3
            unit = "micron"
    affine = np.array(affine, np.float64)
    image = nibabel.Nifti1Image(array.T, affine, dtype=array.dtype)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(NIFTI_UNITS.get(unit, "unknown"))
    nibabel.save(image, path)


def write_hdf5(path, array, spacing, unit, affine):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("segmentation", data=array, compression="gzip", compression_opts=1)
        file.attrs["unit"] = unit
        if spacing is not None:
            file.attrs["spacing"] = np.asarray(spacing, np.float64)
        if affine is not None:
            file.attrs["affine"] = np.asarray(affine, np.float64)
