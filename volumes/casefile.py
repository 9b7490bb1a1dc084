"""Case files: what prepare.py writes and training reads.

One HDF5 file per case:

    image               (C, D, H, W)   source dtype
    label               (D, H, W)      uint8 class ids, if the case is labeled
    skeleton            (D, H, W)      uint8 0 and 1: the tubes around the skeletons of all classes,
                                       each of its own (skeletons.py), for terms that ask for it
    foreground/<class>  (N, 3) int32   voxel coordinates of that class, at most 20 000
    background          (N, 3) int32   the same of labeled background
    attributes          spacing (z, y, x), unit, affine, ignore_label (-1: none), intensity (JSON),
                        source_image, source_label, group, nifti_header (of the image, if any),
                        planes (first and stop, of the z slices of source_image that are here, or
                        of z, y and x where this is a box of it)

`dataset.json` beside them lists cases, groups and classes.
"""

import contextlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from volumes import atomic
from volumes.processes import command_of
from volumes.skeletons import tubed_skeletons
from volumes.statistics import intensity_statistics, sample_coordinates
from volumes.volume import InputErrors, axes_of, check_affine, printable

DATASET_FILE = "dataset.json"
NNUNET_KEYS = {"labels", "channel_names", "modality"}  # of its file of that name, and of MSD's
IGNORE_NONE = -1  # HDF5 attributes know no None
CHUNK = (16, 32, 32)  # of what is compressed: benchmarks/store.py
VOLUMES = ("image", "label", "skeleton")


class Unreadable(ValueError):
    """A case file that cannot be read, or not the one it was; one sentence for people."""


@dataclass(frozen=True)
class Case:
    """What is known of a case without reading its voxels. spacing and shape are z, y, x."""

    id: str
    path: str
    group: str
    shape: tuple[int, int, int]
    channels: int
    dtype: str  # of the stored image
    spacing: tuple[float, float, float]
    unit: str
    labeled: bool
    ignore_label: int | None
    intensity: dict
    # {name: (offset in the file, shape, dtype)}, to read it without HDF5; {name: None} if it
    # is stored in chunks or empty.
    layout: dict
    counts: dict  # {class id: number of stored coordinates, "background": the same}
    stamp: tuple[int, int]  # bytes and time (ns) of the file: its layout holds for these only
    skeleton: bool = False
    source: str = ""  # the raw image
    planes: tuple[int, ...] = ()  # first and stop, of z or z, y, x of its source; () where unknown
    axes: str = ""  # as of `axes_of`; "" without an affine


@dataclass(frozen=True)
class Dataset:
    """The content of `dataset.json`: classes maps a name to its id, background (0) included.

    regions: {name: ids of its classes} as the labels were declared with, {} if they were not; in
    the order in which they are painted, later over earlier.
    """

    root: str
    classes: dict[str, int]
    ignore_label: int | None
    unit: str
    cases: dict[str, Case]
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)


# ---------------------------------------------------------------------------- writing


def write_case(
    path,
    image,
    label=None,
    *,
    spacing,
    unit,
    affine,
    group,
    header=None,
    ignore_label=None,
    source_image="",
    source_label="",
    planes=(),
    skeleton=True,
    compression=None,
    intensity=None,
):
    """Write one case file whole: under a temporary name first, then renamed.

    image (C, D, H, W) any real dtype; label (D, H, W) class ids or None; spacing z, y, x; affine
    (4, 4) voxel x, y, z to world as NIfTI has it, or None; header: of the `Volume`; planes: (first,
    stop) of the z slices of source_image that image holds, or of z, y and x; skeleton: whether a
    labeled case gets one; compression: None, "lzf" or "gzip", of image and label; intensity: the
    image's `intensity_statistics`, if they are known.
    """
    with atomic.replacing(path) as partial, h5py.File(partial, "w") as file:
        # Uncompressed, a box is read from the page cache that all workers share, in 2 ms for
        # 72 x 136 x 136 voxels; with lzf in 18 ms, with gzip in 43 (benchmarks/store.py).
        file.create_dataset("image", data=image, **_storage(image.shape, compression))
        if label is not None:
            label = np.ascontiguousarray(label, dtype=np.uint8)
            ids = _write_label(file, label, ignore_label, _storage(label.shape, compression))
            if skeleton:
                tubes = tubed_skeletons(label, ids, spacing).view(np.uint8)
                # Compressed: a twelfth of the bytes, for 4 ms more per box of 72 x 136 x 136.
                file.create_dataset("skeleton", data=tubes, **_storage(label.shape, "lzf"))
        file.attrs["spacing"] = np.asarray(spacing, np.float64)
        file.attrs["unit"] = unit
        if affine is not None:
            file.attrs["affine"] = np.asarray(affine, np.float64)
        if header is not None:
            file.attrs["nifti_header"] = np.void(header)
        file.attrs["ignore_label"] = IGNORE_NONE if ignore_label is None else ignore_label
        file.attrs["intensity"] = json.dumps(intensity or intensity_statistics(image))
        file.attrs["source_image"] = printable(source_image)
        file.attrs["source_label"] = printable(source_label)
        file.attrs["planes"] = np.asarray(planes, np.int64)
        file.attrs["group"] = group


