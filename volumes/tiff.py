"""TIFF: one gray page per z, and the spacing where OME, ImageJ, LSM or nnU-Net state it.

The resolution that any TIFF may state holds for y and x alone, and is mostly that of a printer: it
is no spacing. Voxels are read as viewers show them: of WhiteIsZero pages, white less the value.
"""

import contextlib
import json
import logging
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from volumes.volume import Volume, VolumeError, in_one_unit, order_axes, take_axes, unit_of

WRITES_DIMENSIONS = (3,)
IMAGEJ_DTYPES = ("uint8", "uint16", "float32")
CLASSIC_TIFF_BYTES = 2**32 - 2**25  # beyond this offsets need BigTIFF, which ImageJ has not
WHITE_IS_ZERO = tifffile.PHOTOMETRIC.MINISWHITE
TIFFFILE_IMAGEJ = "1.11a"  # the version of ImageJ that tifffile writes
# What tifffile only logs, to go on with fewer pages or with zeros.
_LOSS = re.compile(
    "invalid page offset|corrupted tag list|offset to page|circular reference|invalid value offset"
    "|failed to re|zeroed|out of range|missing required|missing data|ImageJ series metadata invalid"
    "|missing files|incompletely written|could not read all"
)
_PART = re.compile(r"OME series failed to read '(.+?)'")


def read(path, _dataset, role):
    """The `Volume` in a TIFF, (D, H, W) or (C, D, H, W); role decides on nnU-Net's .json."""
    with _losses_refused(path), tifffile.TiffFile(path) as tif:
        ome = _ome(path, tif)
        pages, shape, axes = _pages(tif)
        order = order_axes(axes, shape)
        if not pages:
            got = "images of differing shape or kind, or several stacks"
        elif "S" in axes and shape[axes.index("S")] > 1:
            got = f"color pictures of shape {shape} (tifffile: photometric='minisblack' for gray)"
        elif order is None:
            got = f"one page of shape {shape}" if len(shape) < 3 else f"axes {axes} of {shape}"
        else:
            series = isinstance(pages, tifffile.TiffPageSeries)
            if not series or pages.dataoffset is None:  # not in one piece, which is read whole
                _check_pages(path, pages)
            array = pages.asarray() if series else np.stack([page.asarray() for page in pages])
            array = take_axes(array.reshape(shape), order)
            array, notes = _as_shown(path, array, pages[0].keyframe, role), []
            if axes[order[-3]] in "TC":
                notes.append(f"its axis {axes[order[-3]]} of {len(array)} is taken for z")
            if (turned := tif.pages[0].tags.get("Orientation")) and turned.value != 1:
                notes.append(f"its Orientation, {turned.value:d}, is not applied: rows as stored")
            stated = _with_json(path, role, *_spacing_and_unit(path, tif, ome))
            return Volume(array, *stated, None, path, notes=tuple(notes))
    raise VolumeError(
        f"{path}: expected a TIFF with one gray page per z, got {got}, which is no volume; store "
        "one volume as a multi-page TIFF (tifffile: metadata={'axes': 'ZYX'}, or 'CZYX')"
    )


@contextlib.contextmanager
def _losses_refused(path):
    """VolumeError for what tifffile only logs, such as a cut file, read as one of fewer pages."""
    logger, losses = logging.getLogger("tifffile"), []

    def keep(record):
        if _LOSS.search(record.getMessage()):
            losses.append(re.sub("^<.*?> ", "", record.getMessage())[:120])
        return False  # the rest is of no use to people, and names no file

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
        if losses:
            part = next(filter(None, map(_PART.search, losses)), None)
            raise VolumeError(
                f"{path}: expected all files of its OME set, got no {part[1]} that can be read "
                "beside it; put it back"
                if part
                else f"{path}: expected a whole TIFF, got one of which a part is missing "
                f"({losses[0]}); fetch it again"
            )


