"""OME-Zarr: volumes in chunks, on disk or at a URL, of which only the boxes asked for are read.

    volume = open_volume("scroll.zarr", wanted=(7.9, 7.9, 7.9), unit="micron")
    volume[:, 0:64, 0:128, 0:128]       # (C, 64, 128, 128)

Versions 0.4 (zarr v2) and 0.5 (zarr v3, sharded or not), and plain zarr arrays without spacing.
"""

import contextlib
import itertools
import math
import re
from dataclasses import dataclass, replace

import numpy as np

from volumes.volume import (
    METRES,
    Volume,
    VolumeError,
    box_within,
    in_one_unit,
    is_spacing,
    unit_scale,
)

USUAL_AXES = {3: "zyx", 4: "czyx", 5: "tczyx"}  # of arrays that name none
_LETTERS = {"channel": "c", "time": "t"}
COARSER = math.sqrt(2)  # half a step of a pyramid, whose levels are 2 apart
_PATH = re.compile(r"^(.*\.zarr)(?:[/\\]+(.*?))?[/\\]*$", re.IGNORECASE | re.DOTALL)


def split(path):
    """`a.zarr/labels/mask` as ("a.zarr", "labels/mask"), "a.zarr" with ""; else (path, "")."""
    match = _PATH.match(str(path))
    return (match[1], (match[2] or "").replace("\\", "/")) if match else (str(path), "")


def is_url(path):
    """Whether a path is read through fsspec, such as https://... or s3://..."""
    return re.match(r"[a-z][a-z0-9+.-]+://", str(path), re.IGNORECASE) is not None