def _storage(shape, compression):
    """How h5py stores a volume: as it is, or in chunks, each compressed and with a checksum."""
    if compression is None:
        return {}
    chunk = tuple(min(most, n) for most, n in zip(CHUNK, shape[-3:], strict=True))
    chunks = (*(1,) * (len(shape) - 3), *chunk)
    return {"chunks": chunks, "compression": compression, "fletcher32": True}


def _write_label(file, label, ignore_label, storage):
    """Write the label and coordinates of its classes; returns the ids of these."""
    rng = np.random.default_rng(0)
    file.create_dataset("label", data=label, **storage)
    present = np.flatnonzero(np.bincount(label.reshape(-1), minlength=256))
    ids = [c for c in present.tolist() if c not in (0, ignore_label)]
    for class_id in ids:
        coordinates = sample_coordinates(label, class_id, rng)
        file.create_dataset(f"foreground/{class_id}", data=coordinates)
    file.create_dataset("background", data=sample_coordinates(label, 0, rng))
    return ids


# ---------------------------------------------------------------------------- reading


def read_case(path):
    """The `Case` of a case file. ValueError if the file is not one."""
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            channels, *shape = file["image"].shape
            ignore, affine = int(file.attrs["ignore_label"]), file.attrs.get("affine")
            coordinates = {"background": "background"} if "background" in file else {}
            coordinates |= {int(c): f"foreground/{c}" for c in file.get("foreground", ())}
            names = [name for name in VOLUMES if name in file] + list(coordinates.values())
            status = path.stat()
            return Case(
                id=path.stem,
                path=str(path),
                group=str(file.attrs["group"]),
                shape=tuple(shape),
                channels=channels,
                dtype=file["image"].dtype.str,
                spacing=tuple(float(s) for s in file.attrs["spacing"]),
                unit=str(file.attrs["unit"]),
                labeled="label" in file,
                ignore_label=None if ignore == IGNORE_NONE else ignore,
                intensity=json.loads(file.attrs["intensity"]),
                layout={name: _layout(file[name]) for name in names},
                counts={key: len(file[name]) for key, name in coordinates.items()},
                stamp=(status.st_size, status.st_mtime_ns),
                skeleton="skeleton" in file,
                source=str(file.attrs.get("source_image", "")),
                planes=tuple(int(z) for z in file.attrs.get("planes", ())),
                axes="" if affine is None else axes_of(check_affine(affine, path)),
            )
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a case file written by prepare.py, got one that cannot be read as "
            f"such ({error}); prepare this case again"
        ) from error


def _layout(dataset):
    offset = dataset.id.get_offset()  # None: stored in chunks, or nothing is stored
    return None if offset is None else (offset, dataset.shape, dataset.dtype.str)


@contextlib.contextmanager
def opened(case):
    """The case file, open for HDF5. Unreadable where that cannot be read."""
    try:
        with h5py.File(case.path, "r") as file:
            yield file
    except OSError as error:
        raise Unreadable(
            f"case {case.id}: expected to read {case.path}, got {error}; prepare this case again"
        ) from error


def read_array(case, name, selection):
    """A selection of a data set of a case file: a copy, C-contiguous, in native byte order.

    What is not compressed is read through a memory map: a box touches its own pages and no more.
    """
    if name not in case.layout:
        raise ValueError(
            f"case {case.id}: expected {name!r} in {case.path}, got a file with "
            f"{', '.join(case.layout)} only; prepare this case again with it"
        )
    if case.layout[name] is None:
        with opened(case) as file:
            return native(file[name][selection])
    offset, shape, dtype = case.layout[name]
    try:
        stored = np.memmap(case.path, dtype, "r", offset, shape)
    except ValueError as error:  # of mmap, for a file that ends before the data set does
        raise Unreadable(
            f"case {case.id}: expected all of {name!r} in {case.path}, got a file that is cut off, "
            "prepare this case again"
        ) from error
    return native(stored[selection])


