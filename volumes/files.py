"""Volumes of every format: found by name, read, and written with spacing, unit and affine.

An image is (C, D, H, W) and a label (D, H, W), in the file's own dtype; spacing is z, y, x. A mask
that is written with the affine of its image overlays that image in a viewer.

A format is a module with three functions, and one line of FORMATS for each of its suffixes:

    read(path, dataset, role) -> Volume      (D, H, W), or (C, D, H, W) with its channels
    count_voxels(path, dataset) -> int       from the header alone
    write(path, array, spacing, unit, affine)   of as many dimensions as WRITES_DIMENSIONS names

dataset and role ("image" or "label") say which volume is meant, in files that hold several.
"""

import glob
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from volumes import atomic, hdf5, nifti, tiff
from volumes.volume import VolumeError, printable

FORMATS = {
    ".nii.gz": nifti,
    ".nii": nifti,
    ".tif": tiff,
    ".tiff": tiff,
    ".h5": hdf5,
    ".hdf5": hdf5,
}
METRES = {"m": 1.0, "mm": 1e-3, "micron": 1e-6, "nm": 1e-9}  # of a unit
_HDF5_NAME = re.compile(r"^(.*\.(?:h5|hdf5)):(.+)$", re.IGNORECASE)
_CHANNEL = re.compile(r"_0000$")
_IMAGE_ROLE = re.compile(r"[_-](?:img|image|raw|im|vol)$", re.IGNORECASE)
# A label word may be followed by one more token, as in `_labels_v1` or `_seg-manual`, but by no
# bare number: `label_01` and `label_02` are two cases.
_LABEL_ROLE = re.compile(
    r"[_-](?:(?:lbl|labels?)(?:[_-](?!\d+$)[A-Za-z0-9]+)?"
    r"|(?:(?:gm|wm|sc)?seg|segmentation|masks?|gt|truth|pred|prediction)"
    r"(?:[_-](?:manual|auto|final|corrected|v\d+))?)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """The file of a volume that has not been read. path may be `file.h5:dataset`."""

    id: str
    path: str


# ---------------------------------------------------------------------------- names


def split_dataset(path):
    """`file.h5:dataset` as (file, dataset); any other path as (path, None)."""
    match = _HDF5_NAME.match(str(path))
    return (match[1], match[2]) if match else (str(path), None)


def suffix_of(path):
    """The known suffix of a file name in lower case (".nii.gz" is one), or ""."""
    name = Path(split_dataset(path)[0]).name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), "")


def stem_of(path):
    """The file name without folder, dataset and known suffix."""
    name = Path(split_dataset(path)[0]).name
    return name[: len(name) - len(suffix_of(name))]


def case_id(path):
    """The id that an image, its label and its prediction share.

    Drops folder, suffix, the first-channel mark `_0000` and words of role, one after another:
    `a_img.nii.gz`, `a_0000.tif`, `a_labels_v1.tif` and `a_seg-manual.nii.gz` are all `a`.
    """
    stem = stem_of(path)
    while True:
        shorter = _LABEL_ROLE.sub("", _IMAGE_ROLE.sub("", _CHANNEL.sub("", stem)))
        if shorter in ("", stem):
            return stem
        stem = shorter


def is_label_name(path):
    """Whether the file name ends in a word for labels, such as `_lbl`, `_seg` or `_mask`."""
    return _LABEL_ROLE.search(stem_of(path)) is not None


def find_volumes(text):
    """The volumes that text names, as a list of `Source`, sorted by path.

    text is a file, `file.h5:dataset`, a folder, a glob, or a pattern with `{id}` where the id
    stands, such as `folder/{id}_denoised.tif`. VolumeError if there are none.
    """
    text = str(text)
    location, dataset = split_dataset(text)
    if os.path.isfile(location):
        return _in_utf8([Source(case_id(location), text)])
    if os.path.isdir(location):
        pattern = os.path.join(glob.escape(location), "*")
        expected = f"a folder with volumes ({', '.join(FORMATS)}), got one without any"
    elif "{id}" in location or glob.has_magic(location):
        pattern, expected = location, "a pattern that matches volumes, got one that matches none"
    else:
        pattern, expected = "", "a file, a folder or a pattern, got a path that does not exist"
    tail = f":{dataset}" if dataset else ""
    sources = [Source(name, file + tail) for name, file in _matches(pattern)]
    if not sources:
        raise VolumeError(f"{text}: expected {expected}; check the path")
    return _in_utf8(sources)


def _in_utf8(sources):
    """The sources. VolumeError if names of files are no UTF-8, for then their ids are none."""
    names = [os.path.basename(source.path) for source in sources]
    if wrong := [name for name in map(printable, names) if name not in names]:
        raise VolumeError(
            f"{', '.join(wrong)}: expected names of files in UTF-8, got another encoding, as old "
            "archives have; rename them"
        )
    return sources


def _matches(pattern):
    """(id, file) of every volume that a glob or an `{id}` pattern matches, sorted by file."""
    files = [
        file
        for file in sorted(glob.glob(pattern.replace("{id}", "*")))
        if suffix_of(file) and os.path.isfile(file) and not os.path.basename(file).startswith(".")
    ]
    if "{id}" not in pattern:
        return [(case_id(file), file) for file in files]
    regex = re.escape(pattern).replace(r"\*", "[^/]*")
    regex = regex.replace(r"\{id\}", "(?P<id>[^/]+?)", 1).replace(r"\{id\}", "(?P=id)")
    return [(match["id"], file) for file in files if (match := re.fullmatch(regex, file))]


# ---------------------------------------------------------------------------- reading


def read_image(path):
    """The image in a file as a `Volume` with array (C, D, H, W), integers kept as they are.

    TIFF of several pages, NIfTI (3-D, or 4-D with channels last), HDF5 (3-D, or 4-D with
    channels first). Only NIfTI with a scale in its header becomes float32. VolumeError if the
    file cannot be read, or holds no volume, or one with NaN or infinite voxels.
    """
    volume = _read(path, "image")
    array = volume.array
    if array.dtype.kind not in "uif":
        raise VolumeError(
            f"{path}: expected an image of real numbers, got dtype {array.dtype}; convert it"
        )
    if array.dtype.kind == "f" and (bad := array.size - np.count_nonzero(np.isfinite(array))):
        raise VolumeError(
            f"{path}: expected finite values, got {bad} voxels of NaN or Inf; "
            "replace them, by 0 for voxels without a measurement"
        )
    return volume


def read_label(path):
    """The label in a file as a `Volume` with array (D, H, W) of integers.

    Formats as `read_image`. Floats are accepted if every value is whole. VolumeError otherwise,
    and for a file with more than one channel.
    """
    volume = _read(path, "label")
    channels, array = len(volume.array), volume.array[0]
    if channels != 1:
        raise VolumeError(
            f"{path}: expected a label with one channel, got {channels}; "
            "store class ids in one volume"
        )
    if array.dtype.kind not in "ui":
        # NaN fails the comparison too, and beyond 2^24 a float32 is not exact any more.
        real = array.dtype.kind == "f"
        if not real or not (np.abs(array) < 2**24).all() or (array != np.rint(array)).any():
            raise VolumeError(
                f"{path}: expected a label of whole numbers, got {array.dtype} with values that "
                "are none; store class ids"
            )
        array = array.astype(np.int32)
    return replace(volume, array=array)


def voxel_count(path):
    """Voxels of the volume in a file, by its header alone; 0 if that cannot be read."""
    file, dataset = split_dataset(path)
    try:
        return FORMATS[suffix_of(file)].count_voxels(file, dataset)
    except Exception:  # the fault is named when the volume is read
        return 0


def _read(path, role):
    """A `Volume` with (C, D, H, W), native byte order, and no dimension of length 0."""
    file, dataset = split_dataset(path)
    suffix = suffix_of(file)
    if not suffix or not os.path.isfile(file):
        got = "another kind" if os.path.isfile(file) else "none there"
        raise VolumeError(f"{path}: expected a {', '.join(FORMATS)} file, got {got}")
    try:
        volume = FORMATS[suffix].read(file, dataset, role)
    except (VolumeError, MemoryError):
        raise
    # Truncated and foreign files surface as struct, zlib, OS, key and type errors, and more.
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise VolumeError(
            f"{path}: expected a whole {suffix} file, got one that cannot be read "
            f"({type(error).__name__}: {reason[:160]}); it may be truncated, fetch it again"
        ) from error
    array = volume.array
    if 0 in array.shape:
        raise VolumeError(f"{path}: expected a volume, got an empty one of shape {array.shape}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    array = array[None] if array.ndim == 3 else array
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return replace(volume, array=array, path=str(path))


# ---------------------------------------------------------------------------- writing


def write_volume(path, array, *, spacing=None, unit="", affine=None):
    """Write a mask or a probability map; the suffix of path decides on the format.

    array (D, H, W), or (C, D, H, W) for NIfTI and HDF5; bool is written as uint8. spacing
    z, y, x in unit. NIfTI gets affine, or one made of the spacing; TIFF gets one LZW page per
    z and ImageJ's spacing; HDF5 gets the dataset `segmentation`. The file appears whole or not
    at all. VolumeError for another suffix or number of dimensions.
    """
    suffix, array = suffix_of(path), np.asarray(array)
    array = array.astype(np.uint8) if array.dtype == bool else array
    if not suffix:
        raise VolumeError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    if array.ndim not in FORMATS[suffix].WRITES_DIMENSIONS:
        raise VolumeError(f"{path}: expected (D, H, W) to write, got shape {array.shape}")
    with atomic.replacing(path) as partial:
        FORMATS[suffix].write(partial, array, spacing, unit, affine)


def same_axes(a, b):
    """Whether the axes of two volumes point the same way, as far as both files say (affine)."""
    if a.affine is None or b.affine is None:
        return True
    directions = (v.affine[:3, :3] / np.linalg.norm(v.affine[:3, :3], axis=0) for v in (a, b))
    return bool(np.allclose(*directions, atol=0.02))


def crop_affine(affine, offset_zyx):
    """The affine of a volume cut out at offset_zyx (voxels): same axes, moved origin."""
    moved = np.array(affine, np.float64)
    moved[:3, 3] += moved[:3, :3] @ np.asarray(offset_zyx, np.float64)[::-1]
    return moved