class ZarrVolume:
    """A volume that stays where it is: voxels are read when it is sliced, in any thread.

    shape (C, D, H, W); dtype in native byte order; chunks (z, y, x) of what is decoded at once, in
    a shard the inner chunk; fill: the value of chunks that are not stored; spacing (z, y, x) in
    unit, or None; offset (z, y, x) in unit: the place of voxel 0; level: its name, "" of an array
    in no multiscales.
    """

    def __init__(self, array, axes, path, level):
        """array: a zarr.Array, with a letter of axes for each of its dimensions."""
        from volumes import zarr_files  # imports zarr, which few need

        lengths = dict(zip(axes, array.shape, strict=False))
        if not len(axes) == array.ndim == len(lengths) or not {*"zyx"} <= lengths.keys():
            raise VolumeError(
                f"{path}: expected axes z, y and x, each once, and perhaps c, got "
                f"{', '.join(axes)} of shape {array.shape}; store such an array"
            )
        others = [f"{axis} of {n}" for axis, n in lengths.items() if axis not in "czyx" and n > 1]
        if others:
            raise VolumeError(
                f"{path}: expected one volume, with an axis t of length 1 at most, got "
                f"{', '.join(others)}; store each by itself"
            )
        if array.dtype.kind not in "buif":
            raise VolumeError(
                f"{path}: expected voxels of real numbers, got dtype {array.dtype}; convert it"
            )
        self.path, self._array, self._axes = str(path), zarr_files.checked(array), axes
        self.level, self.spacing = level.name, level.spacing
        self.unit, self.offset = level.unit, level.offset
        self.shape = (lengths.get("c", 1), *(lengths[axis] for axis in "zyx"))
        self.dtype = array.dtype.newbyteorder("=")
        chunk = dict(zip(axes, array.chunks, strict=True))
        self._steps = (chunk.get("c", 1), *(chunk[axis] for axis in "zyx"))
        self.chunks = self._steps[1:]
        file = array.shards or array.chunks
        self._per_file = tuple(n // step for n, step in zip(file, array.chunks, strict=True))
        self.fill = self.dtype.type(array.fill_value or 0)
        self._files = {}  # {key of a file: which of its chunks are stored}

    def __getitem__(self, box):
        """The voxels of a box as a new array (C, D, H, W); box: slices of step 1, as numpy's.

        VolumeError where a chunk is damaged: it is named.
        """
        box = box if isinstance(box, tuple) else (box,)
        box = self._within((*box, *(slice(None),) * (4 - len(box))))
        try:
            if self._array.shards:  # zarr takes one of 0 bytes for one that is not stored
                for index in self._indexes(box):
                    self._is_stored(index)
            return self._read(box)
        except (VolumeError, MemoryError):
            raise
        except Exception as error:  # of the codec, the disk or the network
            where = self._unreadable(box)
            raise VolumeError(
                f"{self.path}: expected chunks that can be read, got {where} that cannot "
                f"({_reason(error)}); {_advice(self.path)}"
            ) from error

    def _within(self, box):
        return [slice(*s.indices(n)[:2]) for s, n in zip(box, self.shape, strict=True)]

    def _read(self, box):
        of_axis = dict(zip("czyx", box, strict=True))
        voxels = self._array[tuple(of_axis.get(axis, slice(None)) for axis in self._axes)]
        order = [self._axes.index(axis) for axis in "czyx" if axis in self._axes]
        rest = [axis for axis in range(voxels.ndim) if axis not in order]  # of length 1
        shape = [max(0, s.stop - s.start) for s in box]
        return voxels.transpose(*order, *rest).reshape(shape).astype(self.dtype, copy=False)

    def _unreadable(self, box):
        """The first chunk of a box that cannot be read, for people."""
        for index in self._indexes(box):
            chunk = [slice(i * n, i * n + n) for i, n in zip(index, self._steps, strict=True)]
            try:
                self._read(self._within(chunk))
            except Exception:
                where = ", ".join(f"{s.start}:{s.stop}" for s in chunk[1:])
                return f"the chunk at {where} (z, y, x; file {self._place(index)[0]})"
        return "one"  # which came at the second try

    def _indexes(self, box):
        """The indexes c, z, y, x of all chunks that a box touches."""
        pairs = zip(box, self._steps, strict=True)
        return itertools.product(*(range(s.start // n, -(-s.stop // n)) for s, n in pairs))

    def stored(self, z, y, x):
        """Whether the chunk of these indexes (in units of chunks) is stored, in any channel; where
        it is not, all its voxels are `fill`. The answer for a file is kept once it is known."""
        channels = range(-(-self.shape[0] // self._steps[0]))
        return any(self._is_stored((c, z, y, x)) for c in channels)

    def _is_stored(self, index):
        from volumes import zarr_files

        key, inside = self._place(index)
        if key not in self._files:
            try:
                self._files[key] = zarr_files.stored_chunks(self._array, key, self._per_file)
            except Exception as error:  # of the disk or the network
                raise VolumeError(
                    f"{self.path}: expected to look up the file {key}, got {_reason(error)}; "
                    f"{_advice(self.path)}"
                ) from error
        if self._files[key] is None:
            raise VolumeError(
                f"{self.path}: expected chunks that can be read, got the file {key} that is cut "
                f"or damaged; {_advice(self.path)}"
            )
        return bool(self._files[key][inside])

    def _place(self, index):
        """(key of the file that holds the chunk of an index c, z, y, x, its place there)."""
        of_axis = dict(zip("czyx", index, strict=True))
        place = [of_axis.get(axis, 0) for axis in self._axes]
        file = tuple(i // n for i, n in zip(place, self._per_file, strict=True))
        inside = tuple(i % n for i, n in zip(place, self._per_file, strict=True))
        return self._array.metadata.encode_chunk_key(file), inside


# ---------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class Level:
    """What the metadata say of one array of a multiscales."""

    name: str
    spacing: tuple[float, float, float] | None = None
    unit: str = ""
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)


def open_volume(path, *, wanted=None, unit="", role="image"):
    """The `ZarrVolume` that a path names: `a.zarr`, a level of it as `a.zarr/0`, or a URL.

    wanted: voxel size z, y, x in unit, 0 or None on axes where any is right: of a path that names
    no level, the coarsest one is opened no axis of which is coarser than wanted (or than level 0,
    where that is coarser already) by more than half a step, a factor of 1.41; level 0 where one of
    the two units is unknown. role "label": of a group with `labels/` the only one there.
    VolumeError, one sentence, for what cannot be opened.
    """
    try:
        return _open_volume(path, wanted, unit, role)
    except VolumeError:
        raise
    except Exception as error:  # of the metadata, the disk or the network
        raise VolumeError(
            f"{path}: expected metadata of OME-Zarr 0.4 or 0.5, got {_reason(error)}; "
            f"correct them, or {_advice(path)}"
        ) from error


def _open_volume(path, wanted, unit, role):
    import zarr

    root, inner = split(path)
    top = _open(root)
    if not dict(top.attrs).get("lamina", {}).get("complete", True):
        raise VolumeError(
            f"{path}: expected a finished prediction, got one whose missing shards would be read "
            "as 0; run infer.py again"
        )
    node = _find(path, top, inner) if inner else top
    if isinstance(node, zarr.Array):
        axes, level = _as_a_level(path, top, inner) or (_axes_of(node), Level(""))
    else:
        group = _label_in(path, node) if role == "label" else node
        axes, levels = _multiscales(path, group)
        level = levels[_choose(levels, wanted, unit)]
        node = _find(f"{path}/{level.name}", group, level.name)
    return ZarrVolume(node, axes, path, level)


def _open(root):
    """The zarr group or array of a path without what lies inside of it."""
    import zarr

    try:
        # What consolidated metadata list may be older than a label that was added.
        return zarr.open(str(root), mode="r", use_consolidated=False)
    except FileNotFoundError as error:
        got = "none there; check the path"
        raise VolumeError(f"{root}: expected a zarr group or array, got {got}") from error
    except ImportError as error:
        raise VolumeError(
            f"{root}: expected a driver of fsspec for such a URL, got none ({error}); install it"
        ) from error


def _reason(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _advice(path):
    return "check the address and the network" if is_url(path) else "fetch it again"


def _find(path, group, inner):
    """The group or array of a name in a group; where it is none, VolumeError lists the levels."""
    import zarr

    node = group.get(inner) if isinstance(group, zarr.Group) else None
    if node is None:
        above = inner.rpartition("/")[0]
        parent = group.get(above) if above and isinstance(group, zarr.Group) else group
        levels = [dataset["path"] for dataset in _declared(parent).get("datasets", ())]
        advice = f"its levels are {', '.join(levels)}" if levels else "check the path"
        raise VolumeError(f"{path}: expected an array or a group, got none there; {advice}")
    return node


def _declared(node):
    """The first multiscales in the metadata of a group, {} if there are none."""
    attributes = dict(getattr(node, "attrs", ()))
    return next(iter(attributes.get("ome", attributes).get("multiscales", ())), {})


def _as_a_level(path, top, inner):
    """(axes, `Level`) of an array by the multiscales of a group above it that lists it; or None."""
    parts = inner.split("/")
    for count in range(len(parts) - 1, -1, -1) if inner else ():
        group, name = "/".join(parts[:count]), "/".join(parts[count:])
        group = top[group] if group else top
        if name in [dataset["path"] for dataset in _declared(group).get("datasets", ())]:
            axes, levels = _multiscales(path, group)
            return axes, next(level for level in levels if level.name == name)
    return None


def _axes_of(array):
    """A letter for each axis of an array outside of any multiscales."""
    names = getattr(array.metadata, "dimension_names", None)
    names = names or array.attrs.get("_ARRAY_DIMENSIONS", ())  # of xarray, in version 2
    axes = [_letter(name or "?") for name in names]
    return axes if {*"zyx"} & {*axes} else USUAL_AXES.get(array.ndim, "?" * array.ndim)


def _letter(name, kind=""):
    """The letter of an axis by its name and type; a name that is none of ours as it is."""
    word = kind if kind in _LETTERS else name.lower()
    return _LETTERS.get(word, word)


def _label_in(path, group):
    """The group of the only label in `labels/` of an image; the image where it has no labels."""
    labels = group.get("labels")
    if labels is None:
        return group
    attributes = dict(labels.attrs)
    names = attributes.get("ome", attributes).get("labels") or sorted(labels.group_keys())
    if len(names) != 1:
        raise VolumeError(
            f"{path}: expected one label in its group labels, got {', '.join(names) or 'none'}; "
            f"name one, as {path}/labels/NAME"
        )
    return _find(f"{path}/labels/{names[0]}", labels, names[0])


def _multiscales(path, group):
    """(a letter or name for each axis, [`Level`] from fine to coarse) of a group."""
    declared = _declared(group)
    if not declared:
        inside = []
        with contextlib.suppress(OSError, ValueError):  # a URL may not be listed
            inside = [name for name, one in group.groups() if _declared(one)] or [
                name for name, _ in group.arrays()
            ]
        here = f"{split(path)[0]}/{group.path}".rstrip("/")
        advice = (
            f"give {' or '.join(f'{here}/{name}' for name in inside)}" if inside else "check it"
        )
        raise VolumeError(
            f"{path}: expected the multiscales of OME-Zarr, got a group without; {advice}"
        )
    if "coordinateSystems" in declared:  # whose axes may be in another order than the usual one
        raise ValueError("coordinateSystems of a later version")
    axes = declared.get("axes", USUAL_AXES[5])
    axes = [{"name": axis} if isinstance(axis, str) else axis for axis in axes]
    letters = [_letter(axis["name"], axis.get("type")) for axis in axes]
    names = [axes[letters.index(axis)].get("unit", "") if axis in letters else "" for axis in "zyx"]
    common = declared.get("coordinateTransformations", ())
    levels = []
    for dataset in declared["datasets"]:
        steps = [*dataset.get("coordinateTransformations", ()), *common]
        levels.append(_level(path, dataset["path"], letters, steps, names))
    first = levels[0]
    if not first.unit and first.spacing == (1.0, 1.0, 1.0):  # what is written where it is unknown
        levels = [replace(level, spacing=None) for level in levels]
    return letters, levels


def _level(path, name, axes, transformations, unit_names):
    """The `Level` of scales and translations, which hold one after another."""
    scale, offset = np.ones(len(axes)), np.zeros(len(axes))
    for step in transformations:
        if step["type"] == "identity":
            continue
        if step["type"] not in ("scale", "translation"):
            raise ValueError(f"a transformation {step['type']}")
        numbers = np.array(step[step["type"]], float)
        if numbers.shape != scale.shape:
            raise ValueError(f"a {step['type']} {numbers.tolist()} of axes {', '.join(axes)}")
        if step["type"] == "scale":
            scale, offset = scale * numbers, offset * numbers
        else:
            offset = offset + numbers
    order = [axes.index(axis) for axis in "zyx" if axis in axes]
    sizes, place = scale[order], offset[order]
    if len(order) < 3 or not any(step["type"] == "scale" for step in transformations):
        return Level(name)
    if not is_spacing(sizes):
        raise ValueError(f"the scale {scale.tolist()} of level {name}")
    spacing, unit = in_one_unit(path, sizes, unit_names)
    return Level(name, spacing, unit, tuple((place * spacing / sizes).tolist()))


def _choose(levels, wanted, unit):
    """The index of the level to open, as `open_volume` says."""
    first = levels[0]
    known = wanted is not None and all(level.spacing for level in levels)
    if not known or (first.unit in METRES) != (unit in METRES):
        return 0
    sizes = np.array([level.spacing for level in levels]) * unit_scale(first.unit, unit)
    most = [max(size, w) if w else math.inf for size, w in zip(sizes[0], wanted, strict=True)]
    return int(np.flatnonzero((sizes <= COARSER * np.array(most)).all(axis=1))[-1])


# ---------------------------------------------------------------------------- as a format


def read(path, dataset, role):
    """The `Volume` of all voxels, (C, D, H, W); dataset: what lies inside of the zarr, or None."""
    return replace(read_box(path, dataset, role, (slice(None),) * 3), whole=())


def read_box(path, dataset, role, box):
    """The `Volume` of the voxels in a box, slices of z, y, x; a note counts chunks not stored."""
    stored = open_volume(f"{path}/{dataset}" if dataset else path, role=role)
    box, whole = box_within(stored.path, box, stored.shape[1:], role)
    array, notes = stored[:, *box], ()
    chunks = [range(s.start // n, -(-s.stop // n)) for s, n in zip(box, stored.chunks, strict=True)]
    missing = sum(not stored.stored(*index) for index in itertools.product(*chunks))
    if missing:
        of = math.prod(map(len, chunks))
        notes = (f"{missing} of {of} chunks are not stored, and read as {stored.fill}",)
    return Volume(array, stored.spacing, stored.unit, None, path, notes=notes, whole=whole)


def count_voxels(path, dataset):
    """Voxels of the volume, by its metadata."""
    return math.prod(open_volume(f"{path}/{dataset}" if dataset else path).shape)