def _ome(path, tif):
    """The root of a file's OME metadata, or None. VolumeError for one file of a companion's set."""
    try:
        root = ElementTree.fromstring(tif.ome_metadata or "")
    except ElementTree.ParseError:
        return None
    if (only := root.find("{*}BinaryOnly")) is None:
        return root
    companion = Path(path).parent / only.get("MetadataFile", "of no name")
    try:
        root = ElementTree.parse(companion).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise VolumeError(
            f"{path}: expected the metadata of its OME set in {companion}, got {error}; put it back"
        ) from error
    parts = {uuid.get("FileName") for uuid in root.findall(".//{*}UUID")}
    pixels = root.findall(".//{*}Pixels")
    if len(parts) > 1 or any(p.get(f"Size{axis}", "1") != "1" for p in pixels for axis in "CT"):
        raise VolumeError(
            f"{path}: expected a TIFF that holds one volume, got a part of the set in {companion}; "
            "save the set as one TIFF, in Fiji or by bfconvert"
        )
    return root


def _pages(tif):
    """(pages, shape, axes) of the only image; of pages written one by one; ([], (), "") else."""
    try:
        series = [s for s in tif.series if not s.keyframe.is_reduced]  # which thumbnails are
    except RuntimeError:  # of pages that are stored in different ways
        series = []
    if len(series) == 1 and series[0].kind != "uniform":
        more = series[0].kind == "imagej" and len(tif.pages) > len(series[0])  # were appended
        return ([], (), "") if more else (series[0], series[0].shape, series[0].axes)
    tif.pages.useframes = False  # frames, and a uniform series, are read as the first page is
    pages = [page for page in (page.aspage() for page in tif.pages) if not page.is_reduced]
    if len(series) == 1 and len({page.hash for page in pages}) == 1:
        return series[0], series[0].shape, series[0].axes
    size = math.prod(pages[0].shape)
    alone = all(s.size == size or s.kind in ("generic", "uniform") for s in series)
    kinds = {(page.shape, page.dtype, page.photometric) for page in pages}
    if not alone or len(kinds) > 1 or sum(s.size for s in series) not in (0, len(pages) * size):
        return [], (), ""
    return pages, (len(pages), *pages[0].shape), "I" + pages[0].axes


def _check_pages(path, pages):
    """VolumeError for a page whose voxels are not in the file, which tifffile may read as 0."""
    for number, page in enumerate(pages, start=1):
        stored = zip(page.dataoffsets, page.databytecounts, strict=True) if page else [(0, 0)]
        size = page and page.parent.filehandle.size
        if any(not (offset and count) or offset + count > size for offset, count in stored):
            raise VolumeError(
                f"{path}: expected the voxels of every page, got none, or not all, of page "
                f"{number} of {len(pages)}; fetch or write it again"
            )


def _as_shown(path, array, page, role):
    """The voxels of a page with 0 as black. VolumeError where WhiteIsZero may mean either."""
    if "PhotometricInterpretation" not in page.tags or page.photometric != WHITE_IS_ZERO:
        return array  # without the tag tifffile says WhiteIsZero, and viewers show 0 as black
    doubt = ""
    if page.bitspersample == 1 and page.software.startswith("tifffile"):
        doubt = "as tifffile writes any bool array, so that viewers show 1 as black"
    elif page.is_imagej and role == "label":
        doubt = "of ImageJ's inverting LUT, which shows 255 as black"
    elif array.dtype.kind not in "bu":
        doubt = f"of {array.dtype}, which has no white"
    if doubt:
        raise VolumeError(
            f"{path}: expected pages in which 0 is black, got WhiteIsZero, {doubt}; store "
            "them with photometric='minisblack', a mask as uint8 with foreground above 0"
        )
    return ~array if array.dtype == bool else array.dtype.type(2**page.bitspersample - 1) - array


# ---------------------------------------------------------------------------- spacing


def _spacing_and_unit(path, tif, ome):
    """(spacing, unit) that the file states, or (None, "") if it does not state all of it."""
    pixels = None if ome is None else ome.find("{*}Image/{*}Pixels")
    if pixels is not None:
        sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
        names = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"]
    elif tif.lsm_metadata:
        sizes = [1e6 * tif.lsm_metadata[f"VoxelSize{axis}"] for axis in "ZYX"]
        names = ["µm"] * 3
    else:
        sizes, names = _imagej_sizes(tif)
    try:
        sizes = [float(size) for size in sizes]
    except (TypeError, ValueError):  # not all three are stated
        return None, ""
    spacing, unit = in_one_unit(path, sizes, names)
    if not unit and spacing == (1, 1, 1):  # pixels: a default
        return None, ""
    return spacing, unit