def native(array):
    """A copy, C-contiguous, in this machine's byte order."""
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def fingerprint(case):
    """A number that changes with the voxels of a case, not with the place or the time of its file.

    Of what prepare.py has found out about them, so that it costs no more than that to read. None
    if the file cannot be read.
    """
    try:
        with opened(case) as file:
            about = (case.shape, case.spacing, case.ignore_label, file.attrs["intensity"])
            number = zlib.crc32(repr(about).encode())
            for key in case.counts:
                name = key if key == "background" else f"foreground/{key}"
                number = zlib.crc32(file[name][:].tobytes(), number)
            return number
    except (Unreadable, KeyError):
        return None


def check_unchanged(case):
    """Unreadable if the file of a case is missing, or not the one that was read at the start."""
    try:
        status = os.stat(case.path)
    except OSError as error:
        raise Unreadable(
            f"case {case.id}: expected the file {case.path}, got {error.strerror}; put it back, or "
            "prepare this case again"
        ) from error
    if (status.st_size, status.st_mtime_ns) != case.stamp:
        raise Unreadable(
            f"case {case.id}: expected {case.path} as it was when this run began, got a file that "
            "was changed since; start the run again, and prepare no data while one is running"
        )


# ---------------------------------------------------------------------------- data sets


def write_dataset(root, *, classes, ignore_label, unit, case_ids, regions=None):
    """Write `dataset.json` for the case files `<id>.h5` that stand in root.

    classes, regions: as of `Dataset`.
    """
    root = Path(root)
    cases = [read_case(root / f"{case_id}.h5") for case_id in sorted(case_ids)]
    keys = ("group", "shape", "channels", "spacing", "labeled")
    content = {
        "format": "lamina-dataset-1",
        "classes": classes,
        **({"regions": regions} if regions else {}),
        "ignore_label": ignore_label,
        "unit": unit,
        "groups": sorted({case.group for case in cases}),
        "cases": [
            {"id": case.id, "file": f"{case.id}.h5"} | {key: getattr(case, key) for key in keys}
            for case in cases
        ],
    }
    with atomic.replacing(root / DATASET_FILE) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def is_dataset(folder):
    """Whether a folder has a dataset.json that is not nnU-Net's: ours, or one that is broken."""
    path = Path(folder) / DATASET_FILE
    if not path.is_file():
        return path.is_symlink()
    try:
        return NNUNET_KEYS.isdisjoint(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return True


def read_dataset(root, source=""):
    """The `Dataset` in a folder made by prepare.py; source: where it comes from, for errors."""
    root = Path(root)
    path = root / DATASET_FILE
    if not path.is_file():
        got = f"{path}, a link to nothing" if path.is_symlink() else root.absolute()
        raise FileNotFoundError(
            f"data.root: expected a folder made by prepare.py with a {DATASET_FILE}, got {got}; "
            + "if it was moved, give data.root=DIR; "
            + (f"the data: {source}; " if source else "")
            + f"prepare files of your own with `{command_of('prepare.py')} --images PATH --labels "
            "PATH --out DIR`, synthetic ones with --phantom scroll --out DIR"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "lamina" not in str(content.get("format")):
            raise TypeError("another format, such as nnU-Net's: prepare that folder first")
        files = {entry["id"]: root / entry["file"] for entry in content["cases"]}
        if [file.stem for file in files.values()] != [e["id"] for e in content["cases"]]:
            raise TypeError("other entries than one of each id with the file <id>.h5")
        classes, ignore, unit = content["classes"], content["ignore_label"], content["unit"]
        regions = {name: tuple(ids) for name, ids in content.get("regions", {}).items()}
        if not all(ids and {*ids} <= {*classes.values()} - {0} for ids in regions.values()):
            raise TypeError(f"regions of other ids than those of the classes, {regions}")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected what prepare.py writes, got {error}") from error
    if gone := [file for file in files.values() if not file.is_file()]:
        sentence = f"expected a case of {path}, got no such file; put it back, or remove its entry "
        sentence += "there; if the data lie elsewhere, give that folder (data.root=DIR)"
        raise InputErrors(*(f"{file}: {sentence}" for file in gone))
    cases = {case_id: read_case(file) for case_id, file in files.items()}
    return Dataset(str(root), classes, ignore, unit, cases, regions)
