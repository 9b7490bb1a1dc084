"""TIFF: one gray page per z, and the spacing where ImageJ's metadata state it."""

import contextlib
import logging

import numpy as np
import tifffile

from volumes.volume import Volume, VolumeError, round_spacing, unit_of

WRITES_DIMENSIONS = (3,)
IMAGEJ_DTYPES = ("uint8", "uint16", "float32")
CLASSIC_TIFF_BYTES = 2**32 - 2**25  # beyond this offsets need BigTIFF, which ImageJ has not


def read(path, _dataset, _role):
    """The `Volume` in a TIFF, (D, H, W) or (C, D, H, W)."""
    with _cut_file_refused(path), tifffile.TiffFile(path) as tif:
        shape, axes = tif.series[0].shape, tif.series[0].axes
        if len(tif.series) > 1:
            got = f"{len(tif.series)} images of differing shape"
        elif "S" in axes:
            got = f"color pictures of shape {shape} (tifffile: photometric='minisblack' for gray)"
        elif len(shape) not in (3, 4) or (len(shape) == 4 and "C" not in axes):
            got = f"one page of shape {shape}" if len(shape) < 3 else f"axes {axes} of {shape}"
        else:
            array = tif.series[0].asarray()
            array = np.moveaxis(array, axes.index("C"), 0) if array.ndim == 4 else array
            return Volume(array, *_spacing_and_unit(tif), None, path)
    raise VolumeError(
        f"{path}: expected a TIFF with one gray page per z, got {got}, which is no volume; "
        "store the volume as a multi-page TIFF"
    )


@contextlib.contextmanager
def _cut_file_refused(path):
    """A truncated TIFF reads as one of fewer pages; tifffile only logs the page that it misses."""
    logger, missing = logging.getLogger("tifffile"), []

    def keep(record):
        cut = "invalid page offset" in record.getMessage()
        if cut:
            missing.append(record)
        return not cut

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
    if missing:
        raise VolumeError(f"{path}: expected a whole TIFF, got one that is cut; fetch it again")


def _spacing_and_unit(tif):
    """(spacing, unit), or (None, ""): only ImageJ's metadata say all three axes and their unit."""
    imagej = tif.imagej_metadata or {}
    unit, z = unit_of(imagej.get("unit", "")), imagej.get("spacing")
    tags = [tif.pages[0].tags.get(name) for name in ("YResolution", "XResolution")]
    if not unit or z is None or None in tags or any(0 in tag.value for tag in tags):
        return None, ""
    y, x = (tag.value[1] / tag.value[0] for tag in tags)
    return round_spacing((z, y, x)), unit


def count_voxels(path, _dataset):
    """Voxels of the volume, from the file's header alone."""
    with tifffile.TiffFile(path) as tif:
        return int(np.prod(tif.series[0].shape))


def write(path, array, spacing, unit, _affine, _header):
    """Write (D, H, W) as LZW pages, with ImageJ's spacing where ImageJ knows the dtype."""
    big = array.nbytes > CLASSIC_TIFF_BYTES
    options = {"compression": "lzw", "photometric": "minisblack", "bigtiff": big}
    if not big and str(array.dtype) in IMAGEJ_DTYPES and len(array) > 1:  # one page has no z
        z, y, x = spacing or (1.0, 1.0, 1.0)
        options |= {"imagej": True, "resolution": (1 / x, 1 / y)}
        options["metadata"] = {"axes": "ZYX", "spacing": z, "unit": unit or "voxel"}
    tifffile.imwrite(path, array, **options)