def _imagej_sizes(tif):
    """(sizes, units) of z, y, x in ImageJ's metadata, or in tifffile's under the same names."""
    about = tif.imagej_metadata or (tif.shaped_metadata or ({},))[0]
    unit, z = about.get("unit", ""), about.get("spacing")
    if z is None and unit_of(unit) and about.get("ImageJ", TIFFFILE_IMAGEJ) != TIFFFILE_IMAGEJ:
        z = 1  # which ImageJ does not write
    tags = [tif.pages[0].tags.get(name) for name in ("YResolution", "XResolution")]
    if not isinstance(z, int | float) or None in tags or any(0 in tag.value for tag in tags):
        return [None] * 3, [""] * 3
    per_cm = unit_of(unit) == "micron" and tif.pages[0].resolutionunit == 3  # as ImageJ reads it
    y, x = (tag.value[1] / tag.value[0] * (1e4 if per_cm else 1) for tag in tags)
    return [abs(z), y, x], [about.get("zunit", unit), about.get("yunit", unit), unit]


def _with_json(path, role, spacing, unit):
    """(spacing, unit) with the spacing that nnU-Net keeps in `<case>.json`, if there is one.

    VolumeError if that is malformed, or in other proportions than what the TIFF itself says.
    """
    stem = re.sub(r"_\d{4}$", "", Path(path).stem) if role == "image" else Path(path).stem
    file = Path(path).with_name(f"{stem}.json")
    if not file.is_file():
        return spacing, unit
    text = file.read_text(encoding="utf-8", errors="replace")
    if '"spacing"' not in text and not Path(path).stem.endswith("_0000"):  # of another program
        return spacing, unit
    try:
        z, y, x = map(float, json.loads(text)["spacing"])
        if not all(0 < size < math.inf for size in (z, y, x)):
            raise ValueError("a size that is none")
    except (ValueError, TypeError, KeyError) as error:
        raise VolumeError(
            f"{path}: expected {file} to hold nnU-Net's spacing, such as "
            f'{{"spacing": [5, 1, 1]}} for z, y and x, got {text[:80]!r}; correct or remove it'
        ) from error
    if spacing is None or not all(size > 0 for size in spacing):
        return (z, y, x), ""
    ratio = np.divide((z, y, x), spacing)
    if not np.allclose(ratio, ratio[0], rtol=0.01, atol=0):
        raise VolumeError(
            f"{path}: expected the spacing that {file} states, {z:g} {y:g} {x:g}, got {spacing} "
            "in the TIFF; correct or remove one"
        )
    return (z, y, x), unit if np.isclose(ratio[0], 1, rtol=0.01) else ""


# ---------------------------------------------------------------------------- header, writing


def count_voxels(path, _dataset):
    """Voxels of the volume, from the file's header alone."""
    with tifffile.TiffFile(path) as tif:
        return sum(math.prod(series.shape) for series in tif.series)


def write(path, array, spacing, unit, _affine, _header):
    """Write (D, H, W) as LZW pages, with ImageJ's spacing where ImageJ knows the dtype."""
    big = array.nbytes > CLASSIC_TIFF_BYTES
    options = {"compression": "lzw", "photometric": "minisblack", "bigtiff": big}
    if array.shape[2] == 1:
        array = array[..., None]  # or x would be taken for the samples of a voxel
    options["metadata"] = {"axes": "ZYXS"[: array.ndim]}
    if not big and str(array.dtype) in IMAGEJ_DTYPES and len(array) > 1:  # one page has no z
        z, y, x = spacing or (1.0, 1.0, 1.0)
        options |= {"imagej": True, "resolution": (1 / x, 1 / y)}
        options["metadata"] |= {"spacing": z, "unit": unit or "voxel"}
    tifffile.imwrite(path, array, **options)
